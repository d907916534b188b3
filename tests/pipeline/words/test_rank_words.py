"""A ranking in words: signs, names that are markup, and what a build server parses."""

from __future__ import annotations

import random
from xml.etree import ElementTree as ET

import pytest

from deltaclip.pipeline.words.rank_words import check_words, rank_junit, rank_markdown, rank_summary

NOTHING = {"value": None, "lo": None, "hi": None, "p_value": None, "units": 1}


def figures(value, half):
    if half is None:
        return NOTHING | {"value": value}
    return {"value": value, "lo": value - half, "hi": value + half, "p_value": 0.01, "units": 40}


def check(name="b", *, verdict="unclear", times=3.7, **more):
    own = {"generator": name, "target": "quality", "drop": 0.03, "lo": -0.01, "hi": 0.07}
    return own | {"judged_by": "scores", "verdict": verdict, "times_more": times} | more


def ranking(names=("a", "b"), *, half=0.1, checks=(), strict=False, prompt="x"):
    first, second = names
    pair = {"first": first, "second": second, "scores": figures(-0.2, half), "people": None, "judged_by": "scores"}
    pair |= {"paired": half is not None, "only_first": 0, "only_second": 3, "p_holm": 0.01, "better": second}
    means = [
        {"generator": name, "rows": 40, "labels": 0, "scores": figures(0.5, 0.1), "people": None, "odd": False}
        for name in names
    ]
    about = {"learned": 0, "failed": 0, "truncated_prompts": 0, "together": [], "notes": [], "unlike_share": None}
    fell = {"target": "quality", "generator": second, "reference": first, "prompt": prompt, "drop": 0.3, "image": "i"}
    return {
        "run": "runs/r",
        "confidence": 0.95,
        "strict": strict,
        "generators": [about | {"name": name} for name in names],
        "targets": {"quality": {"ordered_by": "scores", "means": means, "differences": [pair]}},
        "fell": [fell],
        "notes": [],
        "gate": {"baseline": first, "max_drop": 0.02, "verdict": "unclear", "checks": list(checks)} if checks else None,
    }


@pytest.mark.parametrize(("half", "line"), [(0.1, "  b > a         40  +0.200  +0.100 to +0.300"), (None, "  b > a")])
def test_the_higher_one_stands_first(half, line):
    lines = rank_summary(ranking(half=half)).splitlines()
    (found,) = [each for each in lines if each.startswith("  b > a")]
    assert found.startswith(line)
    assert "+0.200" in found


def test_names_that_are_long_keep_the_width():
    text = rank_summary(ranking(names=("a" * 300, "b\n" * 200), checks=[check("b " * 100)], prompt="red " * 900))
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            check(),
            "b against a in quality: drop +0.030 (-0.010 to +0.070), the data cannot tell whether it is more than "
            "0.02; about 4 times as many prompts would",
        ),
        (
            check(judged_by="people", times=1e9),
            "b against a in quality: drop +0.030 (-0.010 to +0.070, by ratings), the data cannot tell whether it is "
            "more than 0.02",
        ),
        (check(lo=None, hi=None), "b against a in quality: the data cannot tell, there are too few prompts"),
    ],
    ids=["more", "too many more", "one prompt"],
)
def test_what_cannot_be_told_says_what_would(given, words):
    assert check_words(given, {"baseline": "a", "max_drop": 0.02}) == words


def test_names_are_no_markup_in_any_form():
    rng = random.Random(0)
    for _ in range(200):
        name = "".join(rng.choice("a<>&\"'|`*_[]#\\\x00\x07\n\ud800é") for _ in range(8))
        given = ranking(names=("a", name), checks=[check(name), check(name, verdict="dropped")], prompt=name)
        suite = ET.fromstring(rank_junit(given).encode("utf-8")).find("testsuite")  # noqa: S314 - written just now
        counts = [suite.get(each) for each in ("tests", "failures", "skipped")]
        assert counts == ["2", "1", "1"]
        assert [len(suite.findall(f"testcase/{each}")) for each in ("failure", "skipped")] == [1, 1]
        for line in rank_markdown(given).splitlines():
            assert line.replace("\\\\", "").replace("\\|", "").count("|") in (0, 5, 6, 7)
            assert "<" not in line.replace("\\\\", "").replace("\\<", "")
