"""Settings of `rank`: which generators, and how large a drop a build may bring."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deltaclip.base.errors import UserError, did_you_mean
from deltaclip.base.options import check_settings, setting
from deltaclip.base.places import check_suffix
from deltaclip.pipeline.settings.finished import PAGES, recorded

REMEDY = "give NAME=DATA of each generator, or one DATA whose column source names them"


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """Settings of `rank`."""

    run: Path = setting(help="Run directory made by `deltaclip train`.", argument=True, names="run")
    data: list[str] = setting(
        help="NAME=DATA of each generator (folder, manifest, demo or ADAPTER:DIR), or one DATA whose column source "
        "names them.",
        argument=True,
        names="data",
    )
    baseline: str | None = setting(
        None, help="Generator that the others are measured against, such as the build of before."
    )
    max_drop: float | None = setting(
        None,
        help="Largest drop of a mean below the baseline, of 0 to 1, that a generator may bring; exit code 3 where one "
        "is surely larger.",
        ge=0,
        lt=1,
    )
    strict: bool = setting(False, help="Exit code 3 also where the data cannot tell whether a drop is larger.")
    only: list[str] | None = setting(None, help="Target to rank by, once or several times; default all of the run.")
    confidence: float = setting(0.95, help="Share of the intervals of means and differences.", ge=0.5, lt=1)
    labels: bool = setting(True, help="Use human scores in DATA for intervals of the human mean.")
    label_range: list[str] | None = setting(
        None, help="Scale of the human scores: LO,HI for all, LABEL=LO,HI for one; default the run's."
    )
    markdown: Path | None = setting(None, help="Also write the result as Markdown to this .md file.", names="file")
    junit: Path | None = setting(None, help="Also write the gate as JUnit XML to this .xml file, for CI.", names="file")
    page: Path | None = setting(
        None, help="Also write a page with the pictures that fell most to this .html file.", names="file"
    )
    fell: int = setting(12, help="Rows that fell most below the baseline, this many of each target.", ge=0, le=500)
    prompts: Path | None = setting(
        None,
        help="For folders: table with the columns image and prompt; default NAME.txt beside each image.",
        names="input",
    )
    image_root: Path | None = setting(
        None, help="For manifests: folder of the images; default the manifest's.", names="folder"
    )
    allow_outside: bool = setting(False, help="Permit image paths that leave the image root.")
    on_error: Literal["skip", "fail"] = setting("skip", help="What to do about an unreadable image.")
    backbone: str | None = setting(
        None, help="Where the run's backbone lies now, if it has moved; checked by fingerprint.", names="backbone"
    )
    pretrained: str | None = setting(None, help="Where its checkpoint lies now, if it has moved.", names="pretrained")
    device: str = setting("auto", help="auto, cpu, cuda or cuda:N.", names="device")
    batch_size: int = setting(64, help="Images per forward pass.", ge=1)

    def __post_init__(self) -> None:
        check_settings(self)
        for path, suffixes in ((self.markdown, (".md",)), (self.junit, (".xml",)), (self.page, PAGES)):
            if path:
                check_suffix(path, suffixes)
        self._check_names()
        self._check_gate()

    @property
    def named(self) -> list[tuple[str, str]]:
        """The generators as (name, DATA); '' is the name of one DATA whose column names its generators."""
        return [_parsed(each) for each in self.data]

    def _check_names(self) -> None:
        names = [name for name, _ in self.named]
        if len(names) > 1 and "" in names:
            raise UserError("has no name", place=self.data[names.index("")], remedy="give NAME=DATA of each generator")
        if len(names) == 1 and names[0]:
            raise UserError("one generator is nothing to rank", place=self.data[0], remedy=REMEDY)
        if again := next((name for place, name in enumerate(names) if name in names[:place]), None):
            raise UserError(f"{again!r} is the name of two", place="DATA", remedy="give each generator its own name")
        if self.baseline and names[0] and self.baseline not in names:
            raise no_such_generator(self.baseline, names)

    def _check_gate(self) -> None:
        if self.max_drop is not None and self.baseline is None:
            raise UserError("has nothing to drop below", place="--max-drop", remedy="give --baseline NAME too")
        for option, given in (("--strict", self.strict), ("--junit", self.junit)):
            if given and self.max_drop is None:
                raise UserError("needs a drop that is allowed", place=option, remedy="give --baseline and --max-drop")

    def check_more(self) -> None:
        """Refuse data that are not there, targets that the run has not learned, and outputs that are inputs."""
        for _, data in self.named:
            path = Path(data)
            is_named = data == "demo" or any(sign in data for sign in ":{*?[")
            if not (is_named or path.exists() or any(above.is_file() for above in path.parents)):
                remedy = "give a folder, a manifest, demo or ADAPTER:DIR"
                raise UserError("no such file or folder", place=data, remedy=remedy)
        self._refuse_unused()
        learned = [str(name) for name in recorded(self.run).get("labels", ())]
        for target in self.only or ():
            if learned and target not in learned:
                message = f"{target!r} is no target of {self.run}"
                raise UserError(message, place="--only", remedy=did_you_mean(target, learned))
        inputs = {Path(data).resolve() for _, data in self.named} | {(self.prompts or self.run).resolve()}
        for out in (self.markdown, self.junit, self.page):
            if out and out.resolve() in inputs:
                raise UserError("is an input", place=out, remedy="give another file to write")

    def _refuse_unused(self) -> None:
        """Refuse options that would change nothing for these data, rather than ignore them."""
        folders = [Path(data).is_dir() for _, data in self.named]
        unused = [
            ("--prompts", self.prompts is not None and not any(folders), "no DATA is a folder"),
            ("--image-root", self.image_root is not None and all(folders), "every DATA is a folder"),
            ("--label-range", self.label_range is not None and not self.labels, "--no-labels reads no scores"),
        ]
        for option, is_unused, why in unused:
            if is_unused:
                raise UserError("would not be used", place=option, remedy=f"leave it out: {why}")


def no_such_generator(baseline: str, names: list[str]) -> UserError:
    """Return what is said of a baseline that is no generator."""
    return UserError(
        f"{baseline!r} is none of the generators", place="--baseline", remedy=did_you_mean(baseline, names)
    )


def _parsed(text: str) -> tuple[str, str]:
    name, sign, data = text.partition("=")
    # A path may hold the sign too: then what is before it has a separator, or it is there as a whole.
    if not sign or any(letter in name for letter in "/\\:") or Path(text).exists():
        return "", text
    if not name.strip() or not data.strip():
        raise UserError(f"{text!r} is no NAME=DATA", place="DATA", remedy=REMEDY)
    return name.strip(), data.strip()
