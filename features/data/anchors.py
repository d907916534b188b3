"""Anchor prompts: words for the ends and the steps of what people look at in a picture, the same for every data set.

How close a picture is to one end of a pair rather than to the other says something of it without any label (antonym
pairs: Wang et al. 2023, CLIP-IQA; levels of quality: Zhou et al. 2024, UniQA). The wording is our own. Whoever changes
a word changes the recipe of the view, and so its identity. Knows words. Must not know models or caches.
"""

from __future__ import annotations

import hashlib

# (the better end, the worse end)
PAIRS = (
    ("a good picture", "a bad picture"),
    ("a sharp, detailed image", "a blurry, soft image"),
    ("a clean, smooth image", "a noisy, grainy image"),
    ("rich, natural colours", "dull, faded colours"),
    ("a well lit scene", "a scene that is too dark"),
    ("a picture with strong contrast", "a flat, hazy picture"),
    ("a realistic photograph", "an obviously artificial image"),
    ("a balanced composition", "a cluttered composition"),
    ("a well formed body and face", "a deformed body and face"),
    ("an image without flaws", "an image full of artifacts"),
    ("a beautiful work of art", "an ugly work of art"),
    ("a scene that makes sense", "a scene that makes no sense"),
)
# One word a pair: a share near 1 says the better end of it.
PAIR_NAMES = (
    "quality",
    "sharpness",
    "cleanness",
    "colour",
    "light",
    "contrast",
    "realism",
    "composition",
    "anatomy",
    "flawlessness",
    "beauty",
    "sense",
)
LEVELS = tuple(f"an image of {level} quality" for level in ("terrible", "poor", "fair", "good", "excellent"))
ANCHOR_TEXTS = (*(text for pair in PAIRS for text in pair), *LEVELS)
ANCHOR_RECIPE = {
    "prompts": len(ANCHOR_TEXTS),
    "texts_sha256": hashlib.sha256("\n".join(ANCHOR_TEXTS).encode()).hexdigest(),
    "vector": "unit length",
}
