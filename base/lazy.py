"""Sequences whose values are made when they are asked for: of millions of rows most are asked for once, or never.

Knows nothing of what the values are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, overload

T = TypeVar("T")


class LazySequence(Sequence[T]):
    """`count` values, each made by `make` from its place whenever it is read."""

    def __init__(self, count: int, make: Callable[[int], T]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> LazySequence[T]: ...
    def __getitem__(self, place: int | slice) -> T | LazySequence[T]:
        """Return the value of a place, or a part of the sequence, as lazy as the whole."""
        places = range(self._count)[place]
        if isinstance(places, int):
            return self._make(places)
        return LazySequence(len(places), lambda each: self._make(places[each]))
