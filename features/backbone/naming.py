"""Which tensors of a checkpoint are those of a model, under whatever keys and prefixes they were saved.

Training programs put weights into dictionaries beside their optimiser and wrap models in modules whose names go before,
or into the middle of, the names of the weights. No list of them is complete: the prefix taken away is the one that
leaves most names that the model has. Knows names. Must not know files or what a model computes.
"""

from __future__ import annotations

import collections
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from deltaclip.base.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    import torch

    from deltaclip.features.backbone.tensors import StoredTensors

# Modules that stand for the one inside them: of DistributedDataParallel, torch.compile, FSDP, activation checkpointing.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
AVERAGED = re.compile(r"(?:^|[._])(?:ema|n_averaged|averaged?|avg|swa|shadow|teacher|momentum)(?:[._]|$)")
# As many names as this, of the best prefix's, make another one as good: an average may lack a buffer.
AS_GOOD = 0.9
TEXT = "text."  # before the names of a text tower that is a module of its own
OF_IMAGES = ("visual.", "vision_model.", "visual_projection.")


@dataclass(frozen=True, kw_only=True)
class Naming:
    """`stored` has the name in the file of each name of the model; `unused` of each that no part of the model has.

    `words` say what was taken away, one phrase each.
    """

    stored: Mapping[str, str]
    unused: Mapping[str, str]
    words: tuple[str, ...]


class _Found(NamedTuple):
    """The file's name of each name in a layout, where both are, and the name that the model has for it.

    `prefixes` stood before them, `others` before the same weights once more.
    """

    raw_of: dict[str, str]
    own_of: dict[str, str]
    prefixes: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def stored(self) -> dict[str, str]:
        return {self.own_of[name]: raw for name, raw in self.raw_of.items()}

    def with_more(self, other: _Found) -> _Found:
        """Return both."""
        raw_of, own_of = self.raw_of | other.raw_of, self.own_of | other.own_of
        return _Found(raw_of, own_of, self.prefixes + other.prefixes, self.others + other.others)


def find_names(weights: StoredTensors, of_model: Collection[str], *, place: Path) -> Naming:
    """Find the tensors of a model with the names `of_model`.

    Raises:
        UserError: several sets of different tensors fit equally well, or two tensors one name.
    """
    wrappers = WRAPPERS - {part for name in of_model for part in name.split(".")}
    raws: dict[str, list[str]] = {}
    for raw in weights.by_name:
        raws.setdefault(_without(raw, wrappers), []).append(raw)
    plain = {name: min(several, key=len) for name, several in raws.items()}
    found = _located(plain, of_model, weights, place=place)
    for tower in _towers(of_model):  # each may have been saved under a prefix of its own
        if not any(name in found.stored for name in tower):
            rest = {name: raw for name, raw in plain.items() if raw not in set(found.raw_of.values())}
            more = _located(rest, tower, weights, place=place)
            if len(more.raw_of) >= AS_GOOD * len(tower):
                found = found.with_more(more)
    used = set(found.raw_of.values())
    for raw in found.raw_of.values():
        _require_one(raws[_without(raw, wrappers)], weights, place=place)
    keys = {weights.key_of(raw) for raw in used}
    unused: dict[str, str] = {}
    for head in (_join(prefix, "") for prefix in found.prefixes):
        others = {name.removeprefix(head): raw for name, raw in plain.items() if name.startswith(head)}
        unused |= {name: raw for name, raw in others.items() if raw not in used and weights.key_of(raw) in keys}
    words = _words(weights, found.raw_of)
    if any(found.own_of[name] != name for name in found.raw_of):
        words.append(f"names with and without {TEXT!r} taken for each other")
    words += [f"{other!r} holds such weights once more and was left" for other in found.others]
    return Naming(stored=found.stored, unused=unused, words=tuple(words))


