"""A run directory: made whole or not at all, and read again.

`config.json`, `history.csv`, `metrics.json`, `predictions.csv`, `rows.safetensors` (what its rows are, by content),
`trust.safetensors` (intervals of scores, and what rows it knows) and `<mode>_best.safetensors`: heads with a JSON
header from which they are built again, and what was tuned of the backbone.
The predictions of further repeats are `predictions_<seed of the split>.csv`, the settings of a sweep `sweep.csv`.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError
from deltaclip.base.files import check_place, keep_result, whole_folder
from deltaclip.base.kinds import refuse_other
from deltaclip.base.places import check_new, check_run, checkpoints
from deltaclip.features.backbone.low_rank import LowRank
from deltaclip.pipeline.model.earlier import scales_of_two_targets, today_name
from deltaclip.pipeline.model.heads import HeadSpec, build_heads
from deltaclip.pipeline.rows.cached_rows import FILE, write_keys
from deltaclip.pipeline.runs.prediction_table import write_table
from deltaclip.pipeline.runs.trust import FILE as TRUST_FILE
from deltaclip.pipeline.runs.trust import load_trust, save_trust

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from deltaclip.pipeline.model.heads import Heads
    from deltaclip.pipeline.rows.cached_rows import RowKeys
    from deltaclip.pipeline.runs.trust import Trust


# ---- A run directory: made whole or not at all, and read again


FULL_MODEL = "open_clip"  # folder of a run with the whole model, where that was wanted
LIBRARIES = ("deltaclip", "torch", "open_clip_torch", "numpy", "scipy", "h5py", "safetensors")


@dataclass(frozen=True, kw_only=True)
class RunContents:
    """All that goes into a run directory; `history` and `predictions` are columns of tables.

    `tables` has the columns of further tables by file name, `folders` what is to be copied, by the name it gets,
    `tuned` what training changed of the backbone, and `keys` what the rows of the predictions are, by content.
    """

    mode: str
    heads: Heads
    spec: HeadSpec
    config: dict[str, Any]
    history: dict[str, Any]
    metrics: dict[str, Any]
    predictions: dict[str, Any]
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    tuned: TunedBackbone | None = None
    keys: RowKeys | None = None
    trust: Trust | None = None


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A finished run: its heads in evaluation mode and what was recorded."""

    path: Path
    checkpoint: Path
    heads: Heads
    spec: HeadSpec
    config: dict[str, Any]
    metrics: dict[str, Any]
    trust: Trust | None = None
    low_rank: LowRank | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that the run was trained on; the scores of other heads mean nothing."""
        return tuple(self.config["labels"])

    @property
    def needs_prompts(self) -> bool:
        """Whether any score of the run sees the prompt: without one it is of images alone."""
        return any(target.sees == "pair" and target.name in self.labels for target in self.spec.targets)

    @property
    def is_tuned(self) -> bool:
        """Whether the run changed its backbone, so that embeddings of a cache are not those that its heads know."""
        return self.config.get("stage") == "finetune"

    @property
    def is_shared(self) -> bool:
        """Whether it is what `deltaclip share` wrote: it scores, and says nothing of the rows of the training."""
        return "shared" in self.config

    def check_has_rows(self) -> None:
        """Refuse a shared folder where the rows of the training are needed.

        Raises:
            UserError: it was shared.
        """
        if self.is_shared:
            remedy = "give the run that it was made from"
            raise UserError("was shared without the rows that it was trained on", place=self.path, remedy=remedy)

    def tuned_tensors(self) -> dict[str, Tensor]:
        """Return what the run changed of its backbone, by the names in its model."""
        return load_tuned(self.checkpoint)

    @property
    def split(self) -> dict[str, Any]:
        """Kind, leak, seeds and counts of the split that the heads were trained on; of repeats, the first."""
        repeats = self.config.get("repeats")
        return dict(repeats[0]["split"] if repeats else self.metrics["split"])

    def predictions(self, seed: int) -> Path:
        """Return the table of the repeat whose split has this seed."""
        seeds = self.metrics["split"]["seeds"]
        return self.path / ("predictions.csv" if seed in seeds[:1] else f"predictions_{seed}.csv")


def free_run_path(out: Path | None, name: str) -> Path:
    """Return where a run may go: `out` if given, else runs/NAME with the next free number.

    Raises:
        UserError: `out` exists already, or nothing can be written there; found out before anything is trained.
    """
    if out is not None:
        check_new(out)
        return out
    check_place(Path("runs") / name)
    path, number = Path("runs") / name, 1
    while path.exists():
        number += 1
        path = Path("runs") / f"{name}-{number}"
    return path


def write_run(out: Path | None, name: str, contents: RunContents) -> Path:
    """Write a run directory, which appears with everything in it or not at all, and return where.

    Another process may take the name while this one trains: then the next free one.

    Raises:
        MachineError: the disk refuses it; says where it is instead.
    """
    return keep_result(out or free_run_path(None, name), lambda path: _write_run(path, contents))


def _write_run(path: Path, contents: RunContents) -> Path:
    with whole_folder(path, may_be_taken=True) as growing:  # it was not when the training began
        folder = growing.work
        about = {
            "backbone": contents.config["backbone"],
            "request": contents.config["request"],
            "mode": contents.mode,
            "labels": contents.config["labels"],
        }
        checkpoint = folder / f"{contents.mode}_best.safetensors"
        save_heads(checkpoint, contents.heads, contents.spec, about, tuned=contents.tuned)
        if contents.tuned and contents.tuned.write_full:
            contents.tuned.write_full(folder / FULL_MODEL, contents.tuned.tensors)
        write_table(folder / "history.csv", contents.history)
        write_table(folder / "predictions.csv", contents.predictions)
        if contents.keys:
            write_keys(folder / FILE, contents.keys)
        if contents.trust:
            save_trust(folder / TRUST_FILE, contents.trust)
        for name, columns in contents.tables.items():
            write_table(folder / name, columns)
        for name, source in contents.folders.items():
            shutil.copytree(source, folder / name)
        for name, values in (("metrics.json", contents.metrics), ("config.json", contents.config)):
            (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return growing.path


def open_run(path: Path) -> RunFolder:
    """Read a run directory.

    Raises:
        UserError: no such directory, or something in it is missing or damaged.
    """
    check_run(path)
    (checkpoint,) = checkpoints(path)
    heads, header = load_heads(checkpoint)
    config = _read_json(path / "config.json", ("labels", "backbone", "request"))
    if "shared" not in config:
        _read_json(path / "config.json", ("stage", "settings", "cache"))
    if isinstance(config.get("scales"), list):
        config["scales"] = scales_of_two_targets(config["scales"])
    return RunFolder(
        path=path,
        checkpoint=checkpoint,
        heads=heads,
        spec=HeadSpec.from_json(header["spec"]),
        config=config,
        metrics=_read_json(path / "metrics.json"),
        trust=load_trust(path / TRUST_FILE),
        low_rank=LowRank(**header["low_rank"]) if header.get("low_rank") else None,
    )


def _read_json(path: Path, needed: Sequence[str] = ()) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if path.is_file():
            refuse_other(path, {"json", "text"}, what="JSON file")
        raise UserError(f"cannot be read ({error})", place=path, remedy="train again") from error
    if not isinstance(found, dict):
        raise UserError("holds no object of JSON", place=path, remedy="train again")
    if lacking := [name for name in needed if name not in found]:
        raise UserError(f"lacks {lacking[0]!r}", place=path, remedy="train again")
    return found


def surroundings() -> dict[str, Any]:
    """Return versions and git state, for `config.json`."""
    return {"versions": library_versions() | {"python": platform.python_version()}, "git": _git_state()}


def library_versions() -> dict[str, str]:
    """Return the versions of what a result depends on, by the name of the package."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def _git_state() -> dict[str, Any] | None:
    """Return commit and dirtiness of the working directory, None outside a repository or without git."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        status = subprocess.run(
            ["git", "status", "--porcelain"], capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


# ---- Heads on disk


HEADER_KEY = "deltaclip"
BACKBONE = "backbone."  # before the names of tensors of the backbone; those of heads stand as they are


@dataclass(frozen=True, kw_only=True)
class TunedBackbone:
    """What a training changed of a backbone: tensors by their names in its model, none of the frozen ones.

    With `low_rank` they are additions to weights, which stand beside these names as A and B.
    `write_full` writes the whole model with these tensors into a folder, where that is wanted.
    """

    tensors: Mapping[str, Tensor]
    low_rank: LowRank | None
    write_full: Callable[[Path, Mapping[str, Tensor]], None] | None = None


def save_heads(
    path: Path, heads: Heads, spec: HeadSpec, about: dict[str, Any], *, tuned: TunedBackbone | None = None
) -> None:
    """Write heads and what was tuned below them; `about` (JSON values) goes into the header beside the spec."""
    from safetensors.torch import save_file

    named = dict(heads.state_dict())
    if tuned is not None:
        named |= {f"{BACKBONE}{name}": tensor for name, tensor in tuned.tensors.items()}
        if tuned.low_rank:
            about = about | {"low_rank": tuned.low_rank.to_json()}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    save_file(state, path, metadata={HEADER_KEY: json.dumps({"spec": spec.to_json(), **about})})


def load_heads(path: Path) -> tuple[Heads, dict[str, Any]]:
    """Build heads from a checkpoint, in evaluation mode.

    Returns:
        the heads on the CPU and the header: `spec` and what was given as `about`.

    Raises:
        UserError: not a checkpoint of ours, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[HEADER_KEY])
            names = [name for name in file.keys() if not name.startswith(BACKBONE)]  # noqa: SIM118 - no dict
            state = {name: file.get_tensor(name) for name in names}
        heads = build_heads(HeadSpec.from_json(header["spec"]))
        heads.load_state_dict({today_name(name): tensor for name, tensor in state.items()})
    except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
        refuse_other(path, {"safetensors"}, what="file of heads")
        detail = str(error).splitlines()[0][:160]
        raise UserError(f"is no checkpoint of deltaclip heads ({detail})", place=path, remedy="train again") from error
    if odd := [name for name, tensor in state.items() if not _is_sound(name, tensor)]:
        raise UserError(f"holds weights that are not finite ({odd[0]})", place=path, remedy="train again")
    return heads.eval(), header


def _is_sound(name: str, tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.isfinite().all():
        return True
    return name.endswith("scale.theta") and not tensor.isnan().any()  # a learned scale of 0, before its sigmoid


def load_tuned(path: Path) -> dict[str, Tensor]:
    """Return the tensors of the backbone that a checkpoint holds, by their names in the model.

    Raises:
        UserError: damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(BACKBONE)]  # noqa: SIM118 - no dict
            return {name.removeprefix(BACKBONE): file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        refuse_other(path, {"safetensors"}, what="file of heads")
        detail = str(error).splitlines()[0][:160]
        raise UserError(f"is no checkpoint of deltaclip heads ({detail})", place=path, remedy="train again") from error
