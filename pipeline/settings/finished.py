"""Settings of the stages that read finished runs, show them or give them to others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deltaclip.base.errors import UserError, require_extra
from deltaclip.base.options import check_settings, setting
from deltaclip.base.places import check_suffix


def recorded(run: Path) -> dict[str, Any]:
    """Return the `config.json` of a run, without torch; nothing where it cannot be read, which the stage says."""
    try:
        return dict(json.loads((run / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def asks_for_prompts(run: Path) -> bool:
    """Tell whether a run surely scores by prompts, from what it recorded."""
    found = recorded(run)
    try:
        return any(each["sees"] == "pair" and each["name"] in found["labels"] for each in found["targets"])
    except (KeyError, TypeError):
        return False


COVERAGE_HELP = "Share of human scores that the intervals are to hold."
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
    beside: list[Path] | None = setting(
        None,
        help="For a run of several caches: the others, in the order of `train`, where --cache is given.",
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

    run: Path | None = setting(None, help="Run directory made by `deltaclip train`.", argument=True, names="run")
    target: str | None = setting(
        None,
        help="An image, a folder of images, a manifest, demo or ADAPTER:DIR.",
        argument=True,
        names="data",
    )
    zero_shot: str | None = setting(
        None,
        help="Instead of RUN and TARGET, a target to score without any run: cosine and antonym prompts of --backbone.",
        names="data",
    )
    prompt: str | None = setting(None, help="Prompt of the image, or of every image of the folder.")
    prompts: Path | None = setting(
        None,
        help="For a folder: table with the columns image and prompt; default NAME.txt beside each image.",
        names="input",
    )
    sort: str | None = setting(None, help="Column to sort the rows by, highest first, such as quality.")
    top: int | None = setting(None, help="With --sort: only the first so many rows.", ge=1)
    out: Path | None = setting(None, help="Write the scores to this .csv, .jsonl or .parquet file.", names="file")
    coverage: float = setting(0.9, help=COVERAGE_HELP, gt=0, lt=1)
    backbone: str | None = setting(
        None,
        help="Where the run's backbone lies now, if it has moved; checked by fingerprint. With --zero-shot as for "
        "`extract`, default tiny.",
        names="backbone",
    )
    pretrained: str | None = setting(
        None,
        help="Where its checkpoint lies now, if it has moved; with --zero-shot as for `extract`.",
        names="pretrained",
    )
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
        for place, value in (("RUN", self.run), ("TARGET", self.target)):
            if self.zero_shot is None and value is None:
                raise UserError("is missing", place=place, remedy="see `deltaclip predict --help`")
            if self.zero_shot is not None and value is not None:
                remedy = "give either a run, or --zero-shot TARGET alone"
                raise UserError("would not be used with --zero-shot", place=place, remedy=remedy)
        if self.zero_shot is not None and self.coverage != type(self).coverage:
            raise UserError("would not be used with --zero-shot", place="--coverage", remedy="leave it out")
        if self.top is not None and self.sort is None:
            raise UserError("needs --sort", place="--top", remedy="give the column that says which are first")

    @property
    def data(self) -> str:
        """What is to be scored, with or without a run."""
        given = self.target if self.zero_shot is None else self.zero_shot
        assert given is not None, "checked when the settings were made"
        return given

    def check_more(self) -> None:
        """Refuse a target that is not there; one with a colon may be of an adapter, one with signs a pattern."""
        path = Path(self.data)
        is_named = self.data == "demo" or any(sign in self.data for sign in ":{*?[")
        if not (is_named or path.exists() or any(above.is_file() for above in path.parents)):
            remedy = "give an image, a folder, a manifest, demo or ADAPTER:DIR"
            raise UserError("no such file or folder", place=self.data, remedy=remedy)
        inputs = {Path(self.data).resolve(), *([self.prompts.resolve()] if self.prompts else [])}
        if self.out and self.out.resolve() in inputs:
            raise UserError("is an input", place=self.out, remedy="give another --out")


def _check_json(out: Path | None) -> None:
    # So that a cache or a table given as --out by mistake is not replaced.
    if out and out.suffix.lower() != ".json":
        raise UserError(f"unknown suffix {out.suffix!r}", place="--out", remedy="give NAME.json")


RUNS = Path("runs")
PAGES = (".html", ".htm")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Settings of `report`."""

    runs: list[Path] | None = setting(
        None,
        help="One run directory, several side by side, or a table that `predict` wrote; default the newest in runs/.",
        argument=True,
        names="run or table",
    )
    out: Path | None = setting(
        None,
        help="Page to write; default RUN/report.html, of several RUN/../report.html, of a table NAME.html beside it.",
        names="file",
    )
    image_root: Path | None = setting(
        None,
        help="Where the images lie now; default the folder that the cache recorded, of a table its own.",
        names="folder",
    )
    allow_outside: bool = setting(False, help="Permit image paths that leave the image root.")
    gallery: int = setting(
        12, help="Worst and best rows of each label in the gallery, this many of each.", ge=0, le=500
    )

    def __post_init__(self) -> None:
        check_settings(self)
        if self.out:  # so that it never replaces a file of a run
            check_suffix(self.out, PAGES)

    def check_more(self) -> None:
        """Refuse to look for the newest run where there is none."""
        if self.runs is None:
            newest_run(RUNS)


