"""Settings check themselves: choices, ranges, and 0 is a value."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Literal

import pytest

from deltaclip.base.errors import UserError
from deltaclip.base.options import check_settings, field_types, is_optional, option_name, setting, settings_to_json


@dataclass(frozen=True, kw_only=True)
class Example:
    data: str = setting(help="What to read.", argument=True)
    residual_scale: float | None = setting(None, help="Scale.", ge=0, lt=1)
    epochs: int = setting(20, help="Epochs.", gt=0, le=100)
    mode: Literal["fixed", "learned"] = setting("fixed", help="Mode.")
    other_mode: Literal["a", "b"] | None = setting(None, help="Another.")
    out: Path | None = setting(None, help="Where.")

    def __post_init__(self) -> None:
        check_settings(self)


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ({"residual_scale": -1e-9}, "--residual-scale: -1e-09 is out of range; give a value at least 0"),
        ({"residual_scale": 1.0}, "--residual-scale: 1.0 is out of range; give a value below 1"),
        ({"residual_scale": math.nan}, "--residual-scale: nan is out of range; give a value at least 0"),
        ({"epochs": 0}, "--epochs: 0 is out of range; give a value above 0"),
        ({"epochs": 101}, "--epochs: 101 is out of range; give a value at most 100"),
        ({"mode": "fixd"}, "--mode: 'fixd' is not a choice; did you mean 'fixed'?"),
        ({"other_mode": "xyz"}, "--other-mode: 'xyz' is not a choice; known: a, b"),
    ],
)
def test_refusals(value, line):
    with pytest.raises(UserError) as caught:
        Example(data="x", **value)
    assert str(caught.value) == line


@pytest.mark.parametrize("value", [{"residual_scale": 0}, {"residual_scale": 0.999}, {"epochs": 1}, {"epochs": 100}])
def test_limits_that_are_allowed(value):
    (name,) = value
    assert getattr(Example(data="x", **value), name) == value[name]


def test_json_options_and_freezing():
    settings = Example(data="x", residual_scale=0, out=Path("a/b"))
    dumped = settings_to_json(settings)
    assert json.loads(json.dumps(dumped)) == dumped
    assert (dumped["residual_scale"], dumped["out"], dumped["other_mode"]) == (0, "a/b", None)
    assert option_name("residual_scale") == "--residual-scale"
    hints = field_types(Example)
    assert [name for name, hint in hints.items() if is_optional(hint)] == ["residual_scale", "other_mode", "out"]
    with pytest.raises(FrozenInstanceError):
        settings.epochs = 3
