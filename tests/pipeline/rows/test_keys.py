"""Keys of text columns are those of the texts themselves, each hashed once."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deltaclip.features.store.texts import TextColumn
from deltaclip.pipeline.rows.cached_rows import (
    MAX_CHARACTERS,
    RowKeys,
    common_codes,
    name_keys,
    read_keys,
    row_keys,
    same_prompts,
    text_keys,
    write_keys,
)
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


def test_prompts_are_one_by_group_or_by_tokens_or_by_others_between():
    texts = np.array([1, 1, 2, 3, 4, 5], dtype=np.uint64)
    tokens = np.array([7, 8, 8, 0, 0, 7], dtype=np.uint64)
    code = same_prompts(texts, tokens)
    assert code[0] == code[1] == code[2] == code[5]
    assert len({code[0], code[3], code[4]}) == 3  # tokens that nobody knows are not the same
    plain = same_prompts(texts, np.zeros(6, dtype=np.uint64))
    assert plain.tolist() == [0, 0, 1, 2, 3, 4]


def test_codes_mean_the_same_in_all_tables_and_files_keep_keys(tmp_path):
    rng = np.random.default_rng(0)
    keys = [
        RowKeys(
            image_N=rng.integers(0, 20, 50).astype(np.uint64) << np.uint64(60),
            text_N=rng.integers(0, 9, 50).astype(np.uint64),
            tokens_N=np.zeros(50, dtype=np.uint64),
        )
        for _ in range(2)
    ]
    one, other = common_codes(keys)
    for name, code in (("image_N", "image"), ("text_N", "prompt")):
        same = getattr(keys[0], name)[:, None] == getattr(keys[1], name)
        np.testing.assert_array_equal(getattr(one, code)[:, None] == getattr(other, code), same)
    both = (one.image[:, None] == other.image) & (one.prompt[:, None] == other.prompt)
    np.testing.assert_array_equal(one.pair[:, None] == other.pair, both)
    write_keys(tmp_path / "rows.safetensors", keys[0])
    back = read_keys(tmp_path / "rows.safetensors", num_rows=50)
    assert back.known_by == "files"
    for name in ("image_N", "text_N", "tokens_N"):
        np.testing.assert_array_equal(getattr(back, name), getattr(keys[0], name))
    assert read_keys(tmp_path / "rows.safetensors", num_rows=49) is None
    assert read_keys(tmp_path / "none.safetensors", num_rows=50) is None
