"""Tables of pairs in every form that people have, to the rows and pairs that they mean."""

from __future__ import annotations

import csv
import io
import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deltaclip.base.errors import UserError
from deltaclip.features.check_data import check_data
from deltaclip.features.data.adapters import read_manifest
from deltaclip.features.data.images import hash_images
from deltaclip.features.data.preferences import folded, parse_pairs_target
from deltaclip.features.settings import CheckConfig


def png(shade):
    file = io.BytesIO()
    Image.new("RGB", (70, 70), (shade, 20, 30)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate("abcd"):
        (tmp_path / f"{name}.png").write_bytes(png(number))
    (tmp_path / "copy.png").write_bytes(png(0))
    return tmp_path


def write(folder, text, name="pairs.csv"):
    path = folder / name
    path.write_text(text)
    return str(path)


def meaning(manifest):
    """Return the pairs as (image, image, prompt, probability)."""
    pairs = manifest.preferences
    return [
        (manifest.images[a], manifest.images[b], manifest.prompts[a], round(p, 6))
        for a, b, p in zip(pairs.a_P, pairs.b_P, pairs.preferred_P.tolist(), strict=True)
    ]


@pytest.mark.parametrize(
    ("cells", "meant"),
    [
        (("a", "b", "tie"), (1, 0, 0.5)),
        (("A", "image_b", "Equal"), (1, 0, 0.5)),
        (("1", "0", "0.5"), (1, 0, 0.5)),
        (("0.75", "0", ""), (0.75, 0, None)),
        (("75%", "0%", "50%"), (0.75, 0, 0.5)),
        (("1", "2", "tie"), (1, 0, 0.5)),
        (("left", "right", "neither"), (1, 0, 0.5)),
        (("a.png", "c.png", "both"), (1, 0, 0.5)),
    ],
)
def test_what_is_preferred_is_said_in_many_ways(folder, cells, meant):
    pairs = (("a", "b"), ("b", "c"), ("c", "d"))
    lines = [f"{a}.png,{b}.png,x,{cell}" for (a, b), cell in zip(pairs, cells, strict=True)]
    found = read_manifest(write(folder, "\n".join(["image_a,image_b,prompt,preferred", *lines])))
    assert meaning(found) == [
        (f"{a}.png", f"{b}.png", "x", share) for (a, b), share in zip(pairs, meant, strict=True) if share is not None
    ]
    assert found.images == ["a.png", "b.png", "c.png", "d.png"]
    assert (found.preferences.target.name, np.isnan(found.labels["preference"]).all()) == ("preference", True)


def test_a_number_names_the_column_that_ends_with_it(folder):
    text = "image_0,image_1,preferred\na.png,b.png,0\nb.png,c.png,1\n"
    assert [share for *_, share in meaning(read_manifest(write(folder, text)))] == [1, 0]
    text = "image_1,image_2,winner\na.png,b.png,1\nb.png,c.png,2\n"
    assert [share for *_, share in meaning(read_manifest(write(folder, text)))] == [1, 0]


def test_pick_a_pic(folder):
    """Bytes in cells, labels in two columns, a label that lacks; the same picture in several rows is one image."""
    a, b, c = (png(number) for number in range(3))
    table = pa.table(
        {
            "jpg_0": [a, b, a, c],
            "jpg_1": [b, c, c, a],
            "caption": ["x", "x", "x", "x"],
            "label_0": [1.0, 0.5, 0.0, 0.0],
            "label_1": [0.0, 0.5, 1.0, 0.0],
            "has_label": [True, True, True, False],
            "model_0": ["m", "n", "m", "n"],
            "model_1": ["n", "n", "n", "m"],
        }
    )
    pq.write_table(table, folder / "train.parquet")
    found = read_manifest(str(folder / "train.parquet"))
    assert [share for *_, share in meaning(found)] == [1, 0.5, 0]
    assert "1 pairs have no preference: left out" in found.notes
    contents = hash_images([found.image_path(row) for row in range(len(found))], folder)
    assert [content.reason for content in contents] == [""] * len(contents)
    merged = folded(found, contents).manifest
    pairs = merged.preferences
    assert len(merged) == 3
    assert list(zip(pairs.a_P.tolist(), pairs.b_P.tolist(), strict=True)) == [(0, 1), (1, 2), (0, 2)]
    assert merged.sources == ["m", "n", "n"]


def test_hpd_and_image_reward(folder):
    """Lists of images: two with votes, several with ranks and ties; all pairs of a list."""
    train = [{"prompt": "x", "image_path": ["a.png", "b.png"], "human_preference": [0, 1]}]
    assert meaning(read_manifest(write(folder, json.dumps(train), "hpd.json"))) == [("a.png", "b.png", "x", 0)]
    test = [{"prompt": "x", "image_path": ["a.png", "b.png", "c.png"], "rank": [2, 1, 3]}]
    assert meaning(read_manifest(write(folder, json.dumps(test), "hpd.json"))) == [
        ("a.png", "b.png", "x", 0),
        ("a.png", "c.png", "x", 1),
        ("b.png", "c.png", "x", 1),
    ]
    reward = [
        {"prompt_id": "7", "prompt": "x", "generations": ["a.png", "b.png", "c.png"], "ranking": [1, 2, 2]},
        {"prompt_id": "8", "prompt": "y", "generations": ["a.png", "d.png"], "ranking": [2, 1]},
    ]
    found = read_manifest(write(folder, json.dumps(reward), "reward.json"))
    assert meaning(found) == [
        ("a.png", "b.png", "x", 1),
        ("a.png", "c.png", "x", 1),
        ("b.png", "c.png", "x", 0.5),
        ("a.png", "d.png", "y", 0),
    ]
    assert found.groups == ["7", "7", "7", "8", "8"]


def test_chosen_and_rejected(folder):
    text = "prompt,chosen,rejected\nx,a.png,b.png\n"
    assert meaning(read_manifest(write(folder, text))) == [("a.png", "b.png", "x", 1)]


def test_ratings_and_pairs_share_rows(folder):
    """A picture of both is one row, whatever its name; a pair without a prompt takes the row that is there."""
    ratings = write(folder, "image,prompt,quality\na.png,x,0.2\nb.png,x,0.9\n", "ratings.csv")
    pairs = write(folder, "image_a,image_b,preferred\ncopy.png,b.png,b\nb.png,c.png,tie\n")
    found = read_manifest(ratings, pairs=pairs)
    contents = hash_images([found.image_path(row) for row in range(len(found))], folder)
    merged, kept = folded(found, contents)
    assert merged.images == ["a.png", "b.png", "c.png"]
    assert len(kept) == 3
    assert meaning(merged) == [("a.png", "b.png", "x", 0), ("b.png", "c.png", "x", 0.5)]
    assert merged.targets[0].name == merged.preferences.target.name == "quality"
    np.testing.assert_array_equal(merged.labels["quality"], [0.2, 0.9, np.nan])


def test_images_of_pairs_in_another_folder_are_found(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "e.png").write_bytes(png(9))
    (folder / "sub" / "f.png").write_bytes(png(8))
    ratings = write(folder, "image,prompt,quality\na.png,x,0.2\n", "ratings.csv")
    pairs = write(folder / "sub", "image_a,image_b,preferred\ne.png,f.png,a\n")
    assert read_manifest(ratings, pairs=pairs).images == ["a.png", "sub/e.png", "sub/f.png"]


NAMES = st.sampled_from(["a.png", "b.png", "c.png", "d.png"])
RANKED = st.lists(st.tuples(st.lists(NAMES, min_size=2, max_size=4, unique=True), st.randoms()), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None)
@given(RANKED)
def test_every_form_means_the_same(tmp_path_factory, entries):
    """Rankings as lists, and as the table of their pairs with words or with probabilities."""
    folder = tmp_path_factory.mktemp("forms")
    records, rows = [], []
    for number, (images, chance) in enumerate(entries):
        ranks = [chance.randint(1, 3) for _ in images]
        records.append({"prompt": f"p{number}", "generations": images, "ranking": ranks})
        for (i, one), (j, other) in itertools.combinations(enumerate(images), 2):
            share = 0.5 if ranks[i] == ranks[j] else float(ranks[i] < ranks[j])
            rows.append((one, other, f"p{number}", share))
    as_lists = read_manifest(write(folder, json.dumps(records), "lists.json"))
    assert meaning(as_lists) == rows
    words = {0.0: "b", 0.5: "tie", 1.0: "a"}
    for spelled in (words.get, str):
        file = io.StringIO()
        writer = csv.writer(file)
        writer.writerow(["image_a", "image_b", "prompt", "preferred"])
        writer.writerows([*row[:3], spelled(row[3])] for row in rows)
        assert meaning(read_manifest(write(folder, file.getvalue()))) == rows


# ---- What is wrong, in one line

WAYS = "give a, b, tie, or the probability that the first is preferred"
WRONG = [
    (
        "image_a,image_b,preferred\na.png,b.png,a\na.png,c.png,maybe\n",
        "{at}, line 3, column preferred: 'maybe' is neither of the two images, no tie and no probability; " + WAYS,
    ),
    (
        "image_a,image_b,preferred\na.png,b.png,1.5\n",
        "{at}, line 2, column preferred: '1.5' is neither of the two images, no tie and no probability; " + WAYS,
    ),
    (
        "image_a,image_b,preferred\na.png,a.png,a\n",
        "{at}, line 2, column image_b: 'a.png' is paired with itself; give two images, or remove the pair",
    ),
    (
        "image_a,image_b,preferred\na.png,,a\n",
        "{at}, line 2, column image_b: is empty: of two images only one is there; fill it in or remove the row",
    ),
    (
        "image_a,preferred\na.png,a\n",
        "{at}: has a column 'image_a' and none for the other image of a pair; call it 'image_b'",
    ),
    (
        "image,image_a,image_b,preferred\na.png,a.png,b.png,a\n",
        "{at}: mixes pairs (image_a, image_b) with single images (image); "
        "put pairs into a table of their own, and give it to --pairs",
    ),
    (
        "image_a,image_b\na.png,b.png\n",
        "{at}: has pairs of images and no column 'preferred'; add it: a, b, tie, or a probability",
    ),
    (
        "image_a,image_b,preferred\na.png,b.png,\n",
        "{at}: has no pair with a preference; fill in the preferences: " + WAYS,
    ),
    (
        "image_0,image_1,label_0,label_1\na.png,b.png,0,0\n",
        "{at}, line 2, column label_0: labels '0' and '0' prefer neither; give 1 and 0, or .5 and .5 for a tie",
    ),
    (
        "image_0,image_1,label_0,label_1\na.png,b.png,yes,no\n",
        "{at}, line 2, column label_0: 'yes' is no number; give 1 and 0, or .5 and .5 for a tie",
    ),
    (
        "image_a,image_b,preferred\na.png,b.png,None\n",
        "{at}, line 2, column preferred: 'None' may be a tie, or what a program has made of an empty cell; "
        "write tie, or leave the cell empty",
    ),
]


@pytest.mark.parametrize(("text", "said"), WRONG)
def test_what_is_wrong_is_one_line(folder, text, said):
    with pytest.raises(UserError) as error:
        read_manifest(write(folder, text))
    assert str(error.value) == said.format(at=folder / "pairs.csv")


@pytest.mark.parametrize("word", ["nan", "N/A", "NULL", "<NA>", "-", ""])
def test_words_for_nothing_are_no_preference_and_counted(folder, word):
    text = f"image_a,image_b,preferred\na.png,b.png,a\na.png,c.png,{word}\n"
    found = read_manifest(write(folder, text))
    assert meaning(found) == [("a.png", "b.png", "", 1.0)]
    assert "1 pairs have no preference: left out" in found.notes


@pytest.mark.parametrize("odd", [[1, 0], {"a": 1}])
def test_a_preference_of_another_type_is_named(folder, odd):
    rows = [{"image_a": "a.png", "image_b": f"{b}.png", "preferred": p} for b, p in (("b", True), ("c", odd))]
    with pytest.raises(UserError) as error:
        read_manifest(write(folder, "\n".join(map(json.dumps, rows)), "t.jsonl"))
    words = (
        "a list" if isinstance(odd, list) else "a truth value"
    )  # the first odd cell is named where others are not kept
    assert f"column preferred: holds {words}, no preference; {WAYS}" in str(error.value)


def test_truth_values_as_programs_write_them_into_text(folder):
    text = "image_a,image_b,preferred\na.png,b.png,True\na.png,c.png,False\n"
    assert [share for *_, share in meaning(read_manifest(write(folder, text)))] == [1.0, 0.0]


def test_lists_of_other_types(folder):
    def entry(images, preference):
        return {"prompt": "p", "image_path": images, "human_preference": preference}

    paths = [{"path": "a.png"}, {"bytes": None, "path": "b.png"}]
    entries = [
        entry(paths, [1, 0]),
        entry(["a.png", "c.png"], ["0", "1"]),
        entry(["b.png", "c.png"], [True, False]),
        entry(["a.png", "d.png"], [None, None]),
    ]
    found = read_manifest(write(folder, json.dumps(entries), "lists.json"))
    assert meaning(found) == [
        ("a.png", "b.png", "p", 1.0),
        ("a.png", "c.png", "p", 0.0),
        ("b.png", "c.png", "p", 1.0),
    ]
    assert "1 pairs have no preference: left out" in found.notes
    for images, words in (
        ([{"url": "x"}, "b.png"], "has an object in its list of images; give a list of paths"),
        ([None, "b.png"], "has fewer than two images; give a list of paths, or remove the entry"),
    ):
        with pytest.raises(UserError) as error:
            read_manifest(write(folder, json.dumps([entry(images, [1, 0])]), "lists.json"))
        assert str(error.value).endswith(words)


def test_lists_that_do_not_fit_are_refused(folder):
    for entry, said in (
        (
            {"generations": ["a.png", "b.png"], "ranking": [1, 2, 3]},
            "column ranking: [1, 2, 3] does not order 2 images",
        ),
        ({"generations": ["a.png", "b.png"], "ranking": [1, "x"]}, "column ranking: [1, 'x'] does not order 2 images"),
        ({"generations": ["a.png", "a.png"], "ranking": [1, 2]}, "column generations: 'a.png' is paired with itself"),
    ):
        with pytest.raises(UserError) as error:
            read_manifest(write(folder, json.dumps([entry | {"prompt": "x"}]), "r.json"))
        assert f"{error.value.place}: {error.value.message}" == f"{folder / 'r.json'}, entry 1, {said}"


def test_two_names_of_one_image_are_no_pair(folder):
    found = read_manifest(write(folder, "image_a,image_b,preferred\na.png,copy.png,a\n"))
    contents = hash_images([found.image_path(row) for row in range(2)], folder)
    with pytest.raises(UserError) as error:
        folded(found, contents)
    assert str(error.value) == (
        f"{folder / 'pairs.csv'}, line 2: 'a.png' and 'copy.png' hold one image, which is paired with itself; "
        "give two images, or remove the pair"
    )


def test_what_pairs_speak_for():
    assert parse_pairs_target(None, has_prompts=False).name == "quality"
    assert parse_pairs_target(None, has_prompts=True).to_json() == {"name": "preference", "sees": "pair"}
    assert parse_pairs_target("quality", has_prompts=True).sees == "image"
    assert parse_pairs_target("beauty:image", has_prompts=True).to_json() == {"name": "beauty", "sees": "image"}
    for given_, said in (
        (
            "beauty",
            "--pairs-target: 'beauty' does not say what people saw; "
            "give NAME:image, or NAME:pair where people saw the prompt too",
        ),
        ("quality:pair", "--pairs-target: 'quality:pair' does not say what people saw; give quality"),
    ):
        with pytest.raises(UserError) as error:
            parse_pairs_target(given_, has_prompts=True)
        assert str(error.value) == said


def test_data_check_finds_what_extract_would(folder):
    text = "image_a,image_b,prompt,preferred\na.png,copy.png,x,a\nb.png,gone.png,x,b\nb.png,c.png,x,tie\n"
    found = check_data(CheckConfig(data=write(folder, text)))
    assert (found.pairs, found.rows, found.exit_code) == (3, 5, 2)
    errors = [finding.check for finding in found.findings if finding.level == "error"]
    assert errors == ["unreadable_image", "pair_of_one", "torn_pair"]
    wrong = check_data(CheckConfig(data=write(folder, text.replace("tie", "perhaps"))))
    assert "preference" in [finding.check for finding in wrong.findings]
    right = check_data(CheckConfig(data=write(folder, "image_a,image_b,prompt,preferred\na.png,b.png,x,a\n")))
    assert (right.exit_code, [finding.check for finding in right.findings]) == (0, ["few_groups"])
