"""A lazy sequence is the list that it stands for, and makes only what is asked for."""

from __future__ import annotations

import pytest

from deltaclip.base.lazy import LazySequence


def test_it_is_the_list_that_it_stands_for():
    made = []
    squares = LazySequence(5, lambda place: made.append(place) or place**2)
    assert len(squares) == 5
    assert made == []
    assert (squares[3], squares[-1]) == (9, 16)
    part = squares[1:4]
    assert len(part) == 3
    assert made == [3, 4]
    assert list(part) == [1, 4, 9]
    assert list(part[1:]) == list(squares[2:4]) == [4, 9]
    assert list(squares[::-2]) == [16, 4, 0]
    assert list(squares) == [0, 1, 4, 9, 16]
    with pytest.raises(IndexError):
        squares[5]
