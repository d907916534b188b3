"""The processes that train together under torchrun; one alone has nothing to exchange.

Each process embeds its rows of a batch and sees the embeddings of all, so that losses that compare rows, dropout and
choices are those of one process with the whole batch. Knows torch.distributed. Must not know heads or towers.
"""

from __future__ import annotations

import datetime as dt
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from deltaclip.base.errors import UserError
from deltaclip.pipeline.loop.optimizer import laid_out_like

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn


# One process fills the boundary cache while the others wait for it, which may take hours.
_PATIENCE = dt.timedelta(days=2)
# Processes that stop at the same mistake come to it at about the same time.
_COMMON, _STOPPED = dt.timedelta(seconds=5), "deltaclip/stopped"


@dataclass(frozen=True)
class Processes:
    """`rank` of `size` processes."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Return which of `count` things are this process's, as equal as can be."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def joined(self, parts: Tensor) -> Tensor:
        """Return the sum over processes: a whole, where each has its own part and zeros elsewhere."""
        if self.size > 1:
            dist.all_reduce(parts)
        return parts

    def gathered(
        self, mine_M: NDArray[np.floating], mine: slice, num_rows: int, device: torch.device
    ) -> NDArray[np.floating]:
        """Return the values of all processes, (N,), of which each has those of its own rows."""
        if self.size == 1:
            return mine_M
        whole_N = torch.zeros(num_rows, dtype=torch.float32, device=device)
        whole_N[mine] = torch.from_numpy(mine_M).to(device)
        return self.joined(whole_N).cpu().numpy()

    def whole(self, mine_BD: Tensor, mine: slice, num_rows: int) -> Tensor:
        """Return the rows of all processes; gradients reach those of this one."""
        if self.size == 1:
            return mine_BD
        padded = mine_BD.new_zeros((num_rows, mine_BD.shape[1]))
        padded[mine] = mine_BD.detach()
        all_BD = self.joined(padded)
        return torch.cat([all_BD[: mine.start], mine_BD, all_BD[mine.stop :]])

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum gradients over processes; one that a process has no gradient for counts as zero there."""
        if self.size > 1:
            _all_reduce(parameters, divide_by=1)

    def mean_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average gradients that are the same in every process but for rounding, so that they stay the same."""
        if self.size > 1:
            _all_reduce(parameters, divide_by=self.size)


def _all_reduce(parameters: Sequence[nn.Parameter], *, divide_by: int) -> None:
    # One message for all, not one for each of hundreds of tensors; behind the gradients, which of them there are.
    if not parameters:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    present = torch.tensor([float(p.grad is not None) for p in parameters], device=grads[0].device)
    flat = torch.cat([*(grad.reshape(-1) for grad in grads), present])
    dist.all_reduce(flat)
    *parts, counts = flat.split([*(grad.numel() for grad in grads), len(parameters)])
    for parameter, part, count in zip(parameters, parts, counts.tolist(), strict=True):
        # One that nobody has stays None, or it would decay: alone it does not.
        parameter.grad = laid_out_like(parameter, part).div_(divide_by) if count else None


class OneVoice:
    """Around all that processes do together: what stops all of them alike is told by the first alone.

    An error inside the block is marked `is_silent` in the others, unless the first goes on without it: then it is
    their own (memory of their GPU, a disk of their machine) and nobody else tells of it.
    """

    def __init__(self) -> None:
        self._store: Any = None
        self._rank = int(os.environ.get("RANK", "0")) if _num_processes() > 1 else 0

    def __enter__(self) -> OneVoice:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if error is None or _num_processes() == 1:
            return
        if self._rank == 0:
            if self._store is not None:
                self._store.set(_STOPPED, "1")
        elif self._store is None or self._first_has_stopped(self._store):
            error.is_silent = True  # type: ignore[attr-defined]

    def _first_has_stopped(self, store: Any) -> bool:
        try:
            store.wait([_STOPPED], _COMMON)
        except (dist.DistError, RuntimeError):  # it has not, or it has gone and taken the store along
            return False
        return True

    @contextmanager
    def joined(self, device: str) -> Iterator[tuple[Processes, str]]:
        """Join the processes that torchrun has started; return them and the device of this one; alone, do nothing.

        Raises:
            UserError: torchrun's variables are not complete, or there are fewer GPUs than processes.
        """
        size = _num_processes()
        if size == 1:
            yield Processes(), device
            return
        on_gpu = device.startswith("cuda")
        if on_gpu:
            device = _own_gpu()
            torch.cuda.set_device(device)
        self._store, rank, size = next(rendezvous("env://", timeout=_PATIENCE))
        backend = "nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=self._store, rank=rank, world_size=size, timeout=_PATIENCE)
        try:
            yield Processes(rank, size), device
        finally:
            dist.destroy_process_group()


def _num_processes() -> int:
    """Return how many processes torchrun has started.

    Raises:
        UserError: its variables are not complete.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return 1
    lacking = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if lacking or not size.isdecimal():
        what = f"is {size!r}" + (f" and {lacking[0]} is not set" if lacking else "")
        raise UserError(what, place="WORLD_SIZE", remedy="unset it, or start the processes with torchrun")
    return int(size)


def _own_gpu() -> str:
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        message = f"process {number + 1} of this machine has no GPU: there are {count}"
        raise UserError(message, place="torchrun", remedy=f"give --nproc-per-node {count}")
    return f"cuda:{number}"
