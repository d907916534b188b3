"""Heads and towers of CLIP as one model that trains: rows to embeddings to scores to a loss.

Steps draw rows as everywhere, with the towers' inputs read ahead and brought to the device in one copy. Knows towers,
their inputs and heads. Must not know settings, files or run directories.

Shapes: B rows of a part, E distinct entries among them, D width, I distinct images, T distinct texts.
"""

from __future__ import annotations

import collections
import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from deltaclip.base.transfers import Sender
from deltaclip.pipeline.model.scores import run_heads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray
    from torch import Tensor

    from deltaclip.features.backbone.towers import CutTower
    from deltaclip.pipeline.loop.batches import MemoryBatches
    from deltaclip.pipeline.model.heads import Heads
    from deltaclip.pipeline.model.losses import Objective
    from deltaclip.pipeline.model.scores import Batch
    from deltaclip.pipeline.rows.cached_rows import CacheRows
    from deltaclip.pipeline.training.processes import Processes
    from deltaclip.pipeline.training.tower_inputs import TowerInputs


# ---- Heads and towers of CLIP as one model that trains: rows to embeddings to scores to a loss


EVAL_BATCH = 64  # entries a forward pass without gradients


class Entries(NamedTuple):
    """The distinct entries of some rows, what goes into the tower for each, and which of them a row has.

    That is -1 where it has none; `all_have` says that none is so.
    """

    x: Tensor
    index_B: Tensor
    token_ids: Tensor | None
    all_have: bool

    def map(self, change: Callable[[Tensor], Tensor]) -> Entries:
        """Return the entries with every tensor changed by a function."""
        ids = None if self.token_ids is None else change(self.token_ids)
        return self._replace(x=change(self.x), index_B=change(self.index_B), token_ids=ids)


class TunePart(NamedTuple):
    """Rows of a step: all of them as `batch`, and of those that this process embeds (`mine`) the towers' inputs.

    The batch has no embeddings, (B, 0), where a tower makes them; of one that is frozen (`texts` None) the cache's.
    """

    batch: Batch
    images: Entries
    texts: Entries | None
    mine: slice

    def __len__(self) -> int:
        return self.batch.num_rows

    def map(self, change: Callable[[Tensor], Tensor]) -> TunePart:
        """Return the part with every tensor changed by a function."""
        texts = None if self.texts is None else self.texts.map(change)
        return TunePart(self.batch.map(change), self.images.map(change), texts, self.mine)


Mapped = TypeVar("Mapped", Entries, TunePart)


def sent(sender: Sender, things: Sequence[Mapped]) -> Callable[[], list[Mapped]]:
    """Send all tensors of some things to a device together; what is returned gives them there."""
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    for thing in things:
        thing.map(note)
    arriving = sender.send(tensors)

    def here() -> list[Mapped]:
        found = iter(arriving.here())
        return [thing.map(lambda _: next(found)) for thing in things]

    return here


@dataclass(frozen=True, kw_only=True)
class TowerSide:
    """A tower with its inputs; `tokens_TL` are the token ids of all texts, for a text tower."""

    tower: CutTower
    inputs: TowerInputs
    tokens_TL: Tensor | None = None

    def entries(self, entry_B: NDArray[np.int64], epoch: int | None) -> Entries:
        """Return what goes into the tower for rows of these entries, each entry once; -1 is a row without one."""
        distinct = np.unique(entry_B[entry_B >= 0])
        if not distinct.size:  # of rows that all have none: the pass goes through one that no row takes
            distinct = np.zeros(1, dtype=np.int64)
        index_B = np.where(entry_B < 0, -1, np.searchsorted(distinct, entry_B))
        tokens = None if self.tokens_TL is None else self.tokens_TL[torch.from_numpy(distinct)].long()
        all_have = bool((index_B >= 0).all())
        return Entries(self.inputs.read(distinct, epoch), torch.from_numpy(index_B), tokens, all_have)

    def features(self, entries: Entries) -> Tensor:
        """Return features (E, D) of distinct entries, which are on the tower's device, not normalised."""
        x = self.inputs.look_up(entries.x)
        if not self.inputs.at_boundary:
            x = self.tower.to_boundary(x)
        return self.tower.from_boundary(x, entries.token_ids)


