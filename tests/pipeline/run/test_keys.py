"""Keys of text columns are those of the texts themselves, each hashed once."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deltaclip.features.store.texts import TextColumn
from deltaclip.pipeline.run.keys import MAX_CHARACTERS, name_keys, row_keys, text_keys
from deltaclip.pipeline.scoring.groups import group_keys

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6), max_size=20)


@given(TEXTS)
def test_keys_are_those_of_the_texts(texts):
    column = TextColumn.of(texts)
    np.testing.assert_array_equal(row_keys(column), group_keys(np.array(texts, dtype=np.str_)))
    folded = group_keys(np.array([text.casefold() for text in texts], dtype=np.str_))
    np.testing.assert_array_equal(name_keys(column, str.casefold)[column.codes], folded)


def test_one_long_text_does_not_make_all_wide():
    texts = ["a" * (MAX_CHARACTERS // 2), *map(str, range(7))]
    np.testing.assert_array_equal(text_keys(texts)[1:], group_keys(np.array(texts[1:])))
