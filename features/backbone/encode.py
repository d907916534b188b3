"""Pixels and prompts to embeddings.

A prompt is run to its last token in use, where the tower's attention is causal: what stands behind the token that is
pooled changes nothing, so the padding of a short prompt need not be computed; exact, and most of the work of prompts of
10 tokens at 77 places. Towers that look at padding, pool elsewhere or append a token of their own run whole. Parts of a
batch run at the same time, each on processors of its own: a product that two share is done when the slower one is.

Knows a loaded backbone, its tokenizer and open_clip's towers. Must not know files or caches.

Shapes: B images or texts, L tokens, D width.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.base.transfers import fetched
from deltaclip.features.backbone.pixels import normalise
from deltaclip.features.data.views import UnfitBackboneError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from numpy.typing import NDArray

    from deltaclip.features.backbone.load import Backbone


# ---- Pixels to image embeddings


MIN_PART = 16  # images


class Embeddings(NamedTuple):
    """B embeddings of unit length and the lengths that they had before."""

    unit_BD: NDArray[np.float32]
    norm_B: NDArray[np.float32]


def encode_images(backbone: Backbone, pixels_B3HW: torch.Tensor) -> Embeddings:
    """Encode preprocessed images; as `try_images`, but what is unusable never gets out.

    Raises:
        UserError: an embedding is not finite or has no length.
    """
    return require_usable(try_images(backbone, pixels_B3HW), backbone)


def try_images(backbone: Backbone, pixels_B3HW: torch.Tensor) -> Embeddings:
    """Encode preprocessed images, whatever comes of it.

    Args:
        backbone: a loaded model.
        pixels_B3HW: (B, 3, H, W), uint8, or float32 as `backbone.preprocess` gives them.

    Returns:
        unit_BD float32 (B, D), L2 norm 1; norm_B float32 (B,), the length of open_clip's own output.
    """
    import torch

    encoder, dtype = backbone.encoder, next(backbone.model.parameters()).dtype

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return encoder.encode_image(normalise(backbone, pixels).to(dtype))  # type: ignore[no-any-return]

    with torch.inference_mode():
        return to_unit_length(run_images(backbone, encode, pixels_B3HW))


def run_images(
    backbone: Backbone, encode: Callable[[torch.Tensor], torch.Tensor], pixels_B3HW: torch.Tensor
) -> torch.Tensor:
    """Return what `encode` makes of images, (B, ...), in parts at the same time where the backbone's encoder goes so.

    Args:
        backbone: a loaded model.
        encode: maps (P, 3, H, W) to (P, ...), every image alone; may be called from several threads at a time.
        pixels_B3HW: (B, 3, H, W).
    """
    is_packed = backbone.encoder is not backbone.model
    return in_parts(encode, pixels_B3HW, smallest=MIN_PART) if is_packed else encode(pixels_B3HW)


def is_usable(found: Embeddings) -> bool:
    """Tell whether every embedding is finite and has a length."""
    return bool(np.isfinite(found.unit_BD).all() and np.isfinite(found.norm_B).all() and (found.norm_B > 0).all())


def require_usable(found: Embeddings, backbone: Backbone) -> Embeddings:
    """Return the embeddings as they are.

    Raises:
        UserError: one of them is not finite or has no length.
    """
    if is_usable(found):
        return found
    what = "of length zero" if np.isfinite(found.norm_B).all() else "that are not finite"
    remedy = "check the weights, or give --precision fp32"
    raise UserError(f"the backbone gives embeddings {what}", place=backbone.facts["backbone"], remedy=remedy)


def to_unit_length(features_BD: torch.Tensor) -> Embeddings:
    """Return features of a device with unit length, and the lengths that they had."""
    return Embeddings(*fetched(*unit_and_norm(features_BD)))


def unit_and_norm(features_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise in float32, whatever the model's precision: bf16 division alone would cost three digits."""
    import torch

    features = features_BD.float()
    return torch.nn.functional.normalize(features, dim=-1), features.norm(dim=-1)


# ---- Prompts to text embeddings, each run to its last token in use, with a count of those that were cut


TEXT_BATCH = 256
# Texts are sorted by length within windows of this many: batches then lie close together in a cache, whatever its size.
WINDOW = 16 * TEXT_BATCH


@dataclass(frozen=True)
class TextBatch:
    """Embeddings of the texts at `entries`, which rise; `truncated_B` says which were cut at the context length.

    `tokens_B`, uint64 above 0, are equal for texts that are one to the tower, as it is given the same tokens.
    """

    entries: NDArray[np.int64]
    found: Embeddings
    truncated_B: NDArray[np.bool_]
    tokens_B: NDArray[np.uint64]


