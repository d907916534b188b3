"""JPEG files decoded and resized on a GPU, by TorchCodec (nvJPEG), in batches.

What a file is worth is judged on the host, from its bytes (`images.open_undecoded`): a GPU's decoder is given whole
plain JPEG files alone, and one that it does not decode is decoded on the host. Knows TorchCodec, imported inside the
functions. Must not know views or caches.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import io
import threading
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError
from deltaclip.base.progress import say
from deltaclip.base.transfers import overlaps
from deltaclip.features.backbone.library import first_line
from deltaclip.features.backbone.pixels import as_batch, center_crops, device_crops
from deltaclip.features.data.images import MAX_PIXELS, decode_plain, open_undecoded
from deltaclip.features.data.jpeg import PlainJpeg

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import torch
    from PIL.Image import Image

    from deltaclip.features.backbone.load import Backbone

OPTION = "--decode gpu"
INSTEAD = "give --decode fast"
# Pixels that are decoded in one call: 256 pictures of 512 x 512. As 8 bits 200 MB of the device, and four times that
# while they are resized.
PIXELS_AT_ONCE = 1 << 26
# From stored to upright, by EXIF: whether rows and columns change places, then which ways are mirrored.
TURNS: dict[int, tuple[bool, tuple[int, ...]]] = {
    2: (False, (-1,)),
    3: (False, (-2, -1)),
    4: (False, (-2,)),
    5: (True, ()),
    6: (True, (-1,)),
    7: (True, (-2, -1)),
    8: (True, (-2,)),
}


def check_decoder(decode: str, device: str) -> None:
    """Refuse to decode on a GPU where a word says that there is none, or TorchCodec is not installed; torch stays out.

    Args:
        decode: as asked for.
        device: as asked for, see `choose_devices`.

    Raises:
        UserError: what lacks.
    """
    if decode != "gpu":
        return
    if not all(name.strip().startswith(("auto", "cuda")) for name in device.split(",")):
        raise UserError(f"needs a CUDA GPU, not --device {device}", place=OPTION, remedy=f"{INSTEAD}, or --device cuda")
    if lacking := _not_installed():
        raise UserError(lacking, place=OPTION, remedy=f"pip install 'deltaclip[gpu]', or {INSTEAD}")


def require_decoder(decode: str, device: str) -> None:
    """Refuse to decode on a GPU where there is none, or TorchCodec does not decode on it.

    Args:
        decode: as asked for.
        device: as torch calls it.

    Raises:
        UserError: what lacks, or what TorchCodec says.
    """
    if decode != "gpu":
        return
    if not overlaps(device):
        raise UserError(f"{missing_decoder(device)} here", place=OPTION, remedy=INSTEAD)
    check_decoder(decode, device)
    if reason := _trial(device):
        raise UserError(f"TorchCodec does not decode on {device} ({reason})", place=OPTION, remedy=INSTEAD)


def missing_decoder(device: str) -> str:
    """Return why nothing is decoded on a device, '' where it is."""
    if not overlaps(device):
        return "there is no CUDA GPU"
    return _not_installed() or _trial(device)


def _not_installed() -> str:
    return "" if importlib.util.find_spec("torchcodec") else "TorchCodec is not installed"


@functools.cache
def _trial(device: str) -> str:
    """Decode a small picture; return what went wrong, in one line."""
    from PIL import Image

    content = io.BytesIO()
    Image.new("RGB", (16, 16)).save(content, "JPEG")
    try:
        decode_streams([content.getvalue()], device)
    except (RuntimeError, ImportError, OSError) as error:
        return first_line(error)
    return ""


def decode_streams(streams: Sequence[bytes], device: str) -> list[torch.Tensor]:
    """Return pictures as they lie in their files, (1 or 3, H, W) uint8 each.

    Raises:
        RuntimeError: one of them, or all, cannot be decoded.
    """
    decoders: Any = importlib.import_module("torchcodec.decoders")  # an extra
    found: list[torch.Tensor] = decoders.decode_jpeg(list(streams), mode="UNCHANGED", device=device)
    return found


class DeviceDecoder:
    """Opens files, and decodes those that it has left undecoded on a device; for several threads at a time.

    `on_host` counts pictures that were decoded on the host for what their files are, `failed` those that the device's
    decoder did not decode, `reason` is the first time's.
    """

    def __init__(self, backbone: Backbone) -> None:
        """Take the sizes and cuts from a backbone, the device from it too.

        Raises:
            UserError: its transform is not known here.
        """
        self._backbone, self._fit, self._host_crops = backbone, device_crops(backbone), center_crops(backbone)
        self.on_host, self.failed, self.reason = 0, 0, ""
        self._lock = threading.Lock()

    def open(self, content: bytes, *, max_pixels: int | None = None) -> Image | PlainJpeg:
        """Return a picture, undecoded where it is for the device.

        Raises:
            UnreadableImage: as `images.open_image`.
        """
        picture = open_undecoded(content, max_pixels=MAX_PIXELS if max_pixels is None else max_pixels)
        if not isinstance(picture, PlainJpeg):
            with self._lock:
                self.on_host += 1
        return picture

    def pixels(self, pictures: Sequence[PlainJpeg]) -> torch.Tensor:
        """Return pictures as the model takes them, (B, 3, h, w) uint8 on the device."""
        return as_batch(self._backbone, [crop for part in _parts(pictures) for crop in self._crops(part)])

    def _crops(self, pictures: Sequence[PlainJpeg]) -> list[torch.Tensor]:
        """Return the crops of pictures, (1, 3, h, w) each; of those that the device does not decode on the host."""
        import torch

        natives = self._natives(pictures)
        crops: dict[int, torch.Tensor] = {}
        of_shape: dict[tuple[int, ...], list[int]] = {}
        for place, native in enumerate(natives):
            of_shape.setdefault(() if native is None else tuple(native.shape), []).append(place)
        for place in of_shape.pop((), []):
            crops[place] = self._host_crops(decode_plain(pictures[place]))
        for places in of_shape.values():
            some = [native for place in places if (native := natives[place]) is not None]
            fitted = self._fit(torch.stack(some)).expand(-1, 3, -1, -1)  # grey has one channel until here
            crops |= dict(zip(places, fitted.split(1), strict=True))
        return [crops[place] for place in range(len(pictures))]

    def _natives(self, pictures: Sequence[PlainJpeg]) -> list[torch.Tensor | None]:
        """Return upright pictures of the device, (1 or 3, H, W) each, None of those that it does not decode."""
        import torch

        try:
            return list(_natives(pictures, self._backbone.device))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if len(pictures) == 1:
                self._note(first_line(error))
                return [None]
        half = len(pictures) // 2  # one picture spoils the call for all
        return [*self._natives(pictures[:half]), *self._natives(pictures[half:])]

    def _note(self, reason: str) -> None:
        with self._lock:
            self.failed += 1
            is_first, self.reason = not self.reason, self.reason or reason
        if is_first:
            say(f"{OPTION}: {self._backbone.device} does not decode a picture ({reason}); such are decoded on the host")


def _natives(pictures: Sequence[PlainJpeg], device: str) -> list[torch.Tensor]:
    found = decode_streams([picture.stream for picture in pictures], device)
    for native, picture in zip(found, pictures, strict=True):
        if native.shape[-2:] != (picture.height, picture.width) or len(native) not in {1, 3}:
            raise RuntimeError(f"{picture.width} x {picture.height} came as {tuple(native.shape)}")
    return [upright(native, picture.orientation) for native, picture in zip(found, pictures, strict=True)]


def upright(pixels: torch.Tensor, orientation: int) -> torch.Tensor:
    """Turn (..., H, W) as `images.open_image` turns a picture whose EXIF says this orientation."""
    swapped, mirrored = TURNS.get(orientation, (False, ()))
    turned = pixels.transpose(-1, -2) if swapped else pixels
    return turned.flip(mirrored) if mirrored else turned


def _parts(pictures: Sequence[PlainJpeg]) -> Iterator[Sequence[PlainJpeg]]:
    """Cut pictures into runs of at most `PIXELS_AT_ONCE`; a larger picture goes alone."""
    start, total = 0, 0
    for place, picture in enumerate(pictures):
        size = picture.width * picture.height
        if place > start and total + size > PIXELS_AT_ONCE:
            yield pictures[start:place]
            start, total = place, 0
        total += size
    yield pictures[start:]


def decoding_notes(decoders: Iterable[DeviceDecoder | None]) -> list[str]:
    """Say of decoders, several of which may be one, how many pictures they have left to the host, and why."""
    found = {id(decoder): decoder for decoder in decoders if decoder is not None}.values()
    on_host, failed = sum(each.on_host for each in found), sum(each.failed for each in found)
    reason = next((each.reason for each in found if each.reason), "")
    as_by = "decoded on the host, as by --decode fast"
    notes = [f"images that are no plain JPEG, {as_by}: {on_host:,}"] if on_host else []
    return [*notes, *([f"images that the GPU did not decode ({reason}), {as_by}: {failed:,}"] if failed else [])]
