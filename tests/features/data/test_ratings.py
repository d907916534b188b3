"""Ratings of single people: means and SDs, one scale for all, and how well they agree, against plain references."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from deltaclip.base.errors import UserError
from deltaclip.features.data.adapters import read_manifest
from deltaclip.features.data.ratings import agreement_of


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(rows)
    return str(path)


def simulated(*, items=60, raters=8, share=1.0, noise=0.6, seed=0):
    """Return (item, rater, rating) with true values, biases and spreads of raters; not everybody rates everything."""
    random = np.random.default_rng(seed)
    truth, bias, spread = random.normal(size=items), random.normal(0, 0.7, raters), random.uniform(0.5, 1.5, raters)
    pairs = [(i, r) for i in range(items) for r in range(raters) if random.random() < share]
    ratings = [
        (i, r, float(np.clip(3 + bias[r] + spread[r] * 0.7 * (truth[i] + random.normal(0, noise)), 1, 5)))
        for i, r in pairs
    ]
    return truth, ratings


def table(ratings, *, who=True):
    header = ["image", "prompt", "quality", *(["worker_id"] if who else [])]
    rows = [[f"a{i}.png", f"thing {i // 2}", repr(x), *([f"w{r}"] if who else [])] for i, r, x in ratings]
    return [header, *rows]


@pytest.mark.parametrize("who", [True, False])
def test_means_and_sds(tmp_path, who):
    _, ratings = simulated(share=0.5)
    ratings = [ratings[n] for n in np.random.default_rng(1).permutation(len(ratings))]
    manifest = read_manifest(write(tmp_path / "t.csv", table(ratings, who=who)), label_range="1,5")
    of_item = {}
    for i, _, x in ratings:
        of_item.setdefault(f"a{i}.png", []).append((x - 1) / 4)
    assert manifest.images == list(of_item)
    for row, image in enumerate(manifest.images):
        values = of_item[image]
        assert manifest.labels["quality"][row] == pytest.approx(np.mean(values), abs=1e-12)
        sd = np.std(values, ddof=1) if len(values) > 1 else np.nan
        assert manifest.labels["quality_std"][row] == pytest.approx(sd, abs=1e-12, nan_ok=True)
    whose = " by 8 raters" if who else ""
    counts = [len(values) for values in of_item.values()]
    words = f"{len(ratings):,} ratings of {len(of_item)} images with their prompts{whose}, "
    assert any(note.startswith(f"{words}{min(counts)} to {max(counts)} each: ") for note in manifest.notes)


def test_zscores_against_a_plain_loop(tmp_path):
    _, ratings = simulated(share=0.6, seed=3)
    data = write(tmp_path / "t.csv", table(ratings))
    manifest = read_manifest(data, label_range="1,5", raters="zscore")
    values = {}
    for _, r, x in ratings:
        values.setdefault(r, []).append((x - 1) / 4)
    every = [x for of_one in values.values() for x in of_one]
    of_item = {}
    for i, r, x in ratings:
        z = ((x - 1) / 4 - np.mean(values[r])) / np.std(values[r], ddof=1)
        of_item.setdefault(f"a{i}.png", []).append(np.clip(np.mean(every) + z * np.std(every, ddof=1), 0, 1))
    wanted = [np.mean(of_item[image]) for image in manifest.images]
    np.testing.assert_allclose(manifest.labels["quality"], wanted, atol=1e-12)
    assert "quality: ratings of 8 raters brought to one mean and SD" in manifest.notes


def test_zscores_are_closer_to_the_truth_where_people_rated_different_images(tmp_path):
    truth, ratings = simulated(items=300, raters=20, share=0.15, seed=5)
    data = write(tmp_path / "t.csv", table(ratings))
    found = {}
    for how in ("mean", "zscore"):
        manifest = read_manifest(data, label_range="1,5", raters=how)
        of_item = truth[[int(image[1:-4]) for image in manifest.images]]
        found[how] = np.corrcoef(of_item, manifest.labels["quality"])[0, 1]
    assert found["zscore"] > found["mean"] + 0.05


def test_raters_of_whom_little_is_known_are_left_as_they_are(tmp_path):
    rows = [["image", "prompt", "quality", "rater"]]
    rows += [[f"a{n}.png", "x", n % 5 + 1, "many"] for n in range(10)]
    rows += [[f"a{n}.png", "x", 4, "flat"] for n in range(10)] + [["a0.png", "x", 2, "two"], ["a1.png", "x", 5, "two"]]
    manifest = read_manifest(write(tmp_path / "t.csv", rows), label_range="1,5", raters="zscore")
    words = "2 raters with under 3 ratings, or the same always, are left as they are"
    assert f"quality: {words}" in manifest.notes
    assert manifest.labels["quality"][2] == pytest.approx((0.5 + 0.75) / 2)  # `many` alone sets mean and SD


@pytest.mark.parametrize(("share", "noise"), [(1.0, 0.6), (1.0, 2.0), (0.3, 0.6)])
def test_agreement_is_what_a_second_set_of_raters_would_give(share, noise):
    """Reliability is the correlation of means with those of other people, the ceiling that with the truth.

    2,000 images: the SD of a correlation is below .02; raters are few, so that their own spread adds to it.
    """
    found, second, truths = [], [], []
    for seed in range(6):
        random = np.random.default_rng(seed)
        truth = random.normal(size=2000)

        def means(truth=truth, random=random):
            ratings = truth[:, None] + random.normal(0, 0.7, 12)[None] + random.normal(0, noise, (len(truth), 12))
            there = random.random(ratings.shape) < share
            there[:, :2] |= ~there.any(axis=1, keepdims=True)
            item, rater = np.nonzero(there)
            value = ratings[there]
            return item, rater, value, np.bincount(item, value) / np.bincount(item)

        item, rater, value, first = means()
        found.append(agreement_of(value, item, rater))
        second.append(np.corrcoef(first, means()[3])[0, 1])
        truths.append(np.corrcoef(first, truth)[0, 1])
    assert np.mean([each["reliability"] for each in found]) == pytest.approx(np.mean(second), abs=0.04)
    assert np.mean([each["ceiling"] for each in found]) == pytest.approx(np.mean(truths), abs=0.04)


def test_agreement_of_few_or_of_nothing():
    item, value = np.repeat(np.arange(9), 3), np.random.default_rng(0).random(27)
    assert agreement_of(value, item, None) is None
    item, value = np.repeat(np.arange(40), 2), np.full(80, 0.5)
    assert agreement_of(value, item, None) is None  # all the same
    found = agreement_of(np.random.default_rng(0).random(4000), np.repeat(np.arange(1000), 4), None)
    assert found["reliability"] < 0.15  # nothing in common


def test_rows_that_repeat_one_count_once(tmp_path):
    rows = [["image", "prompt", "quality"], ["a.png", "x", 3], ["b.png", "x", 1], ["a.png", "x", 3]]
    manifest = read_manifest(write(tmp_path / "t.csv", rows), label_range="1,5")
    assert manifest.images == ["a.png", "b.png"]
    assert np.isnan(manifest.labels["quality_std"]).all()
    assert "1 rows repeat an image and prompt with the same labels: each counts once" in manifest.notes


def test_rows_with_sds_are_means_already(tmp_path):
    rows = [["image", "prompt", "quality", "quality_std"], ["a.png", "x", 3, 1], ["a.png", "x", 4, 0.5]]
    manifest = read_manifest(write(tmp_path / "t.csv", rows), label_range="1,5")
    np.testing.assert_allclose(manifest.labels["quality"], [0.5, 0.75])


def test_one_image_with_two_prompts_is_two_rows(tmp_path):
    rows = [["image", "prompt", "quality", "rater"], ["a.png", "x", 3, "w"], ["a.png", "y", 4, "w"]]
    assert len(read_manifest(write(tmp_path / "t.csv", rows), label_range="1,5")) == 2


def test_ratings_of_mturk(tmp_path):
    header = ["HITId", "WorkerId", "Input.image_url", "Input.prompt", "Answer.quality", "Answer.consistency"]
    address = "https://files.example.org/sets/1/{}.png?v=2"
    rows = [
        ["h", f"W{r}", address.format(name), f"thing {name}", q, c]
        for name, scores in {"a": [(3, 4), (5, 4)], "b c": [(1, 2), (2, 2)]}.items()
        for r, (q, c) in enumerate(scores)
    ]
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "b c.png").write_bytes(b"x")
    rows[2][2] = rows[3][2] = address.format("b%20c")
    manifest = read_manifest(write(tmp_path / "batch.csv", [header, *rows]), label_range="1,5")
    assert manifest.images == ["a.png", "b c.png"]
    assert manifest.prompts == ["thing a", "thing b c"]
    np.testing.assert_allclose(manifest.labels["quality"], [0.75, 0.125])
    np.testing.assert_allclose(manifest.labels["consistency"], [0.75, 0.25])
    assert manifest.notes[0] == "4 image paths were understood by the name of the file behind their address"


def task(image, ratings):
    """Return a task of Label Studio with an annotation by each of these people."""
    annotations = [
        {
            "completed_by": {"id": number, "email": f"{who}@example.org"} if number % 2 else number,
            "was_cancelled": who == "nobody",
            "result": [
                {"from_name": "quality", "type": "rating", "value": {"rating": rating}},
                {"from_name": "explanation", "type": "textarea", "value": {"text": [f"by {who}"]}},
            ],
        }
        for number, (who, rating) in enumerate(ratings)
    ]
    return {"id": 1, "data": {"image": image, "prompt": "x"}, "annotations": annotations}


def test_ratings_of_label_studio(tmp_path):
    for name in ("a.png", "sub/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    tasks = [
        task("/data/upload/3/0a1b2c3d-a.png", [("w0", 2), ("w1", 4), ("nobody", 1)]),
        task("/data/local-files/?d=root/sub/b.png", [("w0", 5)]),
    ]
    (tmp_path / "export.json").write_text(json.dumps(tasks, indent=2))
    manifest = read_manifest(str(tmp_path / "export.json"), label_range="1,5")
    assert manifest.images == ["a.png", "sub/b.png"]
    np.testing.assert_allclose(manifest.labels["quality"], [0.5, 1.0])
    assert manifest.explanations == ["by w0", "by w0"]
    assert manifest.notes[1] == "export.json is an export of Label Studio and is read as that"


def test_captions_of_coco(tmp_path):
    found = {
        "info": {"year": 2014},
        "images": [{"id": 7, "file_name": "a.png", "license": 1}, {"id": 8, "file_name": "b.png"}],
        "annotations": [{"id": 1, "image_id": 7, "caption": "one"}, {"id": 2, "image_id": 7, "caption": "two"}],
    }
    (tmp_path / "captions.json").write_text(json.dumps(found))
    manifest = read_manifest(str(tmp_path / "captions.json"))
    assert (manifest.images, manifest.prompts) == (["a.png", "a.png", "b.png"], ["one", "two", ""])


def test_refusals(tmp_path):
    rows = [["image", "prompt", "quality"], ["a.png", "x", 3], ["a.png", "x", 4]]
    with pytest.raises(UserError) as caught:
        read_manifest(write(tmp_path / "t.csv", rows), label_range="1,5", raters="zscore")
    assert str(caught.value) == "--raters: zscore needs to know who rated; add a column rater, or take mean"
    rows = [["image", "prompt", "quality", "rater"]]
    rows += [[f"a{n}.png", "x", n % 5 + 1, "anna"] for n in range(10)]
    rows += [[f"a{n}.png", "x", 15 * (n % 6) + 10, "bert"] for n in range(10)]
    data = write(tmp_path / "t.csv", rows)
    with pytest.raises(UserError) as caught:
        read_manifest(data)
    assert str(caught.value) == (
        f"{data}: 'anna' rated quality up to 5, 'bert' around 40: two scales in one; "
        "bring the column to one scale, or give --label-range quality=LO,HI if all used that"
    )
    assert len(read_manifest(data, label_range="0,100")) == 10
