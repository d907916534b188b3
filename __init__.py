"""deltaclip: quality and prompt-consistency scores for AI-generated images."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaclip.base.errors import UserError
    from deltaclip.pipeline.api.estimator import DeltaclipRegressor
    from deltaclip.pipeline.api.metric import DeltaclipMetric as DeltaclipMetric
    from deltaclip.pipeline.api.reward import Reward
    from deltaclip.pipeline.api.scorer import Scorer

__version__ = "0.1.0"
# Without DeltaclipMetric, which needs an extra: `from deltaclip import *` takes all that stands here.
__all__ = ["DeltaclipRegressor", "Reward", "Scorer", "UserError", "__version__"]

# Where the public names live. They are imported when first asked for: torch alone takes a second.
_HOMES = {
    "DeltaclipMetric": "deltaclip.pipeline.api.metric",
    "DeltaclipRegressor": "deltaclip.pipeline.api.estimator",
    "Reward": "deltaclip.pipeline.api.reward",
    "Scorer": "deltaclip.pipeline.api.scorer",
    "UserError": "deltaclip.base.errors",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        if "torch" not in sys.modules:  # later it changes nothing
            importlib.import_module("deltaclip.base.device").share_processors()
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
