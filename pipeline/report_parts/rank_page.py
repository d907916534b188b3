"""The page of a ranking: the decision, means and differences, and the pictures that fell most beside the reference's.

One HTML file without scripts or requests. Apart from the page of runs, which knows run directories and has a script.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from deltaclip.pipeline.report_parts.page import PARTS
from deltaclip.pipeline.report_parts.shown_rows import pictures
from deltaclip.pipeline.words.rank_words import CONTROLS, check_words, rank_summary

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deltaclip.pipeline.comparing.generators import ScoredGenerator
    from deltaclip.pipeline.report_parts.shown_rows import Picture


def rank_page(
    ranking: Mapping[str, Any], scored: Sequence[ScoredGenerator], *, allow_outside: bool, made_by: str
) -> str:
    """Return the page.

    Args:
        ranking: as `rank_generators` makes it, with what the stage adds.
        scored: the generators, in which the pictures lie.
        allow_outside: permit image names that lead out of their folders.
        made_by: last line.
    """
    gate = ranking["gate"]
    own = _thumbnails(ranking["fell"], scored, ("generator", "image"), allow_outside=allow_outside)
    other = _thumbnails(ranking["fell"], scored, ("reference", "reference_image"), allow_outside=allow_outside)
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_text),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("rank_page.html").render(
        style=Markup(_text("page.css")),  # noqa: S704 - ours, from this package
        ranking=ranking,
        words=rank_summary({**ranking, "fell": [], "gate": None}),
        checks=[(check["verdict"], check_words(check, gate)) for check in gate["checks"]] if gate else [],
        cards=list(zip(ranking["fell"], own, other, strict=True)),
        made_by=made_by,
    )
    return CONTROLS.sub("\N{REPLACEMENT CHARACTER}", page)


def _text(name: str) -> str:
    return (files(PARTS) / name).read_text(encoding="utf-8")


def _thumbnails(
    fell: Sequence[Mapping[str, Any]],
    scored: Sequence[ScoredGenerator],
    keys: tuple[str, str],
    *,
    allow_outside: bool,
) -> list[Picture]:
    """Return the thumbnail of a generator's picture in each row, by the names of the two columns that tell which."""
    whose, image = keys
    root_of = {each.generator.name: each.generator.rows.image_root for each in scored}
    return [
        picture for row in fell for picture in pictures([row[image]], root_of[row[whose]], allow_outside=allow_outside)
    ]
