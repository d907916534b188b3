"""Metrics of several repeats as one, where a repeat lacks something."""

from __future__ import annotations

import statistics

from deltaclip.pipeline.runs.measure import combine, spread
from deltaclip.pipeline.scoring.intervals import difference_over_splits


def metrics(seed, *, test, note="", state="", leaks=False):
    return {
        "split": {"kind": "grouped", "leaks_groups": leaks, "seeds": [seed], "rows": {"test": 10}, "note": note},
        "test": test,
        "diagnostics": [{"name": "quality.gap", "value": seed / 10, "state": state}],
    }


def test_one_repeat_stays_as_it_is():
    one = metrics(1, test={"quality": {"srocc": 0.5}})
    assert combine([one]) is one


def test_a_figure_that_a_repeat_lacks_is_left_out_of_mean_and_sd():
    found = combine(
        [
            metrics(1, test={"quality": {"srocc": 0.5, "srocc_ci": [0.4, 0.6]}}),
            metrics(2, test={}),
            metrics(3, test={"quality": {"srocc": 0.6, "srocc_ci": [None, None]}, "consistency": {"srocc": 0.1}}),
        ]
    )["test"]
    expected = {"mean": 0.55, "sd": statistics.stdev([0.5, 0.6]), "values": [0.5, None, 0.6]}
    assert found["quality"]["srocc"] == expected
    assert [bound["values"] for bound in found["quality"]["srocc_ci"]] == [[0.4, None, None], [0.6, None, None]]
    assert found["consistency"]["srocc"] == {"mean": 0.1, "sd": None, "values": [None, None, 0.1]}
    assert spread([None, None]) == {"mean": None, "sd": None, "values": [None, None]}


def test_words_are_joined_with_their_seeds_and_a_leak_of_one_is_a_leak():
    found = combine([metrics(1, test={}, note="a"), metrics(2, test={}), metrics(3, test={}, note="b", leaks=True)])
    assert found["split"]["note"] == "seed 1: a; seed 3: b"
    assert found["split"]["leaks_groups"] is True
    assert combine([metrics(1, test={}, note="a"), metrics(2, test={}, note="a")])["split"]["note"] == "a"
    found = combine([metrics(seed, test={}, note="b" if seed == 2 else "a") for seed in (1, 2, 3)])
    assert found["split"]["note"] == "seeds 1, 3: a; seed 2: b"


def test_a_state_stands_where_most_repeats_have_it():
    (often,) = combine([metrics(1, test={}), *(metrics(n, test={}, state="hurts") for n in (2, 3))])["diagnostics"]
    assert often["state"] == "hurts"
    assert often["value"]["values"] == [0.1, 0.2, 0.3]
    (differ,) = combine([metrics(1, test={}, state="hurts"), metrics(2, test={}, state="bounded")])["diagnostics"]
    assert differ["state"] == "mixed"
    (nothing,) = combine([metrics(1, test={}), metrics(2, test={})])["diagnostics"]
    assert nothing["state"] == ""


def judged(seed, difference, *, over="no_image", state="works", cosine=None, leaks=False):
    counts = {"quality": {"srocc": 0.5, "n": 20 + seed}}
    return {
        "split": {"kind": "grouped", "leaks_groups": leaks, "seeds": [seed], "rows": {"test": 10}, "note": ""},
        "test": counts,
        "train": {"quality": {"srocc": 0.5, "n": 100 - seed}},
        "diagnostics": [],
        "verdict": {
            "quality": {
                "outcome": "clear",
                "difference": difference,
                "lo": 0.0,
                "hi": 1.0,
                "over": over,
                "has_floor": True,
                "cosine": None if cosine is None else {"difference": cosine},
                "state": state,
                "lacks_views": [],
            }
        },
    }


def test_the_verdict_of_repeats_is_on_their_mean_difference():
    values = [0.11, 0.14, 0.08, 0.12]
    found = combine([judged(seed, value, cosine=-value) for seed, value in enumerate(values)])["verdict"]["quality"]
    expected = difference_over_splits(values, num_test_K=[20, 21, 22, 23], num_train_K=[100, 99, 98, 97])
    assert (found["difference"], found["lo"], found["hi"]) == (expected.mean, expected.lo, expected.hi)
    assert found["outcome"] == "clear"
    assert found["cosine"]["outcome"] == "below"
    assert found["repeats"] == 4
    words = f"+.11 (.0{100 * expected.lo:.0f} to .{100 * expected.hi:.0f} over 4 splits)"
    assert found["sentence"].startswith(f"clear of the no-image floor by {words}; below the zero-shot cosine by -.11 (")


def test_repeats_that_disagree_are_not_told_apart():
    found = combine([judged(seed, value, state="hurts" if seed else "works") for seed, value in enumerate((0.2, -0.2))])
    assert found["verdict"]["quality"]["outcome"] == "unclear"
    assert (found["verdict"]["quality"]["state"], found["verdict"]["quality"]["advice"]) == ("mixed", "")
    leaky = combine([judged(0, 0.1), judged(1, 0.12, leaks=True)])["verdict"]["quality"]["sentence"]
    assert leaky.startswith("LEAKS, so this flatters: ")


def test_a_repeat_with_another_floor_is_left_out():
    found = combine([judged(0, 0.1), judged(1, 0.7, over="chance"), judged(2, 0.12)])["verdict"]["quality"]
    assert (found["repeats"], round(found["difference"], 9)) == (2, 0.11)
