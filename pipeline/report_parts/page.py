"""A page from its parts: one HTML file with styles, script, plots, pictures and data in it, and nothing from elsewhere.

Templates escape whatever comes from data, the data for the script cannot end its element, and a content policy in the
page itself forbids every request and every other script.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup, escape

from deltaclip.pipeline.report_parts.scales import number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deltaclip.pipeline.report_parts.section import Section

PARTS = "deltaclip.pipeline.report_parts"
_OPTION = re.compile(r"--[a-z][a-z-]*")
# What no page may hold as it is; the replacement character shows that something was there.
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def render(title: str, sections: Sequence[Section], **about: Any) -> str:
    """Return the page.

    Args:
        title: name of the page.
        sections: one per run.
        about: further values for the template.
    """
    script, style = _part("page.js"), _part("page.css")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_part),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": number, "signed": _signed, "options": _options}
    page = environment.get_template("page.html").render(
        title=title,
        sections=sections,
        policy=policy,
        script=Markup(script),  # noqa: S704 - ours, from this package
        style=Markup(style),  # noqa: S704
        data=_for_script([section.data for section in sections]),
        **about,
    )
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", page)


def _signed(value: float | None) -> str:
    """Return a figure as it is added to another one."""
    if value is None:
        return ""
    return f"{'-' if value < 0 else '+'} {number(abs(value))}".replace("-", "\N{MINUS SIGN}")


def _options(words: str) -> Markup:
    """Return a sentence in which options are marked as code, so that none breaks at its hyphens."""
    return Markup(_OPTION.sub(r"<code>\g<0></code>", str(escape(words))))  # noqa: S704 - escaped just now


def _part(name: str) -> str:
    return (files(PARTS) / name).read_text(encoding="utf-8")


def _for_script(value: Any) -> Markup:
    """Return JSON that stays inside its script element: no `<` in it can begin a tag."""
    words = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(words.replace("<", "\\u003c"))  # noqa: S704 - JSON in ASCII without `<`
