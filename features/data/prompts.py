"""What a prompt must be, wherever it comes from, and which prompts are one: what its spelling does not change.

Must not know tables, tokenizers or splits.
"""

from __future__ import annotations

import html
import unicodedata

# What stands around a sentence and means nothing there. Signs that may be words (+ # % & $ = /) are not among them.
OUTER = " .,;:!?\"'`()[]{}<>*_~-\u00a1\u00ab\u00bb\u00bf\u2010\u2011\u2012\u2013\u2014\u2015\u3001\u3002"
# Marks that people, phones and word processors write in the place of one of the keyboard.
STRAIGHT = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u00b4", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u2033", '"')
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-")
)


def prompt_group(prompt: str) -> str:
    """Return the group of a prompt: what is only spelled in another way is the same prompt, or near copies would leak.

    Alike are: case; spaces, their kind and number; Unicode forms (composed or not, full width, ligatures), characters
    that nobody sees; quotes and dashes, straight or typographic; HTML entities, also escaped twice; punctuation around
    the whole. A text tower may tell some of these apart, so embeddings are of the prompt as it is.
    """
    text = html.unescape(html.unescape(prompt)) if "&" in prompt else prompt
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).translate(STRAIGHT)
        text = "".join(sign for sign in text if unicodedata.category(sign) != "Cf")
    # Folding case may take a composed character apart.
    text = unicodedata.normalize("NFKC", " ".join(text.split()).casefold())
    return text.strip(OUTER) or text


def prompt_fault(text: str) -> str | None:
    """Return why a text cannot be a prompt, words to stand behind its name; None where it can."""
    if not text.strip():
        return "is empty"
    halves = [character for character in text if "\ud800" <= character <= "\udfff"]
    if halves:
        return f"holds half a character (U+{ord(halves[0]):04X}), which is no text"
    return None
