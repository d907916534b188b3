"""Curves of a training for TensorBoard: visible while it runs, in the run directory once that is there.

Knows event files and where they lie. Must not know what is trained: it takes epochs as every stage has them (`Epoch`).
"""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from deltaclip.base.errors import require_extra

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


FOLDER = "tensorboard"  # in the run directory


class Epoch(Protocol):
    """One epoch of any training, counted from 1; what is None or NaN is left out of the curves."""

    @property
    def epoch(self) -> int: ...  # noqa: D102
    @property
    def train_loss(self) -> float: ...  # noqa: D102
    @property
    def val_score(self) -> float: ...  # noqa: D102
    @property
    def lr(self) -> float: ...  # noqa: D102
    @property
    def scales(self) -> Mapping[str, float]: ...  # noqa: D102
    @property
    def seconds(self) -> float: ...  # noqa: D102
    @property
    def figures(self) -> Mapping[str, float]: ...  # noqa: D102


CURVES = {
    "train_loss": "loss/train",
    "val_score": "validation/main",
    "lr": "learning rate",
    "seconds": "seconds per epoch",
}


def require_tensorboard() -> None:
    """Refuse to start without the library.

    Raises:
        UserError: it is not installed.
    """
    require_extra("tensorboard", "tensorboard", place="--tensorboard")


@contextlib.contextmanager
def live_events(run: Path) -> Iterator[Path]:
    """Yield a folder for event files beside the run directory to be: `runs/NAME.RANDOM.tensorboard`.

    It is there to be watched while the training goes on (`tensorboard --logdir runs`), and is removed at the end,
    however that comes: a run directory appears whole, and who writes it takes a copy of this folder along.
    """
    run.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{run.name}.", suffix=f".{FOLDER}", dir=run.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class EpochLog:
    """Writes one point per epoch and curve to an event file, flushed at once."""

    def __init__(self, folder: Path) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))

    def __enter__(self) -> EpochLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def __call__(self, row: Epoch) -> None:
        """Add an epoch; figures of the validation rows are curves by their own names."""
        values = {curve: getattr(row, name) for name, curve in CURVES.items()}
        values |= {f"scale/{target}": value for target, value in row.scales.items()}
        values |= {f"validation/{name}": value for name, value in row.figures.items()}
        for curve, value in values.items():
            if value is not None and math.isfinite(value):
                self._writer.add_scalar(curve, value, row.epoch)
        self._writer.flush()
