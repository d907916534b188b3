"""Settings of the stages that read finished runs: `evaluate`, `compare`, `predict`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deltaclip.base.errors import UserError
from deltaclip.base.places import check_suffix
from deltaclip.base.settings import check_settings, setting

TABLES = (".csv", ".jsonl", ".parquet")  # what scores are written as


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Settings of `evaluate`."""

    run: Path = setting(help="Run directory made by `deltaclip train`.", argument=True, names="run")
    cache: Path | None = setting(
        None,
        help="Cache to score; default the run's own, with the run's split. In another one every row is test.",
        names="cache",
    )
    image_root: Path | None = setting(
        None,
        help="For a run of `finetune`: folder of the images; default the one that the cache recorded.",
        names="folder",
    )
    backbone: str | None = setting(
        None,
        help="For a run of `finetune`: where its backbone lies now, if it has moved; checked by fingerprint.",
        names="backbone",
    )
    pretrained: str | None = setting(
        None, help="For a run of `finetune`: where its checkpoint lies now, if it has moved.", names="pretrained"
    )
    out: Path | None = setting(None, help="Also write the metrics to this JSON file.", names="file")

    def __post_init__(self) -> None:
        check_settings(self)
        _check_json(self.out)


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Settings of `compare`."""

    runs: list[Path] = setting(
        help="Two or more run directories; the others are compared with the first.",
        argument=True,
        names="run",
    )
    out: Path | None = setting(None, help="Also write the comparison to this JSON file.", names="file")

    def __post_init__(self) -> None:
        check_settings(self)
        _check_json(self.out)
        if len(self.runs) < 2:
            raise UserError("one run is nothing to compare", place="RUNS", remedy="give two or more")


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Settings of `predict`."""

    run: Path = setting(help="Run directory made by `deltaclip train`.", argument=True, names="run")
    target: str = setting(help="An image, a folder of images, a manifest, demo or ADAPTER:DIR.", argument=True)
    prompt: str | None = setting(None, help="Prompt of the image, or of every image of the folder.")
    prompts: Path | None = setting(
        None,
        help="For a folder: table with the columns image and prompt; default NAME.txt beside each image.",
        names="input",
    )
    out: Path | None = setting(None, help="Write the scores to this .csv, .jsonl or .parquet file.", names="file")
    backbone: str | None = setting(
        None, help="Where the run's backbone lies now, if it has moved; checked by fingerprint.", names="backbone"
    )
    pretrained: str | None = setting(None, help="Where its checkpoint lies now, if it has moved.", names="pretrained")
    device: str = setting("auto", help="auto, cpu, cuda or cuda:N.", names="device")
    batch_size: int = setting(64, help="Images per forward pass.", ge=1)
    image_root: Path | None = setting(
        None, help="For a manifest: folder of the images; default the manifest's.", names="folder"
    )
    allow_outside: bool = setting(False, help="Permit image paths that leave the image root.")
    on_error: Literal["skip", "fail"] = setting("skip", help="What to do about an unreadable image.")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.out:
            check_suffix(self.out, TABLES)

    def check_more(self) -> None:
        """Refuse a target that is not there; one with a colon may be of an adapter."""
        if self.target != "demo" and ":" not in self.target and not Path(self.target).exists():
            remedy = "give an image, a folder, a manifest, demo or ADAPTER:DIR"
            raise UserError("no such file or folder", place=self.target, remedy=remedy)


def _check_json(out: Path | None) -> None:
    # So that a cache or a table given as --out by mistake is not replaced.
    if out and out.suffix.lower() != ".json":
        raise UserError(f"unknown suffix {out.suffix!r}", place="--out", remedy="give NAME.json")
