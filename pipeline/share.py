"""STAGE share: a folder that scores elsewhere, and tells no prompt, rating, file name or path of the training.

What goes into it is listed here, name by name: whatever a run records besides stays out of it.
"""

from __future__ import annotations

import getpass
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError
from deltaclip.base.files import keep_result, whole_folder
from deltaclip.pipeline.model.kernel import Kernel
from deltaclip.pipeline.runs.folder import TunedBackbone, open_run, save_heads
from deltaclip.pipeline.runs.trust import FILE as TRUST_FILE
from deltaclip.pipeline.runs.trust import save_trust
from deltaclip.pipeline.words.model_card import EXAMPLE, Held, model_card

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from deltaclip.pipeline.runs.folder import RunFolder
    from deltaclip.pipeline.settings import ShareConfig

VERSION = 1
# What a run records, and is of use to whoever scores.
CONFIG: tuple[str, ...] = ("stage", "mode", "labels", "scales", "best_epoch", "versions")
SETTINGS: tuple[str, ...] = (
    "base",
    "residual_learning",
    "two_branch",
    "refinement",
    "scale_mode",
    "loss",
    "epochs",
    "batch_size",
    "lr",
)
SETTINGS += ("freeze_layers", "freeze_text_layers", "split", "fractions", "seed")
REQUEST = ("model", "weights_sha256", "config_sha256", "tag", "precision", "quick_gelu_asked", "decode")
BACKBONE: tuple[str, ...] = (
    "weights_sha256",
    "config_sha256",
    "quick_gelu",
    "preprocessing",
    "precision",
    "normalised",
    "dim",
)
BACKBONE += ("context_length", "text_tower", "versions")
SPLIT = ("kind", "leaks_groups", "seeds", "rows")
FIGURES = ("test", "val", "train", "floors", "intervals", "unlike", "verdict")
LOCAL_DIR = "local-dir:"


@dataclass(frozen=True, kw_only=True)
class ShareResult:
    """What was written; `held` is what it tells of the training rows."""

    out: Path
    sizes: dict[str, int]
    held: Held
    backbone: str

    def to_json(self) -> dict[str, Any]:
        """Return where it is, its files with their sizes in bytes, and what it tells."""
        about = {"files": self.sizes, "holds": self.held._asdict(), "backbone": self.backbone}
        return {"out": str(self.out), **about}

    def summary(self) -> str:
        """Return the files, what they tell of the training rows, and how to try them."""
        width = max(map(len, self.sizes))
        files = [f"  {name:{width}}  {size / 1e3:10,.1f} kB" for name, size in self.sizes.items()]
        total = sum(self.sizes.values()) / 1e6
        return "\n".join(
            [
                f"{self.out}: {len(files)} files, {total:.1f} MB, for the backbone {self.backbone}",
                *files,
                "no prompts, ratings, file names or paths of the training are written in it; but:",
                *(f"  {line}" for line in self.held.sentences()),
                f"try it: python {self.out / 'example.py'}",
            ]
        )


def share(config: ShareConfig) -> ShareResult:
    """Write what others need to score with a run.

    Raises:
        UserError: a damaged run; one of imported embeddings, which cannot score pictures; one that was shared before.
    """
    run = open_run(config.run)
    run.check_has_rows()
    if run.config["request"].get("imported"):
        remedy = "extract the images with `deltaclip extract` and train on that cache"
        raise UserError("was trained on imported embeddings: it cannot score pictures", place=run.path, remedy=remedy)
    held, about = _held(run), _config(run)
    metrics = _metrics(run.metrics)
    card = model_card(
        config.out.resolve().name, about, metrics, held=held, license_name=config.license, data=config.trained_on
    )
    texts = {
        "config.json": json.dumps(about, indent=2) + "\n",
        "metrics.json": json.dumps(metrics, indent=2) + "\n",
        "README.md": card,
        "example.py": EXAMPLE,
    }
    _check_texts(run, texts, given=f"{config.trained_on} {config.out.resolve().name}")
    out = keep_result(config.out, lambda path: _write(path, run, about, texts))
    sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    return ShareResult(out=out, sizes=sizes, held=held, backbone=about["backbone"]["backbone"])


def _write(out: Path, run: RunFolder, about: Mapping[str, Any], texts: Mapping[str, str]) -> Path:
    with whole_folder(out) as growing:
        folder = growing.work
        header = {name: about[name] for name in ("backbone", "request", "mode", "labels")}
        tuned = TunedBackbone(tensors=run.tuned_tensors(), low_rank=run.low_rank) if run.is_tuned else None
        save_heads(folder / run.checkpoint.name, run.heads, run.spec, header, tuned=tuned)
        if run.trust:
            save_trust(folder / TRUST_FILE, run.trust)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
    return growing.path


