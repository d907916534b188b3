"""Prompts say what the scene holds, in many ways and in grammar."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from deltaclip.features.scenes.captions import ENDINGS, OPENINGS, RELATION_WORDS, SIZE_WORDS, group_words, write_caption
from deltaclip.features.scenes.draw import NOUNS, OPPOSITE, Group, random_scene, with_group

SCENES = [random_scene([11, i]) for i in range(300)]


@pytest.mark.parametrize(
    ("group", "words"),
    [
        (Group(shape="circle", colour="red", count=3), "three red circles"),
        (Group(shape="circle", colour="orange", count=1), "an orange circle"),
        (Group(shape="square", colour="blue", count=1, size="large"), "a large blue square"),
        (Group(shape="fish", colour="green", count=2, size="small"), "two small green fish"),
        (Group(shape="cross", colour="black", count=4), "four black crosses"),
    ],
)
def test_group_words(group: Group, words: str) -> None:
    assert group_words(group) == words


def test_every_caption_names_all_groups() -> None:
    for i, scene in enumerate(SCENES):
        text = write_caption(scene, i).text
        for group in scene.groups:
            noun = NOUNS[group.shape][group.count > 1]
            size = "|".join(re.escape(w) for w in SIZE_WORDS[group.size])
            number = "(an?|one)" if group.count == 1 else ["", "", "two", "three", "four"][group.count]
            pattern = (
                rf"\b{number} ({size}) ?{group.colour} {noun}\b" if size else rf"\b{number} {group.colour} {noun}\b"
            )
            assert re.search(pattern, text), (text, group)


def test_relation_reads_the_right_way_round() -> None:
    for i, scene in enumerate(s for s in SCENES if len(s.groups) == 2):
        text = write_caption(scene, i).text
        places = [text.index(f"{g.colour} {NOUNS[g.shape][g.count > 1]}") for g in scene.groups]
        relation = scene.relation if places[0] < places[1] else OPPOSITE[scene.relation]
        between = text[min(places) : max(places)]
        assert any(f" {words} " in between for words in RELATION_WORDS[relation])


def test_style_and_background_are_said_exactly_if_flagged() -> None:
    said = 0
    for i, scene in enumerate(SCENES):
        caption = write_caption(scene, i)
        assert (f"on a {scene.background} background" in caption.text) == caption.says_background
        words = [*OPENINGS[scene.style], *ENDINGS[scene.style]]
        assert any(w in caption.text for w in words) == caption.says_style
        said += caption.says_style + caption.says_background
    assert 0.45 < said / (2 * len(SCENES)) < 0.7


def test_no_article_before_the_wrong_letter_and_no_double_blank() -> None:
    for i, scene in enumerate(SCENES):
        text = write_caption(scene, i).text
        assert "  " not in text
        assert text == text.strip()
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text


def test_same_seed_same_words_many_paraphrases() -> None:
    scene = next(s for s in SCENES if len(s.groups) == 2)
    texts = [write_caption(scene, i).text for i in range(100)]
    assert texts == [write_caption(scene, i).text for i in range(100)]
    assert len(set(texts)) > 50


def test_an_edited_scene_changes_only_its_word() -> None:
    for i, scene in enumerate(SCENES[:50]):
        group = scene.groups[0]
        other = "yellow" if group.colour != "yellow" else "pink"
        edited = with_group(scene, 0, replace(group, colour=other))
        before, after = (write_caption(s, i).text for s in (scene, edited))
        noun = NOUNS[group.shape][group.count > 1]
        # "an orange star" becomes "a pink star": the article follows the word.
        expected = before.replace(f"{group.colour} {noun}", f"{other} {noun}")
        assert re.sub(r"\ban\b", "a", expected) == re.sub(r"\ban\b", "a", after)
