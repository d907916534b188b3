"""The page of a run: what stands on it is what the run recorded, and nothing of the data is markup."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from deltaclip.base.errors import UserError
from deltaclip.pipeline.report import report
from deltaclip.pipeline.report_parts.page import MAX_POINTS, _options
from deltaclip.pipeline.report_parts.panels import Rows
from deltaclip.pipeline.report_parts.shown_rows import Picture, missing_words, pictures, sample, show_rows
from deltaclip.pipeline.settings import ReportConfig, SweepConfig, newest_run
from deltaclip.pipeline.sweep import sweep
from deltaclip.tests.pipeline.conftest import read_csv, read_json, write_csv

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"q\" 'a' &amp; \N{GRINNING FACE}"
TWO_LABELS = Path(__file__).parent.parent / "data" / "two_labels" / "run"  # made before targets had names
VOID = {"meta", "img", "input", "br", "link"}


class Page(HTMLParser):
    """A page as a browser takes it apart: elements with attributes, text, and what is not closed."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.open, self.text = [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element at {self.getpos()}"

    def handle_data(self, data):
        self.text.append((self.open[-1] if self.open else "", data))

    def find(self, tag, class_=""):
        found = [attributes for name, attributes in self.elements if name == tag]
        return [one for one in found if not class_ or class_ in (one.get("class") or "").split()]

    @property
    def words(self):
        return " ".join(" ".join(data for tag, data in self.text if tag not in ("script", "style")).split())

    @property
    def data(self):
        (found,) = [data for tag, data in self.text if tag == "script" and data.startswith("[")]
        return json.loads(found)


def page_of(run, tmp_path, **settings):
    out = tmp_path / "page.html"
    result = report(ReportConfig(runs=[run] if isinstance(run, Path) else list(run), out=out, **settings))
    assert result.page == out
    page = Page(out)
    assert not page.open
    return page


def figure(value):
    return f"{value:.3f}".replace("-", "\N{MINUS SIGN}")


@pytest.fixture(scope="module")
def demo_page(demo_run, tmp_path_factory):
    return page_of(demo_run, tmp_path_factory.mktemp("page"))


@pytest.fixture
def changed_run(demo_run, tmp_path):
    """Copy the demo run with changed rows or JSON files."""

    def change(rows=None, name="changed", **files):
        run = tmp_path / name
        shutil.copytree(demo_run, run)
        if rows:
            table = read_csv(run / "predictions.csv")
            write_csv(run / "predictions.csv", rows(table) or table)
        for file, edit in files.items():
            found = read_json(run / f"{file}.json")
            edit(found)
            (run / f"{file}.json").write_text(json.dumps(found))
        return run

    return change


def test_figures_are_those_of_the_run(demo_page, demo_run):
    metrics = read_json(demo_run / "metrics.json")
    for label in ("quality", "consistency"):
        test = metrics["test"][label]
        floors = [metrics["floors"][floor][label] for floor in ("no_image", "cosine")]
        for found in (test, *floors):
            assert all(figure(found[name]) in demo_page.words for name in ("srocc", "krocc", "plcc", "rmse", "main"))
        lo, hi = test["srocc_ci"]
        assert f"{figure(lo)} to {figure(hi)}" in demo_page.words
        for source, found in metrics["per_source"][label].items():
            assert source in demo_page.words
            assert figure(found["srocc"]) in demo_page.words
    for one in metrics["verdict"].values():
        assert one["sentence"] in demo_page.words
        assert re.sub(r"\s", "", one["advice"]) in re.sub(r"\s", "", demo_page.words)


def test_the_configuration_is_there(demo_page, demo_run):
    config = read_json(demo_run / "config.json")
    for line in config["description"]:
        topic, words = line[:14].strip(), line[14:].strip()
        assert f"{topic} {words}" in demo_page.words
    assert config["backbone"]["weights_sha256"][:12] in demo_page.words
    assert f"torch {config['versions']['torch']}" in demo_page.words
    assert "LEAKS" not in demo_page.words