def text_batches(
    backbone: Backbone, texts: Sequence[str], entries: Sequence[int] | NDArray[np.int64]
) -> Iterator[TextBatch]:
    """Encode `texts[entry]` for every one of the rising `entries`, texts of about one length at a time.

    Batches are cut by entry and length, so that a run which resumes after any of them computes the same ones again.

    Raises:
        UserError: an embedding is not finite or has no length.
    """
    if not backbone.has_text:
        yield from _nothing(backbone, entries)
        return
    tower = TextTower(backbone)
    for _, window in itertools.groupby(entries, key=lambda entry: int(entry) // WINDOW):
        of_window = np.fromiter(window, dtype=np.int64)
        tokens_BL, truncated_B = _tokenise(backbone, [texts[entry] for entry in of_window])
        order = np.argsort(tower.lengths(tokens_BL), kind="stable")
        for start in range(0, len(order), TEXT_BATCH):
            places = np.sort(order[start : start + TEXT_BATCH])
            found = _encode(backbone, tower, tokens_BL[places])
            yield TextBatch(of_window[places], found, truncated_B[places], _token_keys(tokens_BL[places]))


def _nothing(backbone: Backbone, entries: Sequence[int] | NDArray[np.int64]) -> Iterator[TextBatch]:
    """Yield what a backbone without a text tower makes of texts: zeros, of tokens that nobody knows."""
    for start in range(0, len(entries), TEXT_BATCH):
        part = np.asarray(entries[start : start + TEXT_BATCH], dtype=np.int64)
        count = len(part)
        found = Embeddings(np.zeros((count, backbone.dim), dtype=np.float32), np.zeros(count, dtype=np.float32))
        yield TextBatch(part, found, np.zeros(count, dtype=bool), np.zeros(count, dtype=np.uint64))


def require_whole(backbone: Backbone, texts: Sequence[str], *, view: str) -> None:
    """Refuse a backbone that cannot read texts of ours to their ends: of a cut one nobody knows what it still says.

    Raises:
        UnfitBackboneError: names the view that is made of them, and the first text that would be cut; or there is no
            text tower.
    """
    if not backbone.has_text:
        remedy = f"leave {view} out of --views"
        raise UnfitBackboneError("has no text tower", place=backbone.facts["backbone"], remedy=remedy)
    cut = np.flatnonzero(_tokenise(backbone, list(texts))[1])
    if cut.size:
        words = f"reads {backbone.context_length} tokens, too few for the prompts of {view} ({texts[cut[0]]!r})"
        raise UnfitBackboneError(words, place=backbone.facts["backbone"], remedy=f"leave {view} out of --views")


def encode_texts(backbone: Backbone, texts: list[str]) -> Embeddings:
    """Encode texts in one batch; longer ones are cut at the context length, as open_clip does.

    Args:
        backbone: a loaded model.
        texts: B texts.

    Returns:
        unit_BD float32 (B, D), L2 norm 1; norm_B float32 (B,).

    Raises:
        UserError: an embedding is not finite or has no length.
    """
    return _encode(backbone, TextTower(backbone), _tokenise(backbone, texts)[0])


def _encode(backbone: Backbone, tower: TextTower, tokens_BL: torch.Tensor) -> Embeddings:
    import torch

    with torch.inference_mode():
        return require_usable(to_unit_length(tower(tokens_BL)), backbone)


def _token_keys(tokens_BL: torch.Tensor) -> NDArray[np.uint64]:
    """Return 64 bits of the tokens of each text, (B,) uint64; 0 is left to texts whose tokens nobody knows."""
    rows = np.ascontiguousarray(tokens_BL.cpu().numpy().astype("<i4"))
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.maximum(np.frombuffer(digests, dtype="<u8").astype(np.uint64), 1)


def _tokenise(backbone: Backbone, texts: list[str]) -> tuple[torch.Tensor, NDArray[np.bool_]]:
    """Return the tokens (B, L) that the tower is given, and which texts lose some, (B,) bool.

    open_clip cuts them without a word. A text is cut exactly if one more place changes the tokens before
    it or is itself filled.
    """
    length, counted = backbone.context_length, getattr(backbone.tokenizer, "with_cut", None)
    if counted is not None:
        return counted(texts, length)  # type: ignore[no-any-return]
    longer_BL = backbone.tokenizer(texts, context_length=length + 1)
    padding = backbone.tokenizer(["a"], context_length=length + 1)[0, -1]
    tokens_BL, cut_B = longer_BL[:, :length].clone(), np.zeros(len(texts), dtype=bool)
    # Tokenising costs as much as a tenth of the encoding: a second time only for those that reach the last place.
    full = (longer_BL[:, -2:] != padding).any(dim=1).nonzero()[:, 0].tolist()
    if full:
        short_BL = backbone.tokenizer([texts[place] for place in full], context_length=length)
        same = (longer_BL[full, :length] == short_BL).all(dim=1)
        cut_B[full] = np.asarray(~(same & (longer_BL[full, -1] == padding)))
        tokens_BL[full] = short_BL
    return tokens_BL, cut_B


# ---- The text tower of a backbone, run no further than the last token that its output depends on


class TextTower:
    """Calls `encode_text` of a model on tokens that are cut behind the last one in use, where that is exact."""

    def __init__(self, backbone: Backbone) -> None:
        self._model: Any = backbone.encoder
        self._device = backbone.device
        self._owner: Any = getattr(self._model, "text", self._model)
        self._pool = getattr(self._owner, "text_pool_type", getattr(self._owner, "pool_type", None))
        self.can_cut = self._pool in {"argmax", "eos"} and _is_causal(self._owner)
        self._of_length: dict[int, Any] = {}

    def lengths(self, tokens_BL: torch.Tensor) -> NDArray[np.int64]:
        """Return how many tokens of each text the tower must see, (B,) int64: all where it cannot be cut."""
        if not self.can_cut:
            return np.full(len(tokens_BL), tokens_BL.shape[1], dtype=np.int64)
        if self._pool == "argmax":
            return np.asarray(tokens_BL.argmax(dim=1)) + 1
        eos: Any = getattr(self._owner, "text_eos_id", getattr(self._owner, "eos_id", None))
        return np.asarray(tokens_BL.eq(eos).int().argmax(dim=1)) + 1

    def __call__(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        """Return the tower's output (B, D) for whole rows of tokens, in the model's number format."""
        length = int(self.lengths(tokens_BL).max())
        model = self._model if length == tokens_BL.shape[1] else self._cut(length)
        return model.encode_text(tokens_BL[:, :length].to(self._device))  # type: ignore[no-any-return]

    def _cut(self, length: int) -> Any:
        # A model of our own that shares all weights but two: the real one stays whole, for other threads too.
        if length not in self._of_length:
            import torch

            owner, model = self._owner, self._model
            shared = {id(part): part for part in (*model.parameters(), *model.buffers(), model.visual)}
            places = owner.positional_embedding
            shared[id(places)] = torch.nn.Parameter(places.detach()[:length], requires_grad=places.requires_grad)
            shared[id(owner.attn_mask)] = owner.attn_mask[:length, :length]
            self._of_length[length] = copy.deepcopy(model, shared)
        return self._of_length[length]


def _is_causal(owner: Any) -> bool:
    import torch

    mask = getattr(owner, "attn_mask", None)
    if getattr(owner, "cls_emb", None) is not None or not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return False
    expected = torch.full_like(mask, float("-inf")).triu(1)
    return torch.equal(mask, expected) and owner.positional_embedding.shape[0] == mask.shape[0]


# ---- Parts of a batch at the same time, each on processors of its own


def in_parts(encode: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor, *, smallest: int) -> torch.Tensor:
    """Return what `encode` makes of a batch on a CPU, (B, ...), without gradients.

    Args:
        encode: maps (P, ...) to (P, ...), every item alone; called from several threads at a time.
        batch: (B, ...), one or more.
        smallest: items that are worth a thread.
    """
    import torch

    threads = torch.get_num_threads()
    most = max(1, min(threads, len(batch) // smallest))
    parts = next(count for count in range(most, 0, -1) if threads % count == 0)  # none is left without work

    def without_gradients(part: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return encode(part)

    if parts == 1:
        return without_gradients(batch)
    return torch.cat(list(_threads(parts, threads // parts).map(without_gradients, batch.tensor_split(parts))))


@functools.cache
def _threads(count: int, processors: int) -> ThreadPoolExecutor:
    """Return `count` threads whose operations run on `processors` each."""
    import torch
    from threadpoolctl import threadpool_limits

    def start() -> None:
        torch.get_num_threads()  # a thread takes torch's number when it first asks, which would undo what follows
        # torch.set_num_threads would change the number for threads of others that are yet to come.
        threadpool_limits(processors, user_api="openmp")

    return ThreadPoolExecutor(count, "part", initializer=start)
