"""Lanes: order of results, turns, how far ahead they run, and errors at their place."""

from __future__ import annotations

import threading
import time

import pytest

from deltaclip.features.backbone.decode_ahead import dealt


def names():
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("encode"))


@pytest.mark.parametrize("num_lanes", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 10])
def test_order_and_turns(num_lanes, count):
    seen = [[] for _ in range(num_lanes)]

    def lane(number):
        def work(piece):
            time.sleep(0.002 * ((piece * 7) % 3))  # later pieces are done before earlier ones
            seen[number].append((piece, threading.get_ident()))
            return piece * piece

        return work

    assert list(dealt(range(count), [lane(number) for number in range(num_lanes)])) == [n * n for n in range(count)]
    for number, pieces in enumerate(seen):
        assert [piece for piece, _ in pieces] == list(range(number, count, num_lanes))
        assert len({ident for _, ident in pieces}) <= 1  # one thread of its own
    assert names() == []


def test_computes_while_results_are_consumed_but_not_further():
    started = []

    def lane(piece):
        started.append(piece)
        return piece

    results = dealt(iter(range(10)), [lane])
    assert next(results) == 0
    time.sleep(0.05)
    assert started == [0, 1]  # one result waits, and nothing more is drawn
    results.close()
    assert names() == []


def test_an_error_comes_at_its_place():
    def lane(piece):
        if piece == 2:
            raise RuntimeError("a bug")
        return piece

    results = dealt(range(5), [lane, lane])
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(RuntimeError, match="a bug"):
        next(results)
    assert names() == []