def test_points_bars_and_rows_are_the_test_rows(demo_page, demo_run):
    rows = [row for row in read_csv(demo_run / "predictions.csv") if row["split"] == "test"]
    shown = demo_page.data[0]["rows"]
    assert len(shown) == len(rows)
    by_image = {row["image"]: row for row in rows}
    for image, prompt, source, *values, flag in shown:
        row = by_image[image]
        assert (prompt, source, flag) == (row["prompt"], row["source"], row["flag"])
        names = [f"{label}{part}" for label in ("quality", "consistency") for part in ("_label", "", "_base", "_delta")]
        np.testing.assert_allclose(values, [float(row[name]) for name in names], atol=6e-6)  # five decimals
    points = demo_page.find("circle", "point")
    assert sorted(int(point["data-row"]) for point in points) == sorted([*range(len(rows))] * 2)
    counts = [int(bar["data-tip"].split(": ")[1].split()[0].replace(",", "")) for bar in demo_page.find("rect", "bar")]
    assert sum(counts) == 2 * len(rows)


def test_the_gallery_has_the_worst_and_the_best_rows_with_pictures(demo_page, demo_run):
    rows = [row for row in read_csv(demo_run / "predictions.csv") if row["split"] == "test"]
    cards = demo_page.find("li", "card")
    for label in ("quality", "consistency"):
        order = sorted(rows, key=lambda row: abs(float(row[label]) - float(row[f"{label}_label"])))
        for kind, expected in (("best", order[:12]), ("worst", order[-12:])):
            found = [card for card in cards if f"{label}-{kind}" in card["data-kinds"].split()]
            images = {demo_page.data[0]["rows"][int(card["data-at"])][0] for card in found}
            assert images == {row["image"] for row in expected}
    pictures = demo_page.find("img")
    assert len(pictures) == len(cards) + len(demo_page.find("li", "shot"))
    assert all(picture["src"].startswith("data:image/webp;base64,") for picture in pictures)


def test_nothing_comes_from_elsewhere(demo_page):
    assert not demo_page.find("link")
    assert not [one for one in demo_page.find("script") if "src" in one]
    source = re.sub(r"data:image/webp;base64,[\w+/=]+", "", demo_page.source)
    assert not re.search(r"url\(|@import|https?:|fetch|XMLHttp|[\"'(]//", source)
    (policy,) = [one["content"] for one in demo_page.find("meta") if one.get("http-equiv")]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_it_opens_on_the_highest_and_lowest_scored(demo_page, demo_run):
    rows = [row for row in read_csv(demo_run / "predictions.csv") if row["split"] == "test"]
    first, *_ = demo_page.source.split('id="run1-result"')
    shown = re.findall(r'alt="([^":]+): ', first)  # name of the image, then its prompt
    for place, label in enumerate(("quality", "consistency")):
        scores = {row["image"]: float(row[label]) for row in rows}
        order = sorted(scores, key=lambda image: -scores[image])
        for part, expected in ((0, order[:6]), (1, order[::-1][:6])):
            found = shown[12 * place + 6 * part :][:6]
            assert [scores[image] for image in found] == [scores[image] for image in expected]
    flagged = sum(bool(row["flag"]) for row in rows)
    assert f"{flagged or 'None'} of {len(rows)} test rows is unlike" in demo_page.words.replace(
        " are unlike", " is unlike"
    )
    assert f"All {len(rows)} test rows." in demo_page.words


def test_means_per_source_count_each_prompt_once(demo_page, demo_run):
    rows = [row for row in read_csv(demo_run / "predictions.csv") if row["split"] == "test"]
    for name, words in (("quality", "{}"), ("quality_label", "human")):
        for source in {row["source"] for row in rows}:
            prompts = {}
            for row in rows:
                if row["source"] == source:
                    prompts.setdefault(row["prompt"], []).append(float(row[name]))
            mean = np.mean([np.mean(values) for values in prompts.values()])
            assert f"{words.format(source)}: {figure(mean)}" in demo_page.source