def _config(run: RunFolder) -> dict[str, Any]:
    """Return the `config.json` of the folder: what its readers need, without paths or names of data."""
    own = run.config
    ranges = own["cache"]["dataset"].get("label_ranges", {})
    return {
        "shared": {"version": VERSION},
        **_only(CONFIG, own),
        "targets": [{"name": each.name, "sees": each.sees} for each in run.spec.targets],
        "settings": _only(SETTINGS, own["settings"]),
        "request": _only(REQUEST, own["request"]),
        "backbone": _backbone(own["backbone"], own["request"]),
        "beside": [
            {"request": _only(REQUEST, each["request"]), "backbone": _backbone(each["backbone"], each["request"])}
            for each in own.get("beside", [])
        ],
        # `rank` reads the labels of new pictures on the scale of the training.
        "cache": {"dataset": {"label_ranges": {name: ranges[name] for name in run.labels if name in ranges}}},
    }


def _backbone(facts: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fingerprint of a backbone; of a local one the name of its folder or file alone."""
    name, pretrained = str(facts["backbone"]), facts["pretrained"]
    if name.startswith(LOCAL_DIR):
        name = f"{LOCAL_DIR}{Path(name.removeprefix(LOCAL_DIR)).name}"
    if pretrained and request["tag"] is None:
        pretrained = Path(pretrained).name
    return {"backbone": name, "pretrained": pretrained, **_only(BACKBONE, facts)}


def _metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a run: numbers by target, and our own sentences on them; no source is named."""
    figures = {name: _numbers(metrics[name]) for name in FIGURES if name in metrics}
    verdict = {
        label: figures["verdict"][label]
        | {name: own[name] for name in ("outcome", "over", "state", "sentence", "advice", "lacks_views") if name in own}
        for label, own in metrics.get("verdict", {}).items()
    }
    for label, own in metrics.get("verdict", {}).items():
        if own.get("cosine"):
            verdict[label]["cosine"]["outcome"] = own["cosine"]["outcome"]
    told = {"verdict": verdict} if verdict else {}
    return {"split": _only(SPLIT, metrics["split"]), **figures, **told, "per_source": {}, "diagnostics": []}


def _numbers(values: Any) -> Any:
    """Return nested values without texts and without what is told by source."""
    if isinstance(values, dict):
        kept = {name: _numbers(value) for name, value in values.items() if name != "per_source"}
        return {name: value for name, value in kept.items() if not isinstance(value, str)}
    if isinstance(values, list):
        return [_numbers(value) for value in values if not isinstance(value, str)]
    return values


def _only(names: Iterable[str], values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _held(run: RunFolder) -> Held:
    """Count the vectors of single training rows in heads and trust."""
    kernels = [module for module in run.heads.modules() if isinstance(module, Kernel)]
    likeness = run.trust.likeness.parts if run.trust and run.trust.likeness else {}
    return Held(
        kernel_rows=max((len(kernel.points_LP) for kernel in kernels), default=0),
        likeness_rows=max((len(part.landmark_LC) for part in likeness.values()), default=0),
        prompts="prompt" in likeness or any("prompt" in name for name in _kernel_inputs(run)),
        sources=bool(run.trust and any(each.sources is not None for each in run.trust.intervals.values())),
        tuned=run.is_tuned,
    )


def _kernel_inputs(run: RunFolder) -> set[str]:
    bases = run.spec.bases
    if bases is None:
        return set()
    members = [one for found in bases.members.values() for one in found if one.kind == "kernel"]
    return {name for one in members for name in one.inputs}


def _check_texts(run: RunFolder, texts: Mapping[str, str], *, given: str) -> None:
    """Refuse texts that name this machine, its user or a folder of the run: a list can be wrong.

    Raises:
        UserError: which file names what.
    """
    paths = [run.path.resolve(), Path.home(), run.config["cache"].get("path")]
    paths += [run.config["cache"]["dataset"].get("image_root"), *(one["path"] for one in run.config.get("beside", []))]
    words = {str(path) for path in paths if path and len(Path(path).parts) > 1} | {platform.node(), _user()}
    for name, text in texts.items():
        for word in sorted(word for word in words if len(word) > 4 and word not in given):
            if word in text:
                remedy = "rename the backbone or the target that holds it"
                raise UserError(f"{name} would tell {word!r}", place=run.path, remedy=remedy)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, ImportError, KeyError):  # nobody by this number, as in some containers
        return ""
