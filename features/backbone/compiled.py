"""Blocks that torch compiles: its kernels do what several launches do, which a small step on a GPU waits for.

A block at a time, as towers are cut between them; kernels of blocks that are alike are made once. Knows modules.
Must not know towers, what is frozen, or files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

GRAPHS_A_BLOCK = 4  # batches of one and of more, inputs with gradients and without


def compile_blocks(blocks: Sequence[torch.nn.Module], *, backend: str = "inductor") -> None:
    """From now on run these blocks compiled where gradients are kept; torch compiles when they are first run so.

    Args:
        blocks: each maps a tensor whose first dimension may vary from call to call, the others do not.
        backend: which of torch's compilers.
    """
    from torch._dynamo import config

    # The graphs of all blocks of a class count together, and beyond the limit torch runs them as they are.
    config.recompile_limit += GRAPHS_A_BLOCK * len(blocks)
    for block in blocks:
        block.forward = _Compiled(block.forward, backend)


def first_pass(run: Callable[[], torch.Tensor], weights: Sequence[torch.nn.Parameter]) -> torch.Tensor:
    """Return what a pass gives in which blocks are compiled, forwards and backwards; no gradient is left.

    Raises:
        UserError: torch cannot compile them on this machine.
    """
    import torch

    try:
        found = run()
        torch.autograd.grad(found.float().square().sum(), weights, allow_unused=True)
    except torch.OutOfMemoryError:  # says nothing of compiling
        raise
    except RuntimeError as error:  # as those of torch's compilers are
        lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
        why = lines[0] if lines else type(error).__name__
        remedy = "leave it out, or install what torch compiles with (a C++ compiler, on a GPU Triton too)"
        raise UserError(f"torch cannot compile blocks here: {why.strip()}", place="--compile", remedy=remedy) from error
    return found.detach()


class _Compiled:
    """A forward pass that is compiled where gradients are kept, and elsewhere what it was."""

    def __init__(self, forward: Callable[..., Any], backend: str) -> None:
        import torch

        self._plain, self._compiled = forward, torch.compile(forward, backend=backend)

    def __call__(self, x: torch.Tensor, *others: Any, **options: Any) -> Any:
        import torch

        if not torch.is_grad_enabled():
            return self._plain(x, *others, **options)
        torch._dynamo.maybe_mark_dynamic(x, 0)  # else a second batch size would be compiled anew
        return self._compiled(x, *others, **options)