def test_beyond_what_a_page_holds_rows_are_drawn_and_said():
    score = np.linspace(0, 1, 300)
    text = {name: [f"{name} {row}" + "w" * 400 for row in range(300)] for name in ("image", "prompt", "source")}
    rows = Rows(
        text=text,
        numbers={"quality": score, **{f"quality_{part}": np.full(300, np.nan) for part in ("label", "base", "delta")}},
        flags=[],
        groups=[""] * 300,
        places=list(range(300)),
    )

    def shown(most):
        blank = lambda images: [Picture(reason="none")] * len(images)  # noqa: E731
        return show_rows(rows, ["quality"], number=0, most=most, what="rows", pictures_of=blank, drawn=range(20, 30))

    found = shown(100)
    assert found.listing.words == "100 of 300 rows: those with pictures above, the others drawn at random."
    assert list(found.at) == sorted(found.at)
    assert {0, 299, *range(20, 30)} <= found.at.keys()
    assert len(found.data["rows"]) == 100
    assert max(found.at.keys() - {*range(294, 300)}) > 200  # from all over, not the first ones
    assert len(found.data["rows"][found.at[20]][1]) == 300
    assert len(found.data["rows"][found.at[0]][1]) > 400  # whole, since its picture stands beside it
    assert shown(300).listing.words == "All 300 rows."
    assert found.unlike_words == ""


def test_where_runs_disagree_most(demo_run, train_demo, tmp_path):
    other = train_demo(residual_learning=False, epochs=2).run
    page = page_of([demo_run, other], tmp_path)
    first, second = ({row["image"]: row for row in read_csv(run / "predictions.csv")} for run in (demo_run, other))
    for label in ("quality", "consistency"):
        apart = {
            image: abs(float(row[label]) - float(second[image][label]))
            for image, row in first.items()
            if row["split"] == "test"
        }
        expected = sorted(apart.values(), reverse=True)[:6]
        strip = page.source.split(f"Where the runs disagree most on {label}")[1].split("</ul>")[0]
        images = re.findall(r'alt="([^":]+): ', strip)
        assert [apart[image] for image in images] == pytest.approx(expected)
        assert f"{other.name} {figure(float(second[images[0]][label]))}" in strip


def test_three_targets_are_shown_each_in_its_colour(colour_run, tmp_path):
    page, targets = page_of(colour_run, tmp_path), ["quality", "consistency", "colour"]
    test = read_json(colour_run / "metrics.json")["test"]
    assert page.data[0]["labels"] == list(test) == targets
    for target in targets:
        assert f"{target.capitalize()}, SROCC" in page.words
        assert figure(test[target]["srocc"]) in page.words
        assert f"{target}: trained heads" in page.words
    assert {part for one in page.find("circle", "point") for part in one["class"].split()} >= {"c0", "c1", "c3"}
    assert len(page.find("circle", "point")) == 3 * len(page.data[0]["rows"])
    kinds = {kind for card in page.find("li", "card") for kind in card["data-kinds"].split()}
    assert kinds == {f"{target}-{kind}" for target in targets for kind in ("worst", "best")}


def test_data_stays_text(changed_run, tmp_path):
    def rows(table):
        for row in table:
            row["prompt"] = HOSTILE + row["prompt"] + "\x00\x1b" * 3 + "w" * 2_000
            row["source"] = HOSTILE + row["source"]
            row["image"] = f"{HOSTILE}/{row['image']}"

    run = changed_run(rows, name='<b>run & "so"</b>', config=lambda found: found["description"].append("x  " + HOSTILE))
    page = page_of(run, tmp_path)
    assert len(page.find("script")) == 2
    assert not [one for one in page.find("img") if not one["src"].startswith("data:")]
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert HOSTILE in page.words
    assert page.data[0]["rows"][0][1].startswith(HOSTILE)
    assert not page.find("b", "run")
    assert "\x00" not in page.source
    assert "\x1b" not in page.source
    assert any(name == "title" or "<b>run &" in data for name, data in page.text)