def _located(plain: Mapping[str, str], of_model: Collection[str], weights: StoredTensors, *, place: Path) -> _Found:
    """Find names of the model, or some of them, under the prefix that leaves most."""
    layouts = [(_votes(plain, layout), layout) for layout in ({name: name for name in of_model}, _other_text(of_model))]
    votes, layout = max(layouts, key=lambda found: max(found[0].values(), default=0))
    if not votes:
        return _Found({}, {})
    prefix, others = _choose(votes, plain, weights, layout, place=place)
    raw_of = {name: raw for name in layout if (raw := plain.get(_join(prefix, name)))}
    return _Found(raw_of, {name: layout[name] for name in raw_of}, (prefix,), tuple(others))


def _towers(of_model: Collection[str]) -> Iterator[list[str]]:
    """Yield the names of the image and of the text tower, where the model has both."""
    names = [name for name in of_model if not name.startswith("logit_")]
    towers = [[name for name in names if name.startswith(OF_IMAGES) is is_image] for is_image in (True, False)]
    if all(towers):
        yield from towers


def _require_one(raws: Sequence[str], weights: StoredTensors, *, place: Path) -> None:
    """Refuse names that are one without the wrappers in them, of different tensors: which is meant, nobody can tell."""
    first, *further = (weights.by_name[raw] for raw in raws)
    for raw, other in zip(raws[1:], further, strict=True):
        if not _equal({"": first}, {"": other}):
            raise UserError(
                f"holds {raws[0]!r} and {raw!r}, which differ and stand for one tensor",
                place=place,
                remedy="save the one that is meant alone",
            )


def _without(name: str, wrappers: Collection[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in wrappers)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _other_text(of_model: Iterable[str]) -> dict[str, str]:
    """Return the names that the model has where its text tower is, or is not, a module of its own, for those it has."""
    names = list(of_model)
    if any(name.startswith(TEXT) for name in names):
        return {name.removeprefix(TEXT): name for name in names}
    return {name if name.startswith(("visual.", "logit_")) else f"{TEXT}{name}": name for name in names}


def _votes(names: Iterable[str], known: Collection[str]) -> collections.Counter[str]:
    """Count for each prefix how many of the names, without it, are known."""
    votes: collections.Counter[str] = collections.Counter()
    for name in names:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in known:
                votes[".".join(parts[:start])] += 1
    return votes


def _choose(
    votes: collections.Counter[str],
    plain: Mapping[str, str],
    weights: StoredTensors,
    layout: Collection[str],
    *,
    place: Path,
) -> tuple[str, list[str]]:
    """Return the prefix, and those under which the weights lie once more."""
    most = max(votes.values())
    close = [prefix for prefix, count in votes.most_common() if count >= AS_GOOD * most]
    own = [prefix for prefix in close if not AVERAGED.search(prefix)] or close
    sets = {prefix: _of(prefix, plain, weights, layout) for prefix in own}
    first, *further = own
    for other in further:
        if not _equal(sets[first], sets[other]):
            raise UserError(
                f"holds several models that fit: under {first!r} and under {other!r}",
                place=place,
                remedy="save the one that is meant alone",
            )
    return first, [prefix for prefix in close if prefix not in own]


def _of(
    prefix: str, plain: Mapping[str, str], weights: StoredTensors, layout: Collection[str]
) -> dict[str, torch.Tensor]:
    return {known: weights.by_name[raw] for known in layout if (raw := plain.get(_join(prefix, known)))}


def _equal(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> bool:
    import torch

    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def _words(weights: StoredTensors, raw_names: Mapping[str, str]) -> list[str]:
    """Say which keys and prefixes stood before the names, and what stood in the middle of them."""
    heads = list(dict.fromkeys(raw.removesuffix(name) for name, raw in raw_names.items() if raw.endswith(name)))
    others = [raw for name, raw in raw_names.items() if not raw.endswith(name)]
    inside = dict.fromkeys(part for raw in others for part in raw.split(".") if part in WRAPPERS)
    words = []
    for head in heads[:3]:
        key = weights.key_of(head.rstrip("."))
        prefix = head.removeprefix(f"{key}.") if key else head
        parts = [f"read under key {key!r}"] if key else []
        parts += [f"prefix {prefix!r} taken away"] if prefix else []
        words += [", ".join(parts)] if parts else []
    return words + [f"{part!r} taken out of names" for part in inside]
