"""Batches in memory: every row once, in an order that (seed, epoch) decides."""

from __future__ import annotations

import pytest
import torch

from deltaclip.pipeline.loop.batches import memory_batches


def rows(num_rows, batch_size, seed=0):
    number = torch.arange(num_rows, dtype=torch.float32)
    v = number[:, None].expand(num_rows, 3)
    labels = {"quality": number, "consistency": number + 0.25}
    return memory_batches(v, v + 0.5, labels, batch_size=batch_size, seed=seed)


@pytest.mark.parametrize(("num_rows", "batch_size"), [(1, 64), (63, 64), (64, 64), (65, 64), (2100, 64), (7, 1)])
def test_every_row_once(num_rows, batch_size):
    batches = rows(num_rows, batch_size)
    epoch = list(batches(1))
    assert len(epoch) == batches.steps_per_epoch
    for first in {0, 1, len(epoch) - 1, len(epoch)}:
        left = list(batches(1, first=first))
        assert len(left) == len(epoch) - first
        assert all(torch.equal(a.v_BD, b.v_BD) for a, b in zip(left, epoch[first:], strict=True))
    sizes = [batch.num_rows for batch in epoch]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1
    assert sorted(torch.cat([batch.label_B["quality"] for batch in epoch]).tolist()) == list(range(num_rows))
    for batch in epoch:
        assert torch.equal(batch.v_BD[:, 0], batch.label_B["quality"])
        assert torch.equal(batch.t_BD[:, 2], batch.label_B["quality"] + 0.5)
        assert torch.equal(batch.label_B["consistency"], batch.label_B["quality"] + 0.25)


def test_order_depends_on_seed_and_epoch():
    def order(seed, epoch):
        return [int(x) for batch in rows(100, 16, seed)(epoch) for x in batch.label_B["quality"]]

    assert order(1, 1) == order(1, 1)
    assert order(1, 1) != order(1, 2)
    assert order(1, 1) != order(2, 1)
    assert order(1, 2) != order(2, 1)


@pytest.mark.parametrize("block", [1, 9, 10, 11, 4096])
def test_in_order(block):
    assert [int(x) for batch in rows(10, 4).in_order(block) for x in batch.label_B["quality"]] == list(range(10))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_deduplicated_embeddings_of_any_precision(dtype):
    v_ID = torch.tensor([[10.0, 10.0], [11.0, 11.0]], dtype=dtype)
    t_MD = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]], dtype=dtype)
    images, texts = torch.tensor([1, 1, 0, 1, 0]), torch.tensor([2, 0, 1, 1, 2])
    number = torch.arange(5.0)
    batches = memory_batches(
        v_ID, t_MD, {"quality": number}, image_index_N=images, text_index_N=texts, batch_size=2, seed=0
    )
    for batch in [*batches(1), *batches.in_order(3)]:
        rows = batch.label_B["quality"].long()
        assert batch.v_BD.dtype == batch.t_BD.dtype == torch.float32
        assert torch.equal(batch.v_BD[:, 0], images[rows] + 10.0)
        assert torch.equal(batch.t_BD[:, 1], texts[rows].float())


def test_further_columns_follow_their_rows():
    number = torch.arange(10.0)
    rows, labels = number[:, None], {"quality": number, "consistency": number}
    columns = {"std_B": {"quality": number + 0.5}}
    batches = memory_batches(rows, rows, labels, columns_N=columns, batch_size=4, seed=0)
    for batch in [*batches(1), *batches.in_order(3)]:
        assert batch.std_B.keys() == {"quality"}
        assert torch.equal(batch.std_B["quality"], batch.label_B["quality"] + 0.5)
        assert batch.weight_B == batch.fitted_B == {}
    with pytest.raises(ValueError, match=r"^10 image rows but 9 values of std_B of quality$"):
        memory_batches(rows, rows, labels, columns_N={"std_B": {"quality": number[:9]}})


def test_explanations_are_texts_and_nan_where_there_is_none():
    number = torch.arange(10.0)
    t_MD, index = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float16), torch.tensor([0, -1] * 5)
    texts = torch.zeros(10, dtype=torch.long)
    batches = memory_batches(
        t_MD[texts], t_MD, {"quality": number}, text_index_N=texts, explanation_index_N=index, batch_size=3
    )
    for batch in [*batches(1), *batches.in_order(4)]:
        even = batch.label_B["quality"] % 2 == 0
        assert batch.e_BD.dtype == torch.float32
        assert torch.equal(batch.e_BD[even], torch.zeros(int(even.sum()), 2))
        assert batch.e_BD[~even].isnan().all()
    with pytest.raises(ValueError, match=r"^10 image rows but 9 explanations$"):
        memory_batches(t_MD[texts], t_MD[texts], {"quality": number}, explanation_index_N=index[:9])


@pytest.mark.parametrize(
    ("shapes", "batch_size", "message"),
    [
        (((5, 2), (4, 2), 5, 5), 2, "5 image rows but 4 text rows"),
        (((5, 2), (5, 2), 5, 6), 2, "5 image rows but 6 labels of consistency"),
        (((4, 2), (5, 2), 5, 5), 2, "4 image rows but 5 text rows"),
        (((4, 2), (4, 2), 5, 5), 2, "4 image rows but 5 labels of quality"),
        (((0, 2), (0, 2), 0, 0), 2, "there is no row to train on"),
        (((5, 2), (5, 3), 5, 5), 2, "image embeddings have width 2, text embeddings 3"),
        (((5, 2), (5, 2), 5, 5), 0, "batch_size must be at least 1, not 0"),
    ],
)
def test_refusals(shapes, batch_size, message):
    v, t, quality, consistency = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError) as caught:  # the whole text is compared
        memory_batches(v, t, {"quality": quality, "consistency": consistency}, batch_size=batch_size)
    assert str(caught.value) == message