def test_missing_labels_scores_and_deltas(changed_run, tmp_path):
    def rows(table):
        for number, row in enumerate(table):
            unknown = (
                ("quality_label",)
                if number % 2
                else (f"consistency{part}" for part in ("_label", "", "_base", "_delta"))
            )
            row.update(dict.fromkeys(unknown, ""))

    page = page_of(changed_run(rows), tmp_path)
    count = len(page.data[0]["rows"])
    assert len(page.find("circle", "point")) == count  # every row has one of the two
    assert None in page.data[0]["rows"][0]


@pytest.mark.parametrize("left", [0, 1])
def test_runs_with_hardly_any_test_rows(changed_run, tmp_path, left):
    def rows(table):
        tests = [row for row in table if row["split"] == "test"]
        return [row for row in table if row["split"] != "test"] + tests[:left]

    page = page_of(changed_run(rows), tmp_path)
    assert len(page.data[0]["rows"]) == left
    assert len(page.find("li", "card")) == left


def test_constant_scores(changed_run, tmp_path):
    def rows(table):
        for row in table:
            row.update({f"{label}{part}": "0.5" for label in ("quality", "consistency") for part in ("", "_label")})
            row.update(quality_delta="0", consistency_delta="0")

    page = page_of(changed_run(rows), tmp_path)
    assert "Every correction is zero" in page.words


