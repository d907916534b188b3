"""The sentences of the verdict: one coherent outcome a target, at most one thing to do, with a flag that exists."""

from __future__ import annotations

import itertools
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
    rest = {"over": "no_image", "has_floor": True, "cosine": None, "state": "works", "last_is_best": False}
    return {"outcome": outcome, **margin, **rest, "tuned": False, **about}


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
            verdict(state="base alone"),
            "clear of the no-image floor by +.11 (.08 to .14); no correction was kept, the base alone was better on "
            "validation rows",
        ),
    ],
)
def test_sentences(given, sentence):
    assert with_sentence(given, "quality", SPLIT)["sentence"] == sentence
    assert with_sentence(given, "quality", {"leaks_groups": True})["sentence"] == f"LEAKS, so this flatters: {sentence}"


@pytest.mark.parametrize(("tuned", "last_is_best"), list(itertools.product([False, True], repeat=2)))
def test_advice_is_one_thing_of_options_that_exist_and_never_its_opposite(tuned, last_is_best):
    asked = {}
    for state in get_args(State):
        found = with_sentence(verdict(state=state, tuned=tuned, last_is_best=last_is_best), "sharpness", SPLIT)
        flags = re.findall(r"--[a-z-]+", found["advice"])
        assert len(flags) == bool(found["advice"])
        for flag in flags:
            assert all(flag in OPTIONS[command] for command in (("finetune",) if tuned else ("train", "sweep")))
            asked.setdefault(flag, set()).add("larger" in found["advice"] or "more" in found["advice"])
    # One head's own scale may go either way; what all heads share goes one way.
    assert all(len(ways) == 1 for flag, ways in asked.items() if flag != "--scale")


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
