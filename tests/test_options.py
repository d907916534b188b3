"""The option list is a promise: a snapshot makes every change of it a line in a diff.

After a change that is meant, renew it with `python -m deltaclip.tests.test_options` and look at the diff.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from deltaclip.base.errors import UserError
from deltaclip.base.options import (
    check_settings,
    field_types,
    is_optional,
    option_name,
    setting,
    settings_to_json,
)
from deltaclip.features.settings import CheckConfig, ExtractConfig, ImportConfig, InspectConfig
from deltaclip.pipeline.settings import (
    AblateConfig,
    CompareConfig,
    DemoConfig,
    EvaluateConfig,
    ExportConfig,
    FinetuneConfig,
    PredictConfig,
    PullConfig,
    PushConfig,
    RankConfig,
    ReportConfig,
    ServeConfig,
    ShareConfig,
    SweepConfig,
    TrainConfig,
)

SNAPSHOT = Path(__file__).parent / "data" / "options.json"
STAGES = {"extract": ExtractConfig, "train": TrainConfig, "sweep": SweepConfig, "evaluate": EvaluateConfig}
STAGES |= {"ablate": AblateConfig, "compare": CompareConfig, "predict": PredictConfig, "inspect": InspectConfig}
STAGES |= {"rank": RankConfig}
STAGES |= {"report": ReportConfig, "demo": DemoConfig}
STAGES |= {"import": ImportConfig, "data check": CheckConfig}
STAGES |= {"export": ExportConfig, "serve": ServeConfig}
STAGES |= {"finetune": FinetuneConfig, "share": ShareConfig}
STAGES |= {"push": PushConfig, "pull": PullConfig}
REQUIRED = {"extract": {"data": "demo"}, "train": {"cache": Path("c.h5")}, "sweep": {"cache": Path("c.h5")}}
REQUIRED |= {"ablate": {"cache": Path("c.h5")}, "compare": {"runs": [Path("a"), Path("b")]}}
REQUIRED |= {"data check": {"data": "demo"}}
REQUIRED |= {"evaluate": {"run": Path("r")}, "predict": {"run": Path("r"), "target": "x.png", "sort": "q"}}
REQUIRED |= {"rank": {"run": Path("r"), "data": ["a=x", "b=y"], "baseline": "a"}}
REQUIRED |= {"report": {}, "demo": {}}
REQUIRED |= {"inspect": {"caches": [Path("c.h5"), Path("d.h5")]}}
REQUIRED |= {"finetune": {"cache": Path("c.h5")}}
REQUIRED |= {"import": {"source": Path("e"), "out": Path("c.h5"), "backbone": "ViT-B-32", "precision": "fp16"}}

REQUIRED |= {"export": {"run": Path("r"), "out": Path("m.onnx")}, "serve": {"run": Path("r")}}
REQUIRED |= {"push": {"folder": Path("o"), "repo": "a/b"}, "pull": {"repo": "a/b", "out": Path("o")}}
REQUIRED |= {"share": {"run": Path("r"), "out": Path("o")}}


def option_list() -> dict[str, Any]:
    """Return name, type, default and help of every option of every command, as the library will show them."""
    from typer.main import get_command

    from deltaclip.cli import app

    found: dict[str, Any] = {}
    commands = get_command(app).commands
    for group, inside in [(name, found) for name, found in commands.items() if hasattr(found, "commands")]:
        commands = {name: found for name, found in commands.items() if name != group}
        commands |= {f"{group} {name}": found for name, found in inside.commands.items()}
    for name, command in commands.items():
        hints = field_types(STAGES[name]) | {"as_json": bool, "debug": bool}
        found[name] = {}
        for parameter in command.params:
            if parameter.name == "help":
                continue
            spelling = " / ".join([*parameter.opts, *parameter.secondary_opts])
            found[name][spelling] = {
                "type": re.sub(r"<class '|'>|\b(pathlib|typing)[\w.]*\.", "", str(hints[parameter.name])),
                "default": "required" if parameter.required else str(parameter.default),
                "help": parameter.help,
            }
    return found


def test_the_option_list_is_the_snapshot():
    recorded = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    assert option_list() == recorded, (
        "the options have changed: if that is meant, run `python -m deltaclip.tests.test_options` and look at the diff "
        f"of {SNAPSHOT.name}"
    )


def test_every_command_has_settings_here():
    assert option_list().keys() == STAGES.keys()


@pytest.mark.parametrize("name", STAGES)
def test_every_field_is_an_option_with_words(name):
    spellings = {word for option in option_list()[name] for word in option.split(" / ")}
    for field in dataclasses.fields(STAGES[name]):
        expected = field.name if field.metadata["argument"] else option_name(field.name)
        assert expected in spellings
        assert field.metadata["help"].endswith(".")
    assert {"--json", "--debug"} <= spellings


def test_options_that_people_know_from_elsewhere_are_there():
    names = {word for option in option_list()["train"] for word in option.split(" / ")}
    known = (
        "epochs batch-size lr w-q w-c residual-scale-q residual-scale-c weight-decay warmup-ratio max-grad-norm dropout"
    )
    assert {f"--{name}" for name in known.split()} <= names


@pytest.mark.parametrize("name", STAGES)
def test_settings_are_frozen_and_survive_json(name):
    settings = STAGES[name](**REQUIRED[name])
    dumped = json.loads(json.dumps(settings_to_json(settings)))
    assert dumped.keys() == {field.name for field in dataclasses.fields(settings)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.out = None
    hints = field_types(type(settings))
    again = {
        key: as_paths(value) if value is not None and Path in (hints[key], *get_args(hints[key])) else value
        for key, value in dumped.items()
    }
    assert type(settings)(**again) == settings


def as_paths(value):
    return [Path(part) for part in value] if isinstance(value, list) else Path(value)


def limits():
    for name, stage in STAGES.items():
        for field in dataclasses.fields(stage):
            for limit, step in (("ge", -1), ("gt", 0), ("le", 1), ("lt", 0)):
                if field.metadata[limit] is not None:
                    yield pytest.param(name, field.name, limit, step, id=f"{name}-{field.name}-{limit}")


@pytest.mark.parametrize(("name", "field", "limit", "step"), list(limits()))
def test_every_limit_holds_at_its_edge(name, field, limit, step):
    stage = STAGES[name]
    edge = stage.__dataclass_fields__[field].metadata[limit]
    if limit in ("ge", "le"):
        assert getattr(stage(**REQUIRED[name], **{field: edge}), field) == edge
    with pytest.raises(UserError) as error:
        stage(**REQUIRED[name], **{field: edge + step})
    words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}[limit]
    assert str(error.value) == (f"{option_name(field)}: {edge + step} is out of range; give a value {words} {edge}")


@pytest.mark.parametrize("field", ["lr", "residual_scale_q", "weight_decay", "dropout"])
def test_nan_is_out_of_range(field):
    with pytest.raises(UserError, match=f"{option_name(field)}: nan is out of range"):
        TrainConfig(cache=Path("c.h5"), **{field: float("nan")})


def numbers_and_texts():
    for name, stage in STAGES.items():
        for field, hint in field_types(stage).items():
            kinds = {hint, *get_args(hint)} & {int, float, str, Path}
            if kinds:
                yield name, field, kinds.pop()


@pytest.mark.parametrize(("name", "field", "kind"), list(numbers_and_texts()))
def test_what_makes_no_sense_is_refused_whatever_the_setting(name, field, kind):
    """Neither a bound nor a check of its own is needed for it."""
    stage = STAGES[name]
    options = stage.__dataclass_fields__[field]
    place = field.upper() if options.metadata["argument"] else option_name(field)
    huge = [10**30] if kind is int else [math.nan, math.inf, -math.inf, 1e300, -1e300]
    for value in huge if kind in (int, float) else [" ", "\t\n"]:
        given = kind(value)
        with pytest.raises(UserError) as error:
            stage(**REQUIRED[name] | {field: [given] if "list" in str(field_types(stage)[field]) else given})
        line = str(error.value)
        assert line.startswith(f"{place}: ")
        assert "\n" not in line
        assert kind in (str, Path) or str(given) in line


def choices():
    for name, stage in STAGES.items():
        for field, hint in field_types(stage).items():
            if "Literal" in str(hint):
                yield name, field


@pytest.mark.parametrize(("name", "field"), list(choices()))
def test_an_unknown_choice_is_refused_with_what_there_is(name, field):
    with pytest.raises(UserError) as error:
        STAGES[name](**REQUIRED[name] | {field: "zzzzz"})
    assert str(error.value).startswith(f"{option_name(field)}: 'zzzzz' is not a choice; known: ")


def test_a_near_choice_is_proposed():
    with pytest.raises(UserError) as error:
        TrainConfig(cache=Path("c.h5"), schedule="cosin")
    assert str(error.value) == "--schedule: 'cosin' is not a choice; did you mean 'cosine'?"


def test_none_is_not_checked_and_zero_is_a_value():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Small:
        a: int | None = setting(None, help="A.", ge=1)
        b: float = setting(1.0, help="B.", ge=0, lt=1.5)

        def __post_init__(self) -> None:
            check_settings(self)

    assert Small().a is None
    assert Small(b=0).b == 0
    with pytest.raises(UserError):
        Small(a=0)
    with pytest.raises(UserError):
        Small(b=1.5)
    assert is_optional(int | None)
    assert not is_optional(int)


if __name__ == "__main__":
    SNAPSHOT.parent.mkdir(exist_ok=True)
    SNAPSHOT.write_text(json.dumps(option_list(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