class TunedModel:
    """Heads, and the towers below them; a text side of None is frozen, its embeddings are those of the cache."""

    def __init__(
        self,
        heads: Heads,
        image: TowerSide,
        text: TowerSide | None,
        *,
        objective: Objective,
        processes: Processes,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.heads, self.image, self.text = heads, image, text
        self.objective, self.processes, self.autocast = objective, processes, autocast
        self.device = next(heads.parameters()).device
        self._sender = Sender(self.device)

    @property
    def towers(self) -> list[CutTower]:
        """The towers of which something trains."""
        return [self.image.tower, *([self.text.tower] if self.text else [])]

    def loss(self, part: TunePart) -> Tensor:
        """Return the loss over all rows of a part on the device; gradients reach the towers through this process's."""
        batch = part.batch
        v_BD = self._embedded(self.image, part.images, part.mine, len(part))
        t_BD = batch.t_BD if self.text is None else self._embedded(self.text, part.texts, part.mine, len(part))
        embedded = batch._replace(v_BD=v_BD, t_BD=t_BD)
        return self.objective(run_heads(self.heads, embedded), embedded)

    def share_gradients(self) -> None:
        """Sum the towers' gradients over processes, each of which has those of its own rows; heads have all already."""
        towers = [p for tower in self.towers for p in tower.named_trainable().values()]
        self.processes.sum_gradients(towers)
        self.processes.mean_gradients(list(self.heads.parameters()))

    def embed(self, rows: CacheRows, chosen: NDArray[np.int64]) -> CacheRows:
        """Return the cache with the embeddings that the towers give now, for the images and prompts of some rows.

        Vectors of other entries are those of the cache; in float32, on the device of the heads.
        """
        assert rows.v_ID is not None
        assert rows.t_TD is not None
        v_ID = self._embed_entries(self.image, rows.v_ID, rows.rows.image[chosen])
        t_TD = rows.t_TD.to(self.device)
        if self.text is not None:
            t_TD = self._embed_entries(self.text, t_TD, rows.rows.prompt[chosen])
        return replace(rows, v_ID=v_ID, t_TD=t_TD, device=self.device)

    def _embed_entries(self, side: TowerSide, cached: Tensor, entry_N: NDArray[np.int64]) -> Tensor:
        distinct = np.unique(entry_N[entry_N >= 0])
        found = torch.zeros((len(distinct), cached.shape[1]), device=self.device)
        mine = self.processes.share(len(distinct))
        for start in range(mine.start, mine.stop, EVAL_BATCH):
            block = slice(start, min(start + EVAL_BATCH, mine.stop))
            (entries,) = sent(self._sender, [side.entries(distinct[block], None)])()
            with torch.no_grad(), self._in_precision():
                found[block] = unit(side.features(entries))
        vectors = cached.to(self.device, torch.float32, copy=True)
        vectors[torch.from_numpy(distinct).to(self.device)] = self.processes.joined(found)
        return vectors

    def _embedded(self, side: TowerSide, entries: Entries | None, mine: slice, num_rows: int) -> Tensor:
        assert entries is not None
        with self._in_precision():
            features_ED = side.features(entries)
        index_B = entries.index_B
        if entries.all_have:
            unit_BD = unit(features_ED)[index_B]
        else:
            unit_BD = unit(features_ED)[index_B.clamp(min=0)].masked_fill((index_B < 0).unsqueeze(-1), 0.0)
        return self.processes.whole(unit_BD, mine, num_rows)

    def _in_precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.autocast) if self.autocast else contextlib.nullcontext()


def unit(features_ED: Tensor) -> Tensor:
    """Return features of unit length, normalised in float32 whatever the towers compute in."""
    return F.normalize(features_ED.float(), dim=-1)


def backbone_tensors(towers: Iterable[CutTower]) -> dict[str, Tensor]:
    """Return the trainable tensors of towers by their names in the model, as they are now."""
    return {name: p.detach() for tower in towers for name, p in tower.named_trainable().items()}


# ---- Steps of a fine-tuning: rows drawn as everywhere, with the towers' inputs read ahead


STEPS_AHEAD = 2


@dataclass(frozen=True, kw_only=True)
class SideBatches:
    """Steps over some rows of a cache: `memory` has all of a step's rows as one batch, which goes in so many `parts`.

    `image_N`, `prompt_N` are the entries of the rows; `text` is None where the text tower is frozen. A loss that is
    `by_row` (a mean over labelled rows) comes out as that of the whole step, whichever rows of a part lack a label.
    """

    memory: MemoryBatches
    image_N: NDArray[np.int64]
    prompt_N: NDArray[np.int64]
    image: TowerSide
    text: TowerSide | None
    device: torch.device
    parts: int
    processes: Processes
    by_row: bool

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps of an epoch."""
        return self.memory.steps_per_epoch

    def __call__(self, epoch: int, *, first: int = 0) -> Iterator[list[TunePart]]:
        """Return the steps of an epoch from `first` on, on the device; a thread reads and sends the next meanwhile.

        A step is for the stream that is current where it is drawn.
        """
        steps, sender = self.memory.order(epoch)[first:], Sender(self.device)
        pending: collections.deque[Future[Callable[[], list[TunePart]]]] = collections.deque()
        ahead = iter(steps)
        with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
            try:
                for _ in steps:
                    while len(pending) <= STEPS_AHEAD and (rows_B := next(ahead, None)) is not None:
                        pending.append(pool.submit(self._step, rows_B, epoch, sender))
                    yield pending.popleft().result()()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _step(self, rows_B: Tensor, epoch: int, sender: Sender) -> Callable[[], list[TunePart]]:
        parts = rows_B.tensor_split(min(self.parts, len(rows_B)))
        return sent(sender, [self._part(part, epoch, step_S=rows_B) for part in parts])

    def _part(self, rows_B: Tensor, epoch: int, *, step_S: Tensor) -> TunePart:
        mine = self.processes.share(len(rows_B))
        own = rows_B.cpu().numpy()[mine]
        return TunePart(
            batch=self._batch(rows_B, step_S),
            images=self.image.entries(self.image_N[own], epoch),
            texts=None if self.text is None else self.text.entries(self.prompt_N[own], epoch),
            mine=mine,
        )

    def _batch(self, rows_B: Tensor, step_S: Tensor) -> Batch:
        """Return rows, their weights such that the mean over parts, by rows, is that over the step's labelled rows."""
        batch = self.memory.take(rows_B)
        nothing = batch.v_BD.new_empty((len(rows_B), 0))
        batch = batch._replace(v_BD=nothing, t_BD=batch.t_BD if self.text is None else nothing)
        if not self.by_row:
            return batch
        weights = dict(batch.weight_B)
        for target, label_N in self.memory.label_N.items():
            here, there = ((~label_N[rows].isnan()).float().mean() for rows in (rows_B, step_S))
            if here != there:
                given_B = weights.get(target)
                weights[target] = (torch.ones_like(label_N[rows_B]) if given_B is None else given_B) * (here / there)
        return batch._replace(weight_B=weights)
