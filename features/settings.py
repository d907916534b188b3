"""Settings of the stages in `features/`; no stage of its own.

Apart from the stages so that the command line can show help without importing numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deltaclip.base.device import Precision, PrecisionChoice
from deltaclip.base.options import check_settings, setting
from deltaclip.features.data.decoding import Decode

TARGET_HELP = (
    "NAME=COLUMN:image, or :pair where raters saw the prompt too: a rating beside quality, consistency and "
    "authenticity, and its column; may be given several times."
)


class _OfData:
    """Settings of a stage that reads `data`."""

    data: str

    def check_more(self) -> None:
        """Refuse data that is not there, where settings come from a command line: before a stage is imported."""
        from deltaclip.features.data.paths import check_plain_data  # help texts need none of it

        check_plain_data(self.data)


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(_OfData):
    """Settings of `extract`."""

    data: str = setting(
        help="demo, ADAPTER:DIR (agiqa-3k:DIR), a table (CSV, JSONL, Parquet, Excel, ...), or a folder.",
        argument=True,
        names="data",
    )
    out: Path | None = setting(None, help="Cache file to write; default cache/DATA_BACKBONE.h5.", names="file")
    backbone: str = setting(
        "tiny", help="tiny, an open_clip model name, local-dir:PATH, hf-hub:ORG/NAME or timm:NAME.", names="backbone"
    )
    pretrained: str | None = setting(
        None, help="For a model name: a tag of open_clip or a checkpoint file.", names="pretrained"
    )
    quick_gelu: bool | None = setting(None, help="Force or refuse QuickGELU; default what model and weights say.")
    views: str | None = setting(
        None,
        help="Views of every image, comma-separated: center (always), flip, tiles, stages, statistics, anchors; "
        "default center,stages,statistics,anchors, without what the backbone or --decode draft cannot give.",
    )
    device: str = setting(
        "auto", help="auto, cpu, cuda, cuda:N, several as cuda:0,cuda:1, or cuda:all.", names="device"
    )
    precision: PrecisionChoice = setting(
        "auto", help="Number format of the model; auto measures whether 16 bits keep the embeddings."
    )
    decode: Decode = setting(
        "exact",
        help="exact: open_clip's pixels; fast: within 2 of 255 levels; draft: JPEG at reduced size; gpu: JPEG decoded "
        "and resized on a CUDA GPU (extra gpu).",
    )
    batch_size: int | None = setting(None, help="Images per forward pass; default measured, 64 for small sets.", ge=1)
    workers: int | None = setting(
        None, help="Decoding threads; default one per processor, for a GPU as many as it needs.", ge=1
    )
    image_root: Path | None = setting(None, help="Folder of the images; default the manifest's.", names="folder")
    allow_outside: bool = setting(False, help="Permit image paths that leave the image root.")
    target: list[str] | None = setting(None, help=TARGET_HELP)
    label_range: list[str] | None = setting(
        None, help="LO,HI of all labels, or quality=LO,HI of one, repeatable; default the adapter's, else detected."
    )
    raters: Literal["mean", "zscore"] = setting(
        "mean", help="Of several ratings of an image and prompt: their mean, or that of z-scores of each rater."
    )
    pairs: str | None = setting(
        None,
        help="Beside DATA a table of pairs that people chose between: image_a, image_b, prompt, preferred.",
        names="data",
    )
    pairs_target: str | None = setting(
        None,
        help="What pairs speak for, as quality or NAME:image or NAME:pair; default quality without prompts, else "
        "preference.",
    )
    on_error: Literal["skip", "fail"] = setting("skip", help="What to do about an unreadable image.")
    shard: str | None = setting(
        None,
        help="I/N: only part I, from 1, of N, into a file of its own; auto: as torchrun or srun number the process.",
    )
    ray: str | None = setting(
        None, help="Extract in shards on Ray: local, auto or the address of a cluster (extra distributed)."
    )
    ray_workers: int = setting(2, help="With --ray: processes with a model each, one for every GPU.", ge=1)
    ray_shards: int | None = setting(
        None, help="With --ray: number of shards; default that of those that are there, else 4 for each worker.", ge=1
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Settings of `import`."""

    source: Path = setting(
        help="Folder of clip-retrieval or of `inspect --export`, .npy of images, or .safetensors with both.",
        argument=True,
    )
    out: Path = setting(help="Cache file to write; must not exist.", names="new")
    backbone: str = setting(help="Which model made the embeddings, as open_clip calls it; recorded, not loaded.")
    pretrained: str | None = setting(None, help="Which weights of that model made them; recorded.")
    precision: Precision = setting(help="Number format in which they were computed; float16 is stored but for fp32.")
    texts: Path | None = setting(None, help="For an .npy of images: the .npy of the texts, row by row.", names="input")
    manifest: Path | None = setting(
        None, help="Table whose rows are those of the embeddings; default the source's.", names="input"
    )
    image_root: Path | None = setting(
        None, help="Folder of the images: files are hashed, so that copies are known.", names="folder"
    )
    target: list[str] | None = setting(None, help=TARGET_HELP)
    label_range: list[str] | None = setting(
        None, help="LO,HI of all labels, or quality=LO,HI of one, repeatable; default detected."
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Settings of `inspect`."""

    caches: list[Path] = setting(help="Caches, or what an interrupted run left (.part).", argument=True, names="cache")
    merge: Path | None = setting(
        None, help="Write the caches as one to this file, and say what is in that.", names="new"
    )
    export: Path | None = setting(
        None, help="Write the usable rows of the cache to this folder, for other programs.", names="new"
    )
    export_format: Literal["clip-retrieval", "npy", "safetensors"] = setting(
        "clip-retrieval", help="Layout of what --export writes."
    )
    export_view: str = setting("center", help="View of the images that --export writes.")
    verify: bool = setting(False, help="Read everything and list what is damaged; exit code 2 where something is.")

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, kw_only=True)
class CheckConfig(_OfData):
    """Settings of `data check`."""

    data: str = setting(
        help="What extract would be given: demo, ADAPTER:DIR, a table or a folder.", argument=True, names="data"
    )
    images: Literal["header", "full", "none"] = setting(
        "header", help="How to look at images: header reads their first bytes, full decodes all, none leaves them."
    )
    image_root: Path | None = setting(None, help="Folder of the images; default the manifest's.", names="folder")
    allow_outside: bool = setting(False, help="Permit image paths that leave the image root.")
    target: list[str] | None = setting(None, help=TARGET_HELP)
    label_range: list[str] | None = setting(
        None, help="LO,HI of all labels, or quality=LO,HI of one, repeatable; default the adapter's, else detected."
    )

    def __post_init__(self) -> None:
        check_settings(self)
