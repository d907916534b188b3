"""What people rated besides the known targets: how it is asked for, where its labels come from, what is refused."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import deltaclip
from deltaclip.base.errors import UserError
from deltaclip.base.vocabulary import AUTHENTICITY, CONSISTENCY, QUALITY, Target
from deltaclip.cli import main
from deltaclip.features.data.adapters import read_manifest
from deltaclip.features.data.targets import AskedTarget, parse_targets, recorded_targets
from deltaclip.features.store.reader import FeatureStore

COMPOSITION, FIT = Target("composition", "image"), Target("fit", "pair")
FORM = "give NAME=COLUMN:image, or :pair where raters saw the prompt too"
NAME = "use lower-case letters, digits and _, a letter first, no ending _std, _base, _delta, _label, _low or _high"


def write(tmp_path, *lines):
    path = tmp_path / "t.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def read(data, *targets, **options):
    return read_manifest(data, targets=targets, **options)


@pytest.mark.parametrize(
    ("text", "target", "column"),
    [
        ("composition=comp_score:image", COMPOSITION, "comp_score"),
        ("composition:image", COMPOSITION, "composition"),
        (" fit = Score of Fit : pair ", FIT, "Score of Fit"),
        ("fit=a=b:pair", FIT, "a=b"),
        ("fit=MOS: fit:pair", FIT, "MOS: fit"),
        ("quality=overall", QUALITY, "overall"),
        ("quality=overall:image", QUALITY, "overall"),
        ("consistency", CONSISTENCY, "consistency"),
        ("authenticity=real", AUTHENTICITY, "real"),
    ],
)
def test_ways_to_ask(text, target, column):
    assert parse_targets([text]) == (AskedTarget(target, column),)


def test_several_keep_their_order():
    assert [each.target for each in parse_targets(["fit=f:pair", "quality=q", "composition:image"])] == [
        FIT,
        QUALITY,
        COMPOSITION,
    ]
    assert parse_targets(None) == parse_targets([]) == ()


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["composition"], f"'composition' does not say what raters saw; {FORM}"),
        (["composition=comp"], f"'composition=comp' does not say what raters saw; {FORM}"),
        (["composition=comp:"], "'composition=comp:' is no target; known: image, pair"),
        (["composition=comp:imgae"], "'composition=comp:imgae' is no target; did you mean 'image'?"),
        (["quality=overall:both"], "'quality=overall:both' is no target; known: image, pair"),
        ([""], f"'' does not say what raters saw; {FORM}"),
        (["=comp:image"], f"'' is no name for a target; {NAME}"),
        (["Composition=comp:image"], f"'Composition' is no name for a target; {NAME}"),
        (["2d=comp:image"], f"'2d' is no name for a target; {NAME}"),
        (["comp score:image"], f"'comp score' is no name for a target; {NAME}"),
        (["fit=a:pair", "fit=b:pair"], "'fit' is given twice; give each target once"),
        (["quality=a", "quality=b:image"], "'quality' is given twice; give each target once"),
        (["quality=a:pair"], "quality is of the image alone; give quality=a, or another name"),
        (
            ["consistency:image"],
            "consistency is of the image and its prompt; give consistency=consistency, or another name",
        ),
    ],
)
def test_refusals(given, line):
    with pytest.raises(UserError) as caught:
        parse_targets(given)
    assert str(caught.value) == f"--target: {line}"


@pytest.mark.parametrize("ending", ["std", "base", "delta", "label", "low", "high"])
def test_names_of_the_columns_of_a_target_are_no_targets(ending):
    with pytest.raises(UserError) as caught:
        parse_targets([f"fit_{ending}=x:pair"])
    assert str(caught.value) == f"--target: 'fit_{ending}' is no name for a target; {NAME}"


# Of manifests; of predictions; of caches, of shards, of exports.
@pytest.mark.parametrize(
    "name",
    [*("prompt", "image", "split"), *("side", "error", "q", "c"), *("file", "position", "image_path", "caption")],
)
def test_names_of_other_columns_are_no_targets(name):
    with pytest.raises(UserError) as caught:
        parse_targets([f"{name}=x:pair"])
    assert str(caught.value) == f"--target: {name!r} is the name of another column; give the target another name"


def test_labels_of_an_asked_target_and_of_the_known_ones(tmp_path):
    data = write(
        tmp_path, "image,prompt,mos,Comp Score,comp_score_std", "a.png,p,1,2,0.4", "b.png,q,5,,", "c.png,q,3,5,0"
    )
    found = read(data, "composition=comp_score:image")
    assert found.targets == (QUALITY, COMPOSITION)
    assert list(found.labels) == ["quality", "quality_std", "composition", "composition_std"]
    np.testing.assert_allclose(found.labels["composition"], [0.25, np.nan, 1], rtol=1e-12)
    np.testing.assert_allclose(found.labels["composition_std"], [0.1, np.nan, 0], rtol=1e-12)
    assert {name: str(known) for name, known in found.label_ranges.items()} == dict.fromkeys(
        ("quality", "composition"), "1 to 5 (detected)"
    )
    given = read(data, "composition=comp_score:image", label_range=["1,5", "composition=0,10"])
    np.testing.assert_allclose(given.labels["composition"], [0.2, np.nan, 0.5], rtol=1e-12)
    np.testing.assert_allclose(given.labels["quality"], [0, 1, 0.5], rtol=1e-12)
    assert read(data).targets == (QUALITY,)  # nobody asked


def test_a_column_that_was_asked_for_is_of_that_target_alone(tmp_path):
    data = write(tmp_path, "image,prompt,score,mos,mos_std", "a.png,p,0.25,0.5,0.1")
    found = read(data, "composition=mos:image")
    assert found.targets == (QUALITY, COMPOSITION)
    assert {name: values.tolist() for name, values in found.labels.items()} == {
        "quality": [0.25],
        "quality_std": [pytest.approx(np.nan, nan_ok=True)],
        "composition": [0.5],
        "composition_std": [0.1],
    }
    only = write(tmp_path, "image,prompt,mos", "a.png,p,0.5")
    assert read(only, "composition=mos:image").targets == (COMPOSITION,)


def test_a_known_target_from_another_column(tmp_path):
    data = write(tmp_path, "image,prompt,mos,mos_std,overall,overall_std", "a.png,p,0.5,0.1,0.75,0.2")
    found = read(data, "quality=overall")
    assert found.targets == (QUALITY,)
    assert {name: values.tolist() for name, values in found.labels.items()} == {"quality": [0.75], "quality_std": [0.2]}


def test_labels_of_pairs_need_a_prompt(tmp_path):
    data = write(tmp_path, "image,prompt,comp,f", "a.png,p,0.5,0.5", "b.png,,0.25,1")
    found = read(data, "composition=comp:image", "fit=f:pair")
    np.testing.assert_array_equal(found.labels["fit"], [0.5, np.nan])
    np.testing.assert_array_equal(found.labels["composition"], [0.5, 0.25])
    assert found.notes == ("1 rows have no prompt: of use for composition alone; 1 labels of fit are left out",)


@pytest.mark.parametrize(
    ("targets", "options", "line"),
    [
        (["fit=comp_scor:pair"], {}, "{data}: has no column 'comp_scor' for fit; did you mean 'comp_score'?"),
        (["fit:pair"], {}, "{data}: has no column 'fit' for fit; known: image, prompt, comp_score, word"),
        (["fit=word:pair"], {}, "{data}, line 2, column word: 'good' is no number; leave a missing label empty"),
        (
            ["fit=comp_score:pair"],
            {"label_range": "fitt=1,5"},
            "--label-range: 'fitt' is no label; did you mean 'fit'?",
        ),
    ],
)
def test_columns_that_are_not_there_or_have_no_numbers(tmp_path, targets, options, line):
    data = write(tmp_path, "image,prompt,comp_score,word", "a.png,p,0.5,good")
    with pytest.raises(UserError) as caught:
        read(data, *targets, **options)
    assert str(caught.value) == line.format(data=data)


def test_a_set_of_several_tables_has_the_column_in_each(tmp_path):
    (tmp_path / "info_train.csv").write_text("name,prompt,mos,comp\nA_0.png,p,1,2\n")
    (tmp_path / "info_val.csv").write_text("name,prompt,mos,comp\nA_1.png,p,,4\nA_2.png,p,,\n")
    found = read(f"aigiqa-20k:{tmp_path}", "composition=comp:image")
    assert found.targets == (QUALITY, COMPOSITION)
    np.testing.assert_allclose(found.labels["composition"], [0.4, 0.8])  # on the set's range, 0 to 5
    np.testing.assert_allclose(found.labels["quality"], [0.2, np.nan])
    (tmp_path / "info_val.csv").write_text("name,prompt,mos\nA_1.png,p,1\n")
    with pytest.raises(UserError) as caught:
        read(f"aigiqa-20k:{tmp_path}", "composition=comp:image")
    assert str(caught.value).startswith(f"{tmp_path}/info_val.csv: has no column 'comp' for composition; ")


def test_what_a_cache_records():
    assert recorded_targets({"name": "of version 2"}) == (QUALITY, CONSISTENCY)
    assert recorded_targets({"targets": [COMPOSITION.to_json(), FIT.to_json()]}) == (COMPOSITION, FIT)
    assert recorded_targets({"targets": []}) == ()


def test_the_example_of_the_documentation(tmp_path, monkeypatch, tiny_backbone):
    """The table and the command that docs/data.md shows beside each other, as they stand there."""
    page = (Path(deltaclip.__file__).parent / "docs" / "data.md").read_text(encoding="utf-8")
    about = page[page.index("**Other ratings.**") :]
    table, command = itertools.islice(re.findall(r"((?:^       \S.*\n)+)", about, flags=re.MULTILINE), 2)
    rows = [line.strip() for line in table.splitlines()]
    (tmp_path / "ratings.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    for row in rows[1:]:
        Image.effect_noise((80, 80), len(row)).convert("RGB").save(tmp_path / row.partition(",")[0])
    monkeypatch.chdir(tmp_path)
    (line,) = command.replace("\\\n", " ").splitlines()
    program, *arguments = shlex.split(line)
    monkeypatch.setattr("sys.argv", [program, *arguments, "--out", "c.h5"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    with FeatureStore.open(tmp_path / "c.h5") as store:
        assert store.targets == (QUALITY, Target("composition", "image"), Target("style_fit", "pair"))
        assert store.rows().numbers["composition"].tolist() == [0.25, 1, 0.75]
