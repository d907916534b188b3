"""Which spellings of a prompt are one prompt, and which are not."""

from __future__ import annotations

import unicodedata

import pytest

from deltaclip.features.data.prompts import prompt_group


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("A  Cat", "a cat"),
        (" a\tcat\n", "a cat"),
        ("a\u00a0cat", "a cat"),
        ("STRASSE", "straße"),
        (unicodedata.normalize("NFD", "café"), "café"),
        ("ＣＡＴ", "cat"),
        ("the cat\u2019s hat", "the cat's hat"),
        ("\u201ca cat\u201d", '"a cat"'),
        ("a well\u2010known cat", "a well-known cat"),
        ("cats &amp; dogs", "cats & dogs"),
        ("cats &amp;amp; dogs", "cats & dogs"),
        ("a cat.", "a cat"),
        ("a cat ...", "a cat"),
        ('"A cat!"', "a cat"),
        ("一只猫。", "一只猫"),
        ("a\u200b cat\ufeff", "a cat"),
        ("a \u2764\ufe0f cat", "a \u2764 cat"),
        ("a cat\u3164\u2800", "a cat"),
        ("\u300ca cat\u300d", "a cat"),
        ("\u2039a cat\u203a \u203d", "a cat"),
        ("\u2022 a cat |", "a cat"),
        ("\u00bd of a cat", "1/2 of a cat"),
        ("\u0642\u0637\u0629\u061f", "\u0642\u0637\u0629"),
    ],
)
def test_spellings_of_one_prompt(one, other):
    assert prompt_group(one) == prompt_group(other) != ""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a cat", "acat"),
        ("C++", "C"),
        ("a cat, a dog", "a cat a dog"),
        ("?", "!"),
        ("1 %", "1"),
        ("1 \u2030", "1"),
        ("#cat", "cat"),
    ],
)
def test_other_prompts(one, other):
    assert prompt_group(one) != prompt_group(other)


def test_what_is_all_punctuation_keeps_it_and_nothing_is_nothing():
    assert prompt_group(" ?! ") == "?!"
    assert prompt_group("") == prompt_group("  ") == ""
