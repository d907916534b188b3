"""Batches from a file: every row once, the order drawn from (seed, epoch), and in order the same as from memory."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaclip.pipeline.loop.batches import BLOCKS_PER_WINDOW, StreamBatches, memory_batches
from deltaclip.pipeline.model.calibrate import calibrate
from deltaclip.pipeline.model.heads import HeadSpec, build_heads

NUM_TEXTS, DIM = 7, 3


class Vectors:
    """Vectors that say which entry they are of, and what was read of them."""

    def __init__(self, count):
        self.vectors = torch.arange(count, dtype=torch.float16)[:, None].expand(count, DIM).contiguous()
        self.reads = []

    def __call__(self, entries):
        assert (np.diff(entries) > 0).all()
        self.reads.append(entries)
        return self.vectors[torch.from_numpy(entries)]


def stream(num_rows, *, batch_size=4, window_rows=64, seed=0, images=None, explanations=None, **columns):
    number = torch.arange(num_rows, dtype=torch.float32)
    image = np.arange(num_rows) if images is None else images
    return StreamBatches(
        read_images=Vectors(num_rows),
        read_texts=Vectors(NUM_TEXTS),
        device=torch.device("cpu"),
        label_N={"quality": number, "consistency": number + 0.25},
        image_index_N=image,
        text_index_N=np.arange(num_rows) % NUM_TEXTS,
        batch_size=batch_size,
        seed=seed,
        window_rows=window_rows,
        explanation_index_N=explanations,
        columns_N=columns,
    )


def check(batches, num_rows, image):
    """Every row once, with what belongs to it."""
    rows = torch.cat([batch.label_B["quality"] for batch in batches]).long()
    assert sorted(rows.tolist()) == list(range(num_rows))
    for batch in batches:
        own = batch.label_B["quality"].long()
        assert batch.v_BD.dtype == batch.t_BD.dtype == torch.float32
        assert torch.equal(batch.v_BD[:, 0], torch.from_numpy(image)[own].float())
        assert torch.equal(batch.t_BD[:, -1], (own % NUM_TEXTS).float())
        assert torch.equal(batch.label_B["consistency"], batch.label_B["quality"] + 0.25)
    return rows


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.integers(1, 150),
    batch_size=st.integers(1, 40),
    window_rows=st.integers(1, 160),
    repeats=st.integers(1, 3),
)
def test_every_row_once_whatever_the_sizes(num_rows, batch_size, window_rows, repeats):
    image = np.random.default_rng(num_rows).permutation(num_rows) // repeats
    batches = stream(num_rows, batch_size=batch_size, window_rows=window_rows, images=image)
    found = list(batches(repeats))
    check(found, num_rows, image)
    left = list(batches(repeats, first=len(found) // 2))
    assert all(torch.equal(a.v_BD, b.v_BD) for a, b in zip(left, found[len(found) // 2 :], strict=True))
    sizes = [batch.num_rows for batch in found]
    assert len(found) == batches.steps_per_epoch
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert torch.equal(check(list(batches.in_order(batch_size)), num_rows, image), torch.arange(num_rows))


@pytest.mark.parametrize("num_rows", [63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("window_rows", [63, 64, 65])
def test_at_the_borders_of_windows(num_rows, window_rows):
    batches = stream(num_rows, batch_size=64, window_rows=window_rows)
    check(list(batches(1)), num_rows, np.arange(num_rows))
    check(list(batches.in_order(64)), num_rows, np.arange(num_rows))


def test_order_depends_on_seed_and_epoch():
    def order(seed, epoch):
        return [int(x) for batch in stream(300, seed=seed)(epoch) for x in batch.label_B["quality"]]

    assert order(1, 1) == order(1, 1)
    assert order(1, 1) != order(1, 2)
    assert order(1, 1) != order(2, 1)
    assert order(1, 2) != order(2, 1)


def test_a_batch_mixes_rows_from_all_over_and_a_window_is_read_in_stretches():
    num_rows, window = 64_000, 6_400
    batches = stream(num_rows, batch_size=100, window_rows=window)
    spread = np.array(
        [[told.min(), told.max(), told.std()] for told in (batch.label_B["quality"] for batch in batches(1))]
    )
    # 100 rows of a perfect shuffle: SD 18,475; of neighbours: 29; of one block: 58.
    assert spread[:, 2].min() > 10_000
    assert np.median(spread[:, 2]) == pytest.approx(num_rows / 12**0.5, rel=0.1)
    reads = batches.read_images.reads
    assert [len(read) for read in reads] == [window] * 10
    assert all((np.diff(read) > 1).sum() < BLOCKS_PER_WINDOW for read in reads)
    # Which rows share a window changes from epoch to epoch.
    first = set(reads[0].tolist())
    list(batches(2))
    assert max(len(first & set(read.tolist())) for read in batches.read_images.reads[10:]) < 0.5 * window


def test_in_order_is_what_memory_gives_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    v = torch.nn.functional.normalize(torch.randn(500, 8, generator=generator), dim=1)
    t = torch.nn.functional.normalize(torch.randn(40, 8, generator=generator), dim=1)
    q, c = torch.rand(500, generator=generator), torch.rand(500, generator=generator)
    q[::7] = torch.nan
    image, text = np.arange(500), np.random.default_rng(0).integers(40, size=500)
    explanation = np.where(np.arange(500) % 3, -1, (text + 1) % 40)
    labels, columns = {"quality": q, "consistency": c}, {"std_B": {"quality": q + 1}}
    from_memory = memory_batches(
        v,
        t,
        labels,
        image_index_N=torch.from_numpy(image),
        text_index_N=torch.from_numpy(text),
        explanation_index_N=torch.from_numpy(explanation),
        columns_N=columns,
    )
    for window_rows in (63, 64, 65, 499, 500, 501):
        from_file = StreamBatches(
            read_images=lambda entries: v[torch.from_numpy(entries)],
            read_texts=lambda entries: t[torch.from_numpy(entries)],
            device=torch.device("cpu"),
            label_N=labels,
            image_index_N=image,
            text_index_N=text,
            explanation_index_N=explanation,
            columns_N=columns,
            batch_size=64,
            seed=42,
            window_rows=window_rows,
        )
        for pair in zip(from_memory.in_order(64), from_file.in_order(64), strict=True):
            ours, theirs = (batch.map(lambda x: x.nan_to_num(9)) for batch in pair)
            for name in ("v_BD", "t_BD", "e_BD"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name))
            for name in ("label_B", "std_B"):
                mine, its = getattr(ours, name), getattr(theirs, name)
                assert mine.keys() == its.keys()
                assert all(torch.equal(mine[target], its[target]) for target in mine)
        both = [build_heads(HeadSpec(dim=8)) for _ in range(2)]
        told = [
            calibrate(heads, partial(source.in_order, 64))
            for heads, source in zip(both, (from_memory, from_file), strict=True)
        ]
        assert told[0] == told[1]
        assert torch.equal(both[0].quality_head.base.weight, both[1].quality_head.base.weight)
        shuffled = torch.cat([batch.std_B["quality"] - batch.label_B["quality"] for batch in from_file(1)])
        assert ((shuffled - 1).abs().nan_to_num(0) < 1e-6).all()


def test_windows_are_of_equal_size():
    batches = stream(
        65 * 2, batch_size=5, window_rows=2 * BLOCKS_PER_WINDOW
    )  # 65 blocks: 22, 22 and 21, not 32, 32 and 1
    check(list(batches(1)), 130, np.arange(130))
    assert [len(read) for read in batches.read_images.reads] == [44, 44, 42]


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match=r"^there is no row to train on$"):
        stream(0)
