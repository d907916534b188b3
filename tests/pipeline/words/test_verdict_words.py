"""The sentences of the verdict: one coherent outcome a target, at most one thing to do, with a flag that exists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from deltaclip.pipeline.scoring.diagnostics import State
from deltaclip.pipeline.words.result_words import verdict_lines, with_sentence

OPTIONS = json.loads((Path(__file__).parents[2] / "data" / "options.json").read_text(encoding="utf-8"))
SPLIT = {"leaks_groups": False}


def verdict(outcome="clear", numbers=(0.114, 0.083, 0.141), **about):
    margin = dict(zip(("difference", "lo", "hi"), numbers, strict=True))
    rest = {"over": "no_image", "has_floor": True, "cosine": None, "state": "works", "lacks_views": []}
    return {"outcome": outcome, **margin, **rest, **about}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (verdict(), "clear of the no-image floor by +.11 (.08 to .14)"),
        (verdict("below", (-0.05, -0.09, -0.01)), "below the no-image floor by -.05 (-.09 to -.01)"),
        (verdict("unclear", (0.02, -0.031, 0.07)), "cannot be told from the no-image floor: +.02 (-.03 to .07)"),
        (verdict("unclear", (-0.001, -0.021, 0.02)), "cannot be told from the no-image floor: .00 (-.02 to .02)"),
        (verdict("clear", (0.0041, 0.001, 0.0079)), "clear of the no-image floor by +.004 (.001 to .008)"),
        (verdict("clear", (1.5, 1.25, 1.75)), "clear of the no-image floor by +1.50 (1.25 to 1.75)"),
        (verdict(repeats=5), "clear of the no-image floor by +.11 (.08 to .14 over 5 splits)"),
        (verdict("unjudged", (None, None, None)), "too few test rows or groups to compare with the no-image floor"),
        (
            verdict(over="chance", has_floor=False),
            "clear of chance by +.11 (.08 to .14); there is no no-image floor, no row here was trained on",
        ),
        (
            verdict("unclear", (0.02, -0.03, 0.07), over="chance"),
            "cannot be told from chance: +.02 (-.03 to .07); there is no no-image floor, no source and no prompt tells "
            "rows apart",
        ),
        (
            verdict(cosine={"outcome": "below", "difference": -0.06, "lo": -0.1, "hi": -0.02}),
            "clear of the no-image floor by +.11 (.08 to .14); below the zero-shot cosine by -.06 (-.10 to -.02)",
        ),
        (
            verdict(cosine={"outcome": "unclear", "difference": 0.0, "lo": 0.0, "hi": 0.0}),
            "clear of the no-image floor by +.11 (.08 to .14); ranks as the zero-shot cosine does",
        ),
        (
            verdict(state="base alone"),
            "clear of the no-image floor by +.11 (.08 to .14); no correction was kept: on validation rows the base "
            "alone was as good",
        ),
    ],
)
def test_sentences(given, sentence):
    assert with_sentence(given, "quality", SPLIT)["sentence"] == sentence
    assert with_sentence(given, "quality", {"leaks_groups": True})["sentence"] == f"LEAKS, so this flatters: {sentence}"


@pytest.mark.parametrize("lacks_views", [[], ["statistics"], ["statistics", "stages"]])
@pytest.mark.parametrize("state", get_args(State))
def test_advice_is_at_most_one_thing_of_options_that_exist(state, lacks_views):
    advice = with_sentence(verdict(state=state, lacks_views=lacks_views), "sharpness", SPLIT)["advice"]
    assert bool(advice) is (state == "bounded" or bool(lacks_views))
    for flag in (flags := re.findall(r"--[a-z-]+", advice)):
        commands = ("extract",) if lacks_views else ("train", "sweep", "finetune")
        assert all(flag in OPTIONS[command] for command in commands)
    assert len(flags) == bool(advice)
    assert ("stages" in advice) is ("stages" in lacks_views)


def test_the_verdict_is_lines_of_a_target_with_what_to_do_below():
    metrics = {
        "verdict": {
            "quality": with_sentence(verdict(), "quality", SPLIT),
            "consistency": with_sentence(verdict(state="bounded"), "consistency", SPLIT),
        }
    }
    lines = verdict_lines(metrics)
    assert lines[:3] == [
        "",
        "verdict: difference of SROCC on test rows, 95 % interval",
        "quality      clear of the no-image floor by +.11 (.08 to .14)",
    ]
    assert lines[4].startswith("             to do: ")
    assert verdict_lines({"test": {}}) == []  # of an earlier release
