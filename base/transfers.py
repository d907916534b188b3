"""Many tensors to a GPU in one copy, and back, while it computes: whoever needs them waits, and no one else.

A copy between a GPU and ordinary memory makes the host wait for all that the GPU was given before; one from or to
pinned memory does not. Elsewhere than on CUDA nothing is gained: there tensors are moved plainly, or stay as they are.
Knows torch's streams, imported inside the functions. Must not know what the tensors are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray
    from torch import Tensor

ALIGNMENT = 256  # bytes: kernels read fastest from where allocators would have put a tensor


def overlaps(device: torch.device | str) -> bool:
    """Tell whether copies to and from a device can go on while the host does other things."""
    return str(device).startswith("cuda")


class Sender:
    """Sends tensors to a device, on a stream of its own; for one thread at a time."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        self._stream: Any = torch.cuda.Stream(device) if overlaps(device) else None

    def send(self, tensors: Sequence[Tensor]) -> Arriving:
        """Start the copy of tensors of the host, of any types and shapes; they may change when this returns."""
        import torch

        if self._stream is None:
            return Arriving([tensor.to(self._device) for tensor in tensors])
        starts, size = list[int](), 0
        for tensor in tensors:
            starts.append(size)
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        # torch keeps pinned blocks, and hands one out again once the copies from it are done.
        pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        for tensor, start in zip(tensors, starts, strict=True):
            _part(pinned, start, tensor).copy_(tensor)
        with torch.cuda.stream(self._stream):
            whole = pinned.to(self._device, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        parts = [_part(whole, start, tensor) for tensor, start in zip(tensors, starts, strict=True)]
        return Arriving(parts, whole, arrived)


class Arriving:
    """Tensors on their way to a device."""

    def __init__(self, tensors: list[Tensor], whole: Tensor | None = None, arrived: Any = None) -> None:
        self._tensors, self._whole, self._arrived = tensors, whole, arrived

    def here(self) -> list[Tensor]:
        """Return them for the calling thread's stream, which waits for them; the host does not."""
        import torch

        if self._whole is not None:
            stream = torch.cuda.current_stream(self._whole.device)
            stream.wait_event(self._arrived)
            self._whole.record_stream(stream)  # or their memory would be given away while this stream reads it
        return self._tensors


class Leaving:
    """Copies of tensors on their way to the host, as they are now: contiguous, and apart from the tensors."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        import torch

        on_gpu = [tensor for tensor in tensors if overlaps(tensor.device)]
        self._copies = [_host_copy(tensor.detach()) for tensor in tensors]
        self._arrived: Any = None
        if on_gpu:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(on_gpu[0].device))

    def there(self) -> list[Tensor]:
        """Return the copies, once they have arrived: any thread may wait for them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copies


def fetched(*tensors: Tensor) -> list[NDArray[Any]]:
    """Return tensors as arrays of the host, with one wait for all of them."""
    return [tensor.numpy() for tensor in Leaving(tensors).there()]


def _host_copy(tensor: Tensor) -> Tensor:
    import torch

    is_apart = overlaps(tensor.device)
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_apart)
    return copy.copy_(tensor, non_blocking=is_apart)


def _part(memory: Tensor, start: int, like: Tensor) -> Tensor:
    """Return the place of a tensor in bytes, (N,) uint8, as a tensor of its type and shape."""
    return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)
