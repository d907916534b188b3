"""`ablate`: every figure is what the variant gives alone on the same split, and chance is chance."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR

from deltaclip.base.errors import UserError
from deltaclip.pipeline.ablate import ablate
from deltaclip.pipeline.comparing.variant_table import BOOTSTRAP, CORRECTED
from deltaclip.pipeline.comparing.variants import CALIBRATED, NO_CORRECTION, VARIANTS, predict_cosine, predict_ridge
from deltaclip.pipeline.rows.cached_rows import load_rows
from deltaclip.pipeline.rows.split_rows import split_cache
from deltaclip.pipeline.scoring.agreement import srocc
from deltaclip.pipeline.scoring.intervals import paired_difference
from deltaclip.pipeline.settings import AblateConfig, TrainConfig
from deltaclip.pipeline.training.base_choice import image_candidates, pair_candidates
from deltaclip.pipeline.words.result_words import COLUMNS
from deltaclip.tests.pipeline.conftest import EPOCHS, numbers, read_csv, read_json
from deltaclip.tests.reference import corrected_t_interval

LABELS = ("quality", "consistency")
# Those of a further view, which the demo cache has not: test_train_kernel.py.
OF_ALL_CACHES = [one for one in VARIANTS if not one.on_view]
TRAINED = {one.name: dict(one.overrides) for one in OF_ALL_CACHES if one.overrides is not None}
AUTO = {name: {"base": TrainConfig.base} for name in ("auto", "auto-only")}  # `train_demo` has another default
SEEDS = (42, 43, 44)
INPUTS = ("center", "prompt", "cosine")  # of the demo cache


@pytest.fixture(scope="module")
def ablated(tmp_path_factory, demo_cache):
    out = tmp_path_factory.mktemp("ablated") / "table"
    return ablate(AblateConfig(cache=demo_cache, out=out, epochs=EPOCHS, repeats=len(SEEDS)))


@pytest.fixture
def ablate_demo(tmp_path, demo_cache):
    def run(**settings):
        out = tmp_path / f"ablate{len(list(tmp_path.glob('ablate*')))}"
        return ablate(AblateConfig(**{"cache": demo_cache, "out": out, "epochs": 2, "repeats": 2, **settings}))

    return run


@pytest.fixture(scope="module")
def rows(demo_cache):
    return load_rows(demo_cache, "cpu")


def split_of(rows, seed):
    return split_cache(rows, "grouped", fractions="0.7,0.1,0.2", seed=seed)


def matrix(rows, chosen, label):
    """What the head of a label sees, written out."""
    v, t = rows.v_ID[rows.rows.image[chosen]].double().numpy(), rows.t_TD[rows.rows.prompt[chosen]].double().numpy()
    return v if label == "quality" else np.hstack([v, t, (v * t).sum(axis=1, keepdims=True)])


def values(result, name, label, figure="srocc"):
    return result.compared[name][label]["test"][figure]["values"]


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_variant_is_as_train_gives_it_alone(ablated, train_demo, name):
    """Within 1e-3: heads that are stacked differ from those alone by rounding."""
    for place, seed in enumerate(SEEDS[:2]):
        alone = train_demo(seed=seed, **TRAINED[name] | AUTO.get(name, {})).metrics["test"]
        for label in LABELS:
            found = [values(ablated, name, label, figure)[place] for figure in COLUMNS]
            assert found == pytest.approx([alone[label][figure] for figure in COLUMNS], abs=1e-3)


@pytest.mark.parametrize(("name", "floor"), [("no-image", "no_image"), ("cosine", "cosine")])
def test_a_floor_is_that_of_train(ablated, train_demo, name, floor):
    alone = train_demo(epochs=1, repeats=len(SEEDS)).metrics["floors"][floor]
    for label in LABELS:
        for figure in COLUMNS:
            assert values(ablated, name, label, figure) == alone[label][figure]["values"]


@pytest.mark.parametrize("label", LABELS)
def test_ridge_is_scikit_learns_on_the_training_rows(ablated, rows, label):
    for place, seed in enumerate(SEEDS):
        split, truth = split_of(rows, seed), rows.label(label)
        strength = ablated.compared["ridge"][label]["about"][place]["strength"]
        judge = Ridge(alpha=strength).fit(matrix(rows, split.train, label), truth[split.train])
        expected = srocc(judge.predict(matrix(rows, split.test, label)), truth[split.test])
        assert values(ablated, "ridge", label)[place] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("label", LABELS)
def test_svr_is_scikit_learns_on_the_training_rows(ablated, rows, label):
    for place, seed in enumerate(SEEDS):
        split, truth = split_of(rows, seed), rows.label(label).astype(np.float64)
        chosen = ablated.compared["svr"][label]["about"][place]
        known = truth[split.train]
        judge = make_pipeline(StandardScaler(), SVR(C=chosen["C"], epsilon=chosen["epsilon"], tol=1e-3))
        judge.fit(matrix(rows, split.train, label), (known - known.mean()) / known.std())
        expected = srocc(judge.predict(matrix(rows, split.test, label)), truth[split.test])
        # One swap of two neighbours among 48 rows is 1e-4: the solver's own tolerance may swap a few.
        assert values(ablated, "svr", label)[place] == pytest.approx(expected, abs=1e-3)


def test_differences_are_paired_and_judged_over_splits(ablated, rows):
    sizes = [split_of(rows, seed) for seed in SEEDS]
    for label in LABELS:
        ours, other = (np.array(values(ablated, name, label)) for name in ("ridge", "residual"))
        found = ablated.compared["ridge"][label]["difference"]
        assert found["values"] == pytest.approx((ours - other).tolist(), abs=1e-12)
        expected = corrected_t_interval(
            (ours - other).tolist(),
            num_train=np.mean([one.train.size for one in sizes]),
            num_test=np.mean([one.test.size for one in sizes]),
            level=0.95,
        )
        assert found["ci"] == pytest.approx(expected, abs=1e-9)
        # One inference for both columns: p is below .05 exactly where the interval leaves out 0.
        half = (found["ci"][1] - found["ci"][0]) / 2
        t = found["mean"] / half * stats.t.ppf(0.975, len(SEEDS) - 1)
        assert found["p_value"] == pytest.approx(2 * stats.t.sf(abs(t), len(SEEDS) - 1))
        assert ablated.compared["residual"][label]["difference"] is None
    assert ablated.interval == CORRECTED


@pytest.mark.slow
def test_another_reference_turns_the_sign(ablated, ablate_demo):
    turned = ablate_demo(epochs=EPOCHS, repeats=len(SEEDS), against="ridge")
    for label in LABELS:
        ours = ablated.compared["ridge"][label]["difference"]
        theirs = turned.compared["residual"][label]["difference"]
        assert theirs["values"] == pytest.approx([-value for value in ours["values"]], abs=1e-12)
        assert theirs["ci"] == pytest.approx([-bound for bound in reversed(ours["ci"])], abs=1e-12)
        assert theirs["p_value"] == pytest.approx(ours["p_value"])
        assert turned.compared["ridge"][label]["difference"] is None
    assert "- ridge" in turned.summary()


@pytest.mark.slow
def test_shuffled_labels_leave_nothing_to_find(ablate_demo, relabelled):
    def shuffle(rows):
        order = np.random.default_rng(0).permutation(len(rows))
        labels = [(rows[i]["quality"], rows[i]["consistency"]) for i in order]
        for row, (quality, consistency) in zip(rows, labels, strict=True):
            row["quality"], row["consistency"] = quality, consistency

    result = ablate_demo(cache=relabelled(shuffle), epochs=EPOCHS, repeats=5)
    # SROCC of 48 unrelated rows has an SD of 1/sqrt(47) = 0.146. Five test sides share a fifth of their rows, so their
    # mean has sqrt(0.2 + 0.8 * 0.2) * 0.146 = 0.088; twenty figures stay within 4 SD. A leak would reach 0.9.
    for name, found in result.compared.items():
        for label, one in found.items():
            assert one["test"]["srocc"]["mean"] is None or abs(one["test"]["srocc"]["mean"]) < 0.35, (name, label)


def test_nothing_is_chosen_on_test_rows(ablated, ablate_demo, relabelled, rows):
    """Other labels on the test rows of a split change no choice and no prediction, only the figures."""
    test = set(split_of(rows, 42).test.tolist())

    def turn(listed):
        for number, row in enumerate(listed):
            if number in test:
                for label in LABELS:
                    row[label] = str(1 - float(row[label]))

    turned = ablate_demo(cache=relabelled(turn), epochs=EPOCHS, repeats=1)
    for name, found in turned.compared.items():
        for label, one in found.items():
            assert one["about"][0] == ablated.compared[name][label]["about"][0]
            # 1 - y turns every rank around, so that the same predictions have the opposite sign.
            assert one["test"]["srocc"]["values"][0] == pytest.approx(-values(ablated, name, label)[0], abs=1e-9)


def test_the_folder_holds_the_table_for_people_and_machines(ablated):
    assert {path.name for path in ablated.folder.iterdir()} == {"ablate.json", "ablate.csv", "config.json"}
    table = read_json(ablated.folder / "ablate.json")
    assert table == json.loads(json.dumps(ablated.table()))
    assert {**table, "folder": str(ablated.folder), "seconds": ablated.seconds} == ablated.to_json()
    names = list(table["variants"])
    assert names[: len(OF_ALL_CACHES)] == [one.name for one in OF_ALL_CACHES]
    # After these a row for each candidate of the chosen base, some of them of one kind of target alone.
    candidates = (
        {one.name for one in image_candidates(INPUTS)},
        {one.name for one in pair_candidates(INPUTS, has_score=True)},
    )
    assert set(names[len(OF_ALL_CACHES) :]) == candidates[0] | candidates[1]
    rows = read_csv(ablated.folder / "ablate.csv")
    assert [(row["variant"], row["label"]) for row in rows] == [
        (name, label)
        for name in names
        for label, own in zip(LABELS, candidates, strict=True)
        if name in own or name not in candidates[0] | candidates[1]
    ]
    figures = [table["variants"][row["variant"]]["labels"][row["label"]] for row in rows]
    assert numbers(rows, "srocc") == pytest.approx([one["test"]["srocc"]["mean"] for one in figures], rel=1e-5)
    assert numbers(rows, "rmse_sd") == pytest.approx([one["test"]["rmse"]["sd"] for one in figures], rel=1e-5)
    for row, one in zip(rows, figures, strict=True):
        if one["difference"] is None:
            assert (row["difference"], row["p_value"]) == ("", "")
        else:
            shown = [float(row[name]) for name in ("difference", "difference_lo", "difference_hi", "p_value")]
            difference = one["difference"]
            expected = [difference["mean"], *difference["ci"], difference["p_value"]]
            assert shown == pytest.approx(expected, rel=1e-5, abs=1e-9)
    config = read_json(ablated.folder / "config.json")
    assert (config["stage"], config["settings"]["repeats"], config["common"]["epochs"]) == ("ablate", 3, EPOCHS)
    assert config["variants"]["no-correction"] == {**CALIBRATED, **NO_CORRECTION}


def test_the_summary_says_what_each_column_is(ablated):
    lines = ablated.summary().splitlines()
    assert lines[0] == "split: grouped by prompt, 48 test rows (168 train, 24 validation), seeds 42 to 44, mean ± SD"
    (ridge, _) = [line for line in lines if line.startswith("ridge ")]
    found = ablated.compared["ridge"]["quality"]
    figure, (lo, hi) = found["test"]["srocc"], found["difference"]["ci"]
    assert f"{figure['mean']:.3f} ± {figure['sd']:.3f}" in ridge
    assert f"{found['difference']['mean']:+.3f}" in ridge
    assert f"{lo:+.3f} to {hi:+.3f}" in ridge
    assert ridge.endswith(f"{found['difference']['p_value']:.3f}")
    assert f"95 % and p: {CORRECTED}" in lines
    assert all(len(line) <= 120 for line in lines)


@pytest.mark.slow
def test_settings_reach_the_trainings(ablate_demo, train_demo):
    settings = {"epochs": 3, "batch_size": 100, "lr": 4e-3, "fractions": "0.5,0.2,0.3", "seed": 7, "device": "cpu"}
    settings |= {"split": "random"}
    result = ablate_demo(repeats=1, **settings)
    assert result.split["seeds"] == [7]
    assert "LEAKS" in result.summary()
    for name in ("residual", "direct"):
        alone = train_demo(**settings, **TRAINED[name] | AUTO.get(name, {})).metrics["test"]
        for label in LABELS:
            found = values(result, name, label)[0]
            assert found == pytest.approx(alone[label]["srocc"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"scale": "0.5"}, {"scale": "quality=0.5"}, {"residual_scale_q": 0.5}])
def test_without_corrections_means_of_any_target(ablate_demo, ablated, given):
    result = ablate_demo(repeats=1, epochs=EPOCHS, **given)
    for label in LABELS:
        assert values(result, "no-correction", label)[0] == pytest.approx(values(ablated, "no-correction", label)[0])


@pytest.mark.slow
def test_one_split_is_judged_by_its_rows(ablate_demo, *, relabelled, rows):
    alone, split, label = ablate_demo(repeats=1, against="ridge"), split_of(rows, 42), "consistency"
    ours, other = (predict(rows, split, label).score_M for predict in (predict_cosine, predict_ridge))
    groups, truth = rows.rows.text["group"][split.test], rows.label(label)[split.test]
    expected = paired_difference(ours, other, truth, groups=groups, seed=0)
    drawn = alone.compared["cosine"][label]["difference"]
    assert drawn["mean"] == pytest.approx(expected.difference)
    assert [*drawn["ci"], drawn["p_value"]] == pytest.approx([expected.lo, expected.hi, expected.p_value])

    def mark(rows):
        for number, row in enumerate(rows):
            row["split"] = ("train", "val", "test")[number // 6 % 3]

    cache = relabelled(mark)
    for result in (alone, ablate_demo(cache=cache, split="column", against="ridge")):
        assert result.interval == BOOTSTRAP
        found = result.compared["cosine"]["quality"]["difference"]
        assert (found["p_value"] < 0.05) == (found["ci"][0] > 0 or found["ci"][1] < 0)
        assert f"95 % and p: {BOOTSTRAP}" in result.summary().splitlines()
    assert result.compared["ridge"]["quality"]["test"]["srocc"]["sd"] == 0  # the same rows every time


def test_one_label_alone(ablate_demo, relabelled, capsys):
    def drop(rows):
        for row in rows:
            row["consistency"] = ""

    result = ablate_demo(cache=relabelled(drop), epochs=1)
    assert {label for found in result.compared.values() for label in found} == {"quality"}
    assert "\nconsistency" not in result.summary()
    warning = "warning: the cache has no consistency labels: that head is not trained and has no scores\n"
    assert capsys.readouterr().err == warning


def test_a_label_with_too_few_rows_is_left_out_by_name(ablate_demo, relabelled, capsys):
    def thin(rows):
        for row in rows[5:]:
            row["consistency"] = ""

    result = ablate_demo(cache=relabelled(thin), epochs=1)
    assert set(result.compared["residual"]) == {"quality"}
    line = "warning: consistency is left out: too few labelled rows on some side of a split"
    assert line in capsys.readouterr().err.splitlines()


@pytest.mark.slow
def test_rows_that_lack_a_label_are_masked(ablate_demo, relabelled, train_demo):
    def thin(rows):
        for row in rows[::3]:
            row["quality"] = ""

    cache = relabelled(thin)
    result = ablate_demo(cache=cache, repeats=1)
    alone = train_demo(cache=cache, epochs=2).metrics["test"]
    assert values(result, "residual", "quality")[0] == pytest.approx(alone["quality"]["srocc"], abs=1e-3)
    about = result.compared["ridge"]["quality"]["about"][0]
    assert about["rows"] == about["of_rows"] < result.split["rows"]["train"]


def test_a_thinned_baseline_says_so(ablate_demo, monkeypatch):
    monkeypatch.setattr("deltaclip.pipeline.comparing.baselines.MAX_SVR_ROWS", 100)
    lines = ablate_demo(repeats=1, epochs=1).summary().splitlines()
    assert "note: svr (quality) was fitted on 100 of 168 training rows, drawn at random" in lines


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"against": "residul"}, "--against: 'residul' is not a choice; did you mean 'residual'?"),
        (
            {"against": "zzz"},
            "--against: 'zzz' is not a choice; known: no-image, cosine, ridge, svr, direct, direct-two-branch, "
            "residual, identity-base, no-correction, no-dropout, auto, auto-only, ridge-view, kernel, kernel-only, "
            "partial-freeze, full",
        ),
        ({"repeats": 0}, "--repeats: 0 is out of range; give a value at least 1"),
        (
            {"fractions": "0.8,0.2,0"},
            "{cache}: too few labelled rows: a label needs three, not all equal, on each side of every split; "
            "add rows, or give other --fractions",
        ),
    ],
)
def test_wrong_values(ablate_demo, demo_cache, tmp_path, *, settings, line):
    with pytest.raises(UserError) as error:
        ablate_demo(**settings)
    assert str(error.value) == line.format(cache=demo_cache)
    assert not list(tmp_path.iterdir())


def test_labels_that_do_not_vary_cannot_be_compared(ablate_demo, relabelled):
    def flatten(rows):
        for row in rows:
            row["quality"] = row["consistency"] = "0.5"

    cache = relabelled(flatten)
    with pytest.raises(UserError, match="too few labelled rows: a label needs three, not all equal"):
        ablate_demo(cache=cache)


def test_a_folder_that_exists_is_refused_before_anything_is_trained(ablate_demo, tmp_path, monkeypatch):
    monkeypatch.setattr("deltaclip.pipeline.ablate.load_rows", None)
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError) as error:
        ablate_demo(out=tmp_path / "taken")
    assert str(error.value) == f"{tmp_path / 'taken'}: already exists; give another --out or remove it first"


def test_the_default_folder_is_beside_the_runs(demo_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = ablate(AblateConfig(cache=demo_cache, epochs=1, repeats=1))
    assert str(result.folder) == f"runs/{demo_cache.stem}_ablate"
    assert (result.folder / "ablate.csv").is_file()