def newest_run(folder: Path) -> Path:
    """Return the run directory that was finished last.

    Raises:
        UserError: there is none.
    """
    there = folder.iterdir() if folder.is_dir() else ()
    # What a killed training left half written has a name that begins with a dot.
    found = [path for path in there if not path.name.startswith(".") and (path / "metrics.json").is_file()]
    if not found:
        raise UserError("holds no run", place=folder, remedy="give RUN, or make one with `deltaclip train`")
    return max(found, key=lambda path: (path / "metrics.json").stat().st_mtime_ns)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings of `demo`."""

    out: Path = setting(Path(), help="Folder to make cache/ and runs/ in; default this one.", names="within")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings of `export`."""

    run: Path = setting(help="Run directory made by `deltaclip train`.", argument=True, names="run")
    out: Path = setting(help="ONNX file to write, NAME.onnx.", names="file")
    part: Literal["heads", "scorer"] = setting(
        "scorer",
        help="scorer: pixels and tokens to scores, in fp32; heads: embeddings to scores.",
    )
    backbone: str | None = setting(
        None, help="Where the run's backbone lies now, if it has moved; checked by fingerprint.", names="backbone"
    )
    pretrained: str | None = setting(None, help="Where its checkpoint lies now, if it has moved.", names="pretrained")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.out.suffix.lower() != ".onnx":
            raise UserError(f"unknown suffix {self.out.suffix!r}", place="--out", remedy="give NAME.onnx")

    def check_more(self) -> None:
        """Refuse to start without the extra."""
        require_extra("onnx", "onnx", "onnxscript", "onnxruntime", place="export")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of `serve`."""

    run: Path = setting(help="Run directory made by `deltaclip train`.", argument=True, names="run")
    host: str = setting("127.0.0.1", help="Address to listen on; another than this machine's own opens it to others.")
    port: int = setting(8000, help="Port to listen on; 0 takes a free one and prints it.", ge=0, le=65535)
    root: Path | None = setting(
        None, help="Folder under which requests may name images by path; none by default.", names="folder"
    )
    batch_size: int = setting(16, help="Images per forward pass; 1 scores each by itself.", ge=1)
    batch_wait_ms: float = setting(4.0, help="How long a first image waits for others, in milliseconds.", ge=0, le=1000)
    queue_size: int = setting(64, help="Images that may wait, and that one request may hold; more are refused.", ge=1)
    max_requests: int = setting(64, help="Requests answered at a time; more are refused.", ge=1)
    max_request_mb: float = setting(20.0, help="Largest request, and largest file under the root, in MB.", gt=0)
    max_megapixels: float = setting(50.0, help="Largest image, in million pixels.", gt=0, le=100)
    max_prompt_chars: int = setting(2000, help="Longest prompt, in characters.", ge=1)
    coverage: float = setting(0.9, help=COVERAGE_HELP, gt=0, lt=1)
    timeout_s: float = setting(30.0, help="Seconds that a request may take to arrive, and its answer to be made.", gt=0)
    backbone: str | None = setting(
        None, help="Where the run's backbone lies now, if it has moved; checked by fingerprint.", names="backbone"
    )
    pretrained: str | None = setting(None, help="Where its checkpoint lies now, if it has moved.", names="pretrained")
    device: str = setting("auto", help="auto, cpu, cuda or cuda:N.", names="device")

    def __post_init__(self) -> None:
        check_settings(self)

    def check_more(self) -> None:
        """Refuse to start without the extra."""
        require_extra("serve", "fastapi", "uvicorn", "python_multipart", place="serve")
