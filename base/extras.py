"""Libraries that come with an extra of the installation: say which is missing, and how to get it.

Must not know what they are used for.
"""

from __future__ import annotations

import importlib.util

from deltaclip.base.errors import UserError


def require_extra(extra: str, *modules: str, place: str) -> None:
    """Refuse to start `place`, a command or an option, without the modules of an extra.

    Raises:
        UserError: names the first one that is missing, and the extra.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            remedy = f"install it with: pip install 'deltaclip[{extra}]'"
            raise UserError(f"needs {module}, which is not installed", place=place, remedy=remedy)
