"""One line that names the place, the value and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltaclip.base.errors import UserError, did_you_mean, nearest


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        ({}, "is wrong"),
        ({"place": "--lr"}, "--lr: is wrong"),
        ({"remedy": "correct it"}, "is wrong; correct it"),
        ({"place": Path("a/b.csv"), "remedy": "correct it"}, "a/b.csv: is wrong; correct it"),
    ],
)
def test_line(parts, line):
    error = UserError("is wrong", **parts)
    assert str(error) == line
    assert (error.message, error.place, error.remedy) == ("is wrong", parts.get("place"), parts.get("remedy"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("VIT-b-32", "ViT-B-32"), ("ViTB32", "ViT-B-32"), ("openia", "openai"), ("zzz", None), ("", None)],
)
def test_nearest_ignores_case(name, expected):
    assert nearest(name, ["openai", "ViT-B-32", "RN50"]) == expected


def test_did_you_mean_proposes_or_lists():
    assert did_you_mean("fixd", ["fixed", "learned"]) == "did you mean 'fixed'?"
    assert did_you_mean("zzz", ["fixed", "learned"]) == "known: fixed, learned"
