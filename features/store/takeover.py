"""Start or go on writing a cache, taking over all that is already there: a finished cache, an interrupted run.

Extracting again computes only what is new; another backbone is another cache, never a silent mix.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError
from deltaclip.base.files import publish
from deltaclip.features.data.views import CENTER, OF_TOWER
from deltaclip.features.store.schema import DONE, MISSING_KEY
from deltaclip.features.store.store import FeatureStore
from deltaclip.features.store.writer import StoreWriter, draft_path, part_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from deltaclip.features.store.schema import Plan, ViewLayout

WHERE_MISSING = {"decode": "exact"}  # what an identity means that does not name it
NO_VIEWS: Mapping[str, ViewLayout] = MappingProxyType({})


def open_writer(
    path: Path,
    plan: Plan,
    *,
    request: dict[str, Any],
    facts: dict[str, Any],
    views: Mapping[str, ViewLayout] = NO_VIEWS,
) -> StoreWriter:
    """Return a writer for `plan` that already holds every embedding found in the cache or in an interrupted run.

    Args:
        path: of the finished cache.
        plan: what it is to hold.
        request: the backbone's identity.
        facts: what the backbone says of itself.
        views: views to make room for, beside `center` and those that are there already.

    Raises:
        UserError: what lies there was made by another backbone, in another precision or, of a view, by another
            recipe; it is damaged; the disk is full.
    """
    part = part_path(path)
    for store in open_left(path):  # both, before a byte is written: they may come from different requests
        with store:
            check_request(store, request)
    layouts = views_left(path, {name: layout.recipe for name, layout in views.items()}) | dict(views)
    header = plan.header(request)
    if (interrupted := open_interrupted(path)) is not None:
        with interrupted:
            can_go_on = interrupted.header == header and _has_room(interrupted, layouts)
        if can_go_on:
            return StoreWriter.resume(part)
    # A new layout is made beside the old one and replaces it when it holds all that the old one held.
    draft = draft_path(path)
    further = {name: layout for name, layout in layouts.items() if name != CENTER}
    writer = StoreWriter.create(draft, plan, request=request, facts=facts, views=further)
    try:
        for store in open_left(path):
            with store:
                writer.reuse(store)
    except UserError:
        writer.discard()
        raise
    writer.close()
    publish(draft, part)
    return StoreWriter.resume(part)


def _has_room(store: FeatureStore, views: Mapping[str, ViewLayout]) -> bool:
    return store.is_current and set(views) <= set(store.view_names())


def views_left(path: Path, recipes: Mapping[str, Mapping[str, Any]]) -> dict[str, ViewLayout]:
    """Return every view that earlier runs left under the name `path`.

    Args:
        path: of the finished cache.
        recipes: of the views that are asked for.

    Raises:
        UserError: one of them was made by another recipe.
    """
    found: dict[str, ViewLayout] = {}
    for store in open_left(path):
        with store:
            check_recipes(store, {name: layout.recipe for name, layout in found.items()} | dict(recipes))
            found |= store.view_layouts()
    return found


def check_recipes(
    store: FeatureStore, recipes: Mapping[str, Mapping[str, Any]], *, remedy: str = "give another --out"
) -> None:
    """Refuse a cache that has a view of one of these names and of another recipe.

    A recipe given without the part that follows from the backbone is compared without it.

    Raises:
        UserError: with every difference.
    """
    for name, layout in store.view_layouts().items():
        there = dict(layout.recipe)
        of_tower = {OF_TOWER: there[OF_TOWER]} if OF_TOWER in there else {}
        wrong = differences(there, of_tower | dict(recipes.get(name, there)))
        if wrong:
            message = f"has a view {name} of another recipe: {'; '.join(wrong)}"
            raise UserError(message, place=store.path, remedy=remedy)


def open_left(path: Path) -> Iterator[FeatureStore]:
    """Yield what earlier runs left under the name `path`: a finished cache, an interrupted run."""
    if path.exists():
        yield FeatureStore.open(path)
    if (interrupted := open_interrupted(path)) is not None:
        yield interrupted


def open_interrupted(path: Path) -> FeatureStore | None:
    """Open what an interrupted run left beside `path`; None where it left nothing."""
    part = part_path(path)
    return FeatureStore.open(part, unfinished=True) if part.exists() else None


def check_request(
    store: FeatureStore,
    request: dict[str, Any],
    *,
    remedy: str = "give another --out, or the backbone that made it",
) -> None:
    """Refuse a cache that another backbone, preprocessing or precision made than `request` says.

    Raises:
        UserError: with every difference.
    """
    wrong = differences(store.header["request"], request)
    if wrong:
        raise UserError(f"was made by another backbone: {'; '.join(wrong)}", place=store.path, remedy=remedy)


def check_data(store: FeatureStore, plan: Plan) -> None:
    """Refuse to replace a cache that has embeddings and not one image of `plan`: it is another data set's.

    Raises:
        UserError: with the name and size of that data set.
    """
    here = {key.tobytes() for key in plan.image_keys} - {MISSING_KEY}
    if not plan.num_images or not (store.status() == DONE).any():  # a shard may have no rows, or none that is usable
        return
    if not any(key.tobytes() in here for key in store.keys("images")):
        message = f"holds another data set ({store.dataset['name']}, {store.num_rows:,} rows)"
        raise UserError(message, place=store.path, remedy="give another --out or remove it")


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Return what differs between the identities of two backbones, one phrase each."""
    names = dict.fromkeys([*there, *here])
    pairs = {name: tuple(side.get(name, WHERE_MISSING.get(name)) for side in (there, here)) for name in names}
    return [f"{name} {_short(a)} there, {_short(b)} here" for name, (a, b) in pairs.items() if a != b]


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
