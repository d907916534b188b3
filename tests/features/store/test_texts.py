"""Texts end to end: what went in comes out, and empty cells are code -1."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaclip.features.store.reader import GAP_BYTES, PIECE_BYTES, pieces
from deltaclip.features.store.texts import TextColumn, Texts

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(st.lists(ANY_TEXT, max_size=30))
def test_texts_come_out_as_they_went_in(texts):
    held = Texts.of(texts)
    assert len(held) == len(texts)
    assert [held[entry] for entry in range(len(held))] == texts
    assert [text for block in held.blocks() for text in block] == texts
    order = np.random.default_rng(0).integers(-1, len(texts), size=50) if texts else np.full(3, -1)
    assert held.take(order).tolist() == ["" if entry < 0 else texts[entry] for entry in order]


@given(st.lists(ANY_TEXT, max_size=30))
def test_a_column_is_its_rows(texts):
    column = TextColumn.of(texts)
    assert column.tolist() == list(column) == texts
    assert len(column) == len(texts)
    assert column[1:3].tolist() == texts[1:3]
    assert column[np.arange(len(texts))[::-1]].tolist() == texts[::-1]
    assert column.some() is any(texts)
    assert [column[row] for row in range(len(texts))] == texts


@pytest.mark.parametrize("row_bytes", [128, 1536, GAP_BYTES, pytest.param(2 * PIECE_BYTES, marks=pytest.mark.slow)])
def test_pieces_cover_every_entry_once_and_stay_small(row_bytes):
    generator = np.random.default_rng(0)
    for share in (0.001, 0.1, 0.9, 1.0):
        entries = np.flatnonzero(generator.random(50_000) < share)
        found = list(pieces(entries, row_bytes))
        assert np.concatenate([entries[part] for part, _ in found]).tolist() == entries.tolist()
        for part, rows in found:
            assert (entries[part][0], entries[part][-1]) == (rows.start, rows.stop - 1)
            assert (rows.stop - rows.start) * row_bytes <= max(PIECE_BYTES, row_bytes)
            assert np.diff(entries[part]).max(initial=0) * row_bytes <= max(GAP_BYTES, row_bytes)
    assert list(pieces(np.empty(0, dtype=np.int64), row_bytes)) == []
