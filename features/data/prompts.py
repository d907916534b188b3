"""What a prompt must be, wherever it comes from, and which prompts are one: what its spelling does not change.

Must not know tables, tokenizers or splits.
"""

from __future__ import annotations

import html
import unicodedata

# What stands around a sentence and means nothing there. Signs that may be words (+ # % & $ = / @) are not among them;
# other punctuation of any script is.
OUTER = " .,;:!?\"'`()[]{}<>|*_~-\\\u2022\u00b7"
WORDS = "#%&/@\u2030"
# Marks that people, phones and word processors write in the place of one of the keyboard.
STRAIGHT = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u00b4`\u02bc", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u2033", '"')
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\u301c", "-")
    | {"\u2044": "/"}
)
# Characters that nobody sees beside those of the category of formats: fillers, joiners, blanks, and what chooses
# between two pictures of one sign, as phones put behind a heart.
UNSEEN = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0") | {
    chr(sign)
    for first, last in ((0x180B, 0x180F), (0xFE00, 0xFE0F), (0xE0100, 0xE01EF))
    for sign in range(first, last + 1)
}


def prompt_group(prompt: str) -> str:
    """Return the group of a prompt: what is only spelled in another way is the same prompt, or near copies would leak.

    Alike are: case; spaces, their kind and number; Unicode forms (composed or not, full width, ligatures), characters
    that nobody sees; quotes and dashes, straight or typographic; HTML entities, also escaped twice; punctuation around
    the whole. A text tower may tell some of these apart, so embeddings are of the prompt as it is.
    """
    text = html.unescape(html.unescape(prompt)) if "&" in prompt else prompt
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).translate(STRAIGHT)
        text = "".join(sign for sign in text if unicodedata.category(sign) != "Cf" and sign not in UNSEEN)
    # Folding case may take a composed character apart.
    text = unicodedata.normalize("NFKC", " ".join(text.split()).casefold())
    first, last = 0, len(text)
    while first < last and _is_outer(text[first]):
        first += 1
    while last > first and _is_outer(text[last - 1]):
        last -= 1
    return text[first:last] or text


def _is_outer(sign: str) -> bool:
    return sign in OUTER or (sign not in WORDS and unicodedata.category(sign).startswith("P"))


def prompt_fault(text: str) -> str | None:
    """Return why a text cannot be a prompt, words to stand behind its name; None where it can."""
    if not text.strip():
        return "is empty"
    halves = [character for character in text if "\ud800" <= character <= "\udfff"]
    if halves:
        return f"holds half a character (U+{ord(halves[0]):04X}), which is no text"
    return None
