"""A figure as a line of JSON, with what is asked of it; without torch, so that a part that cannot start has one."""

from __future__ import annotations

import json
from typing import Any


def as_line(
    part: str, name: str, value: Any, unit: str = "", *, floor: float | None = None, most: float | None = None
) -> str:
    """Return a figure as a line of JSON; NaN meets nothing."""
    line = {"part": part, "name": name, "value": _rounded(value), "unit": unit}
    if floor is not None:
        line |= {"floor": _rounded(floor), "ratio": _ratio(value, floor), "verdict": _verdict(met=value >= floor)}
    elif most is not None:
        line |= {"most": _rounded(most), "ratio": _ratio(value, most), "verdict": _verdict(met=value <= most)}
    return json.dumps(line)


def _verdict(*, met: Any) -> str:
    return "met" if met else "NOT MET"


def _ratio(value: float, limit: float) -> float | None:
    return _rounded(value / limit) if limit else None


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