def test_of_many_rows_a_sample_is_drawn_and_said(changed_run, tmp_path):
    def rows(table):
        tests = [row for row in table if row["split"] == "test"]
        return [dict(row, image=f"{n}.png") for n, row in enumerate(tests * (MAX_POINTS // len(tests) + 2))]

    page = page_of(changed_run(rows), tmp_path, gallery=3)
    assert len(page.find("circle", "point")) == 2 * MAX_POINTS
    total = (MAX_POINTS // 48 + 2) * 48
    assert f"{MAX_POINTS:,} of {total:,} rows, drawn at random" in page.words
    counts = [int(bar["data-tip"].split(": ")[1].split()[0].replace(",", "")) for bar in page.find("rect", "bar")]
    assert sum(counts) == 2 * total  # corrections are counted in full


def test_sample():
    assert sample(3, 3) == [0, 1, 2]
    drawn = sample(1000, 10)
    assert drawn == sorted(set(drawn)) == sample(1000, 10)
    assert len(drawn) == 10


def test_a_leak_is_said(train_demo, tmp_path):
    page = page_of(train_demo(split="random", epochs=1).run, tmp_path)
    assert "LEAKS" in page.words
    assert page.find("p", "leak")


def test_what_was_not_chosen_is_not_said_to_be(demo_page, train_demo, tmp_path):
    chosen = "Epoch and setting were chosen on validation rows"
    assert chosen in demo_page.words
    page = page_of(train_demo(fractions="0.8,0,0.2", epochs=1).run, tmp_path)
    assert chosen not in page.words
    assert "Without validation rows nothing was chosen: the last epoch was kept." in page.words


def test_repeats_are_means_with_their_values(train_demo, tmp_path):
    run = train_demo(repeats=2, epochs=2).run
    metrics = read_json(run / "metrics.json")
    page = page_of(run, tmp_path)
    for label in ("quality", "consistency"):
        found = metrics["test"][label]["srocc"]
        assert f"{figure(found['mean'])} ± {figure(found['sd'])}" in page.words
        assert all(figure(value) in page.words for value in found["values"])
    assert "of the first of 2 repeats, split seed 42" in page.words
    assert len(page.find("circle", "value")) == 2 * 3 * 2  # labels, heads and two floors, repeats


def test_direct_heads_have_no_corrections_but_of_a_refined_score(train_demo, tmp_path):
    page = page_of(train_demo(residual_learning=False, epochs=1).run, tmp_path)
    assert "Direct heads have neither base nor correction." in page.words
    assert not page.find("rect", "bar")
    page = page_of(train_demo(residual_learning=False, refinement=True, epochs=1).run, tmp_path)
    assert {bar["class"].split()[-1] for bar in page.find("rect", "bar")} == {"c1"}  # the colour of consistency


def test_a_run_of_before_targets_had_names_is_shown(tmp_path):
    page = page_of(TWO_LABELS, tmp_path)
    test = read_json(TWO_LABELS / "metrics.json")["test"]
    assert all(figure(test[label]["srocc"]) in page.words for label in ("quality", "consistency"))
    assert "scales quality 0.311, consistency 0.248" in page.words
    (row,) = [row for row in read_csv(TWO_LABELS / "predictions.csv") if row["image"] == page.data[0]["rows"][0][0]]
    shown = dict(zip(page.data[0]["fields"], page.data[0]["rows"][0], strict=True))
    for label, short in (("quality", "q"), ("consistency", "c")):
        names = {
            f"{label}_label": label,
            label: short,
            f"{label}_base": f"{short}_base",
            f"{label}_delta": f"{short}_delta",
        }
        assert {name: shown[name] for name in names} == {
            name: pytest.approx(float(row[old]), abs=6e-6) for name, old in names.items()
        }


def test_a_run_on_one_label(relabelled, train_demo, tmp_path):
    def change(rows):
        for row in rows:
            row["consistency"] = ""

    page = page_of(train_demo(cache=relabelled(change), epochs=1).run, tmp_path)
    assert page.data[0]["labels"] == ["quality"]
    assert "consistency SROCC" not in page.words


def test_the_maps_of_a_sweep(demo_cache, tmp_path):
    config = SweepConfig(cache=demo_cache, out=tmp_path / "run", scale="quality=0.1,0.2", lr="1e-3,3e-3", epochs=1)
    run = sweep(config).run
    (found,) = read_json(run / "config.json")["sweep"]["heatmaps"]
    page = page_of(run, tmp_path)
    assert len(page.find("rect", "cell")) == 4
    assert all(figure(score) in page.words for scores in found["val_score"] for score in scores)
    assert "4 settings, ranked on validation rows" in page.words


def test_several_runs_stand_side_by_side(demo_run, train_demo, tmp_path):
    other = train_demo(residual_learning=False, epochs=2).run
    page = page_of([demo_run, other], tmp_path)
    assert len(page.data) == 2
    for run in (demo_run, other):
        assert run.name in page.words
        assert figure(read_json(run / "metrics.json")["test"]["quality"]["srocc"]) in page.words
    assert "rows that are test in all runs" in page.words
    (first, *_) = [data for tag, data in page.text if tag == "title"]
    assert first == "2 runs side by side"


def test_runs_that_share_no_test_row_still_stand_side_by_side(demo_run, changed_run, tmp_path):
    other = changed_run(lambda table: [row | {"image": f"other/{row['image']}"} for row in table])
    (other / "rows.safetensors").unlink()  # then rows are known by the names of their files alone
    page = page_of([demo_run, other], tmp_path)
    assert "No differences between these runs: " in page.words
    assert "has no test row that is test in" in page.words


def test_pictures_come_from_where_they_lie_now(changed_run, demo_folder, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(demo_folder, moved)
    run = changed_run(config=lambda found: found["cache"]["dataset"].update(image_root=str(tmp_path / "gone")))
    result = report(ReportConfig(runs=[run]))
    assert (result.page, result.pictures) == (run / "report.html", 0)
    assert "no such file" in result.summary()
    assert "--image-root" in result.summary()
    again = report(ReportConfig(runs=[run], image_root=moved))
    assert again.pictures == again.rows > 0
    # A picture that has the name of another now is not what was scored.
    files = sorted((moved / "images").iterdir())
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, contents[1:] + contents[:1], strict=True):
        file.write_bytes(content)
    renamed = report(ReportConfig(runs=[run], image_root=moved))
    assert renamed.pictures == 0
    assert "another picture has that name now" in renamed.summary()


def test_a_cache_without_record_of_its_images(changed_run, tmp_path):
    run = changed_run(config=lambda found: found["cache"]["dataset"].pop("image_root"))
    page = page_of(run, tmp_path)
    assert not page.find("img")
    assert "no record of where its images lie" in page.words


def test_names_that_lead_out_of_the_image_root(changed_run, demo_folder, tmp_path):
    run = changed_run(lambda table: [row | {"image": f"../{row['image']}"} for row in table])
    shutil.copytree(demo_folder / "images", tmp_path / "images")
    root = tmp_path / "root"
    root.mkdir()
    page = page_of(run, tmp_path, image_root=root)
    assert not page.find("img")
    assert "lies outside the image root). Give --allow-outside to show pictures from elsewhere." in page.words
    assert "--image-root" not in page.words
    assert page_of(run, tmp_path, image_root=root, allow_outside=True).find("img")


def test_every_reason_of_a_missing_picture_is_counted_with_its_remedy(demo_folder, tmp_path):
    whole = min((demo_folder / "images").iterdir())
    root = tmp_path / "root"
    root.mkdir()
    shutil.copyfile(whole, root / "there.png")
    (root / "link.png").symlink_to(whole)
    (root / "broken.png").write_text("no picture")
    names = ["there.png", "link.png", str(whole), f"../{whole.name}", "broken.png", "There.png", "gone.png"]
    shutil.copyfile(whole, tmp_path / whole.name)
    words = missing_words(pictures(names, root, allow_outside=False), root)
    assert words.partition("(")[0] == f"6 of 7 pictures could not be shown under {root} "
    assert "2 lies outside the image root; " in words
    assert "2 no such file: there is there.png; " in words
    assert words.endswith("from elsewhere. Give --image-root with the folder of the images.")
    assert "--" not in missing_words(pictures(names[:2] + names[4:5], root, allow_outside=False), root)


def test_names_that_no_file_can_have(tmp_path):
    found = pictures(["a\x00.png", "x" * 5_000, ""], tmp_path, allow_outside=True)
    assert [picture.address for picture in found] == ["", "", ""]
    assert [picture.reason for picture in found] == ["not the name of a file", "File name too long", "Is a directory"]


def test_the_size_of_the_gallery(demo_run, tmp_path):
    for count in (0, 2):
        page = page_of(demo_run, tmp_path, gallery=count)
        kinds = [kind for card in page.find("li", "card") for kind in card["data-kinds"].split()]
        assert len(kinds) == 4 * count


def test_the_same_run_gives_the_same_page(demo_run, tmp_path):
    pages = [page_of(demo_run, tmp_path).source for _ in range(2)]
    assert pages[0] == pages[1]


def test_where_the_page_may_go(demo_run, tmp_path):
    for out, words in (
        (demo_run / "metrics.json", "unknown suffix '.json'; use one of .html, .htm"),
        (tmp_path, "unknown suffix ''; use one of .html, .htm"),
    ):
        with pytest.raises(UserError) as error:
            report(ReportConfig(runs=[demo_run], out=out))
        assert str(error.value) == f"{out}: {words}"


def test_without_a_run_it_is_the_newest(demo_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^runs: holds no run; give RUN, or make one with `deltaclip train`$"):
        newest_run(Path("runs"))
    for name in ("one", "two", ".three.killed.tmp"):
        shutil.copytree(demo_run, tmp_path / "runs" / name)
        (tmp_path / "runs" / name / "metrics.json").touch()
    (tmp_path / "runs" / "unfinished").mkdir()
    assert report(ReportConfig()).page == Path("runs/two/report.html")


def test_what_is_no_run(tmp_path, demo_run):
    with pytest.raises(UserError, match="no such run directory"):
        report(ReportConfig(runs=[tmp_path / "gone"]))
    broken = tmp_path / "broken"
    shutil.copytree(demo_run, broken)
    for header, missing in (("image,prompt", "of labels, such as 'quality_label'"), ("image,quality_label", "'split'")):
        (broken / "predictions.csv").write_text(f"{header}\na,0.5\n")
        with pytest.raises(UserError) as error:
            report(ReportConfig(runs=[broken]))
        assert str(error.value) == f"{broken / 'predictions.csv'}: has no column {missing}; train again"


# A table of scores


@pytest.fixture
def scores_table(demo_run, tmp_path):
    """Write a table as `predict` does, of the first rows of the demo run, with changes; pictures are not there."""

    def write(change=None, name="scores.csv", without=()):
        rows = [
            {key: cell for key, cell in row.items() if key not in ("group", "split") and not key.endswith("_label")}
            for row in read_csv(demo_run / "predictions.csv")[:40]
        ]
        rows = [{key: cell for key, cell in (row | {"error": ""}).items() if key not in without} for row in rows]
        for number, row in enumerate(rows):
            if change:
                change(number, row)
        write_csv(tmp_path / name, rows)
        return tmp_path / name, rows

    return write


def test_a_table_of_scores_is_shown_without_labels(scores_table, demo_folder):
    def change(number, row):
        row["flag"] = "unlike: center" if number < 39 else ""

    table, rows = scores_table(change)
    result = report(ReportConfig(runs=[table], image_root=demo_folder))
    assert result.page == table.with_suffix(".html")
    assert result.pictures == result.rows > 0
    page = Page(result.page)
    assert not page.open
    assert "39 of 40 pairs are unlike those that the run was trained on (39 by center)" in page.words
    assert "All 40 pairs." in page.words
    assert "human" not in page.words
    best = max(rows, key=lambda row: float(row["quality"]))
    assert page.source.index(f'alt="{best["image"]}: ') < page.source.index("Lowest quality")
    sources = {row["source"] for row in rows}
    for source in sources:
        prompts = {}
        for row in rows:
            if row["source"] == source:
                prompts.setdefault(row["prompt"], []).append(float(row["quality"]))
        assert f"{source}: {figure(np.mean([np.mean(values) for values in prompts.values()]))}" in page.source


def test_rows_without_a_score_are_left_out_and_counted(scores_table, tmp_path):
    def change(number, row):
        if number < 3:
            row.update(dict.fromkeys(("quality", "consistency"), ""), error="no such file")

    table, _ = scores_table(change, without=("source", "flag"))
    page = page_of(table, tmp_path)
    assert "3 of 40 rows have no score and are not here; column error says why." in page.words
    assert "All 37 pairs." in page.words
    assert "unlike" not in page.words
    assert "--image-root" in page.words  # its pictures do not lie beside it
    assert "by source" not in page.words


def test_a_table_of_zero_shot_scores(scores_table, demo_folder, tmp_path):
    def change(number, row):
        for name in [name for name in row if name.partition("_")[0] in ("quality", "consistency", "q", "c", "flag")]:
            del row[name]
        row.update(cosine=f"{number / 100}", antonym_quality="0.5", antonym_noise="0.5")

    page = page_of(scores_table(change)[0], tmp_path, image_root=demo_folder)
    assert page.data[0]["labels"] == ["cosine", "antonym_quality"]
    assert "Highest cosine 0.390" in page.words


def test_what_is_no_table_of_scores(scores_table, demo_run, demo_folder, tmp_path):
    table, _ = scores_table()
    broken, _ = scores_table(lambda number, row: row.update(quality="high" if number == 1 else "1"), "broken.csv")
    empty, _ = scores_table(lambda _, row: row.update(quality="", consistency=""), "empty.csv")
    alone = "is a file, and a table of scores is shown alone; give it alone, or runs"
    remedy = "give a run, or what `deltaclip predict RUN DATA --out FILE` wrote"
    for settings, words in (
        ({"runs": [demo_folder / "demo.csv"]}, f"{demo_folder / 'demo.csv'}: is no table of scores; {remedy}"),
        ({"runs": [demo_run, table]}, f"{table}: {alone}"),
        ({"runs": [broken]}, f"{broken}, line 3, column quality: 'high' is no number; predict again"),
        ({"runs": [empty]}, f"{empty}: has no score in any row; its column error says why"),
        (
            {"runs": [table], "gallery": 3},
            "--gallery: would not be used; leave it out: without labels no row is worst or best",
        ),
    ):
        with pytest.raises(UserError) as error:
            report(ReportConfig(**settings, out=tmp_path / "page.html"))
        assert str(error.value) == words


def test_commands_and_options_are_marked_as_code():
    found = _options("the same `deltaclip extract` again with --views stages & <b>")
    assert found == "the same <code>deltaclip extract</code> again with <code>--views</code> stages &amp; &lt;b&gt;"
