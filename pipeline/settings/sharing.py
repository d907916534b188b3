"""Settings of the stages that give a run to others: `export`, `serve`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deltaclip.base.errors import UserError
from deltaclip.base.extras import require_extra
from deltaclip.base.settings import check_settings, setting


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
