"""What a person is told on the way: lines, and one progress bar with rate and time left on a terminal.

Knows tqdm. Must not know what is counted. Neither may end the work: the terminal can be gone, or the log's disk full.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import TracebackType


DELAY_S = 0.5  # what is done sooner needs no bar


def say(*lines: str) -> None:
    """Write lines to stderr, at once; where nobody can read them, the work goes on without."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: of a stream that is closed
        if sys.stderr is not None:  # so is it in a program without a console
            sys.stderr.write("".join(f"{line}\n" for line in lines))
            sys.stderr.flush()


class Progress:
    """Counts `total` things on stderr; quiet when stderr is not a terminal, so logs stay readable, or not `shown`."""

    def __init__(self, total: int, what: str, *, unit: str, shown: bool = True) -> None:
        self._bar: Any = None
        if shown and sys.stderr is not None and sys.stderr.isatty():
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
            with contextlib.suppress(OSError):
                self._bar.close()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count on by `count`; `note` stands at the end of the line."""
        if self._bar is None:
            return
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        try:
            self._bar.update(count)
        except OSError:  # the terminal is gone: a window that was closed
            self._bar = None
