"""One progress bar: rate and time left on a terminal, nothing elsewhere.

Knows tqdm. Must not know what is counted.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType


DELAY_S = 0.5  # what is done sooner needs no bar


class Progress:
    """Counts `total` things on stderr; quiet when stderr is not a terminal, so logs stay readable, or not `shown`."""

    def __init__(self, total: int, what: str, *, unit: str, shown: bool = True) -> None:
        self._bar: Any = None
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            # A terminal that does not know its width says 0, and tqdm would then print nothing.
            width = (
                {"dynamic_ncols": True}
                if os.get_terminal_size(sys.stderr.fileno()).columns
                else {"ncols": 80, "nrows": 20}
            )
            # leave=None: a bar inside another one goes when it is full.
            self._bar = tqdm(total=total, desc=what, unit=f" {unit}", smoothing=0.1, leave=None, delay=DELAY_S, **width)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count on by `count`; `note` stands at the end of the line."""
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
