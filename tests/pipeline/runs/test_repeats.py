"""Metrics of several repeats as one, where a repeat lacks something."""

from __future__ import annotations

import statistics

from deltaclip.pipeline.runs.measure import combine, spread


def metrics(seed, *, test, note="", advice="", leaks=False):
    return {
        "split": {"kind": "grouped", "leaks_groups": leaks, "seeds": [seed], "rows": {"test": 10}, "note": note},
        "test": test,
        "diagnostics": [{"name": "quality.gap", "value": seed / 10, "advice": advice, "verdict": advice[:5]}],
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


def test_an_outcome_stands_where_most_repeats_have_it():
    (often,) = combine([metrics(1, test={}), *(metrics(n, test={}, advice=f"Lower {n}.") for n in (2, 3))])[
        "diagnostics"
    ]
    assert often["advice"] == "Lower 2. (2 of 3 repeats; the figures are those of one)"
    assert often["verdict"] == "Lower"
    assert often["value"]["values"] == [0.1, 0.2, 0.3]
    (differ,) = combine([metrics(1, test={}, advice="Lower."), metrics(2, test={}, advice="Raise.")])["diagnostics"]
    assert differ["advice"] == "The repeats differ (Lower 1, Raise 1): nothing to advise."
    (nothing,) = combine([metrics(1, test={}), metrics(2, test={})])["diagnostics"]
    assert (nothing["advice"], nothing["verdict"]) == ("", "")
