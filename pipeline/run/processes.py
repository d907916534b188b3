"""The processes that train together under torchrun; one alone has nothing to exchange.

Each process embeds its rows of a batch and sees the embeddings of all, so that losses that compare rows, dropout and
choices are those of one process with the whole batch. Knows torch.distributed. Must not know heads or towers.
"""

from __future__ import annotations

import datetime as dt
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from deltaclip.pipeline.training.layout import laid_out_like

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

# One process fills the boundary cache while the others wait for it, which may take hours.
_PATIENCE = dt.timedelta(days=2)


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


@contextmanager
def joined_processes(device: str) -> Iterator[tuple[Processes, str]]:
    """Join the processes that torchrun has started, and return them and the device of this one; alone, do nothing."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes(), device
        return
    on_gpu = device.startswith("cuda")
    if on_gpu:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    try:
        yield Processes(dist.get_rank(), size), device
    finally:
        dist.destroy_process_group()
