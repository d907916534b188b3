"""What a prompt must be, wherever it comes from: a command, a request, a call.

Must not know tables or tokenizers.
"""

from __future__ import annotations


def prompt_fault(text: str) -> str | None:
    """Return why a text cannot be a prompt, words to stand behind its name; None where it can."""
    if not text.strip():
        return "is empty"
    halves = [character for character in text if "\ud800" <= character <= "\udfff"]
    if halves:
        return f"holds half a character (U+{ord(halves[0]):04X}), which is no text"
    return None
