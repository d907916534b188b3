"""deltaclip: quality and prompt-consistency scores for AI-generated images. Spec section 1."""

from __future__ import annotations

__version__ = "0.1.0"
