"""A cache as tensors: the right embedding with the right label, in float32 whatever is stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltaclip.features.store.reader import FeatureStore
from deltaclip.pipeline.rows.cached_rows import load_rows


@pytest.fixture(scope="module")
def rows(demo_cache):
    return load_rows(demo_cache, "cpu")


def test_rows_are_those_of_the_manifest(rows, demo_rows):
    assert rows.rows.text["file"].tolist() == [row["image"] for row in demo_rows]
    for label in ("quality", "consistency"):
        assert rows.label(label) == pytest.approx([float(row[label]) for row in demo_rows], abs=1e-6)


def test_cosine_is_that_of_the_stored_embeddings(rows, demo_cache):
    with FeatureStore.open(demo_cache) as store:
        index = store.rows()
        v, t = (store.embeddings(kind).astype(np.float64) for kind in ("images", "texts"))
    assert rows.cosine() == pytest.approx((v[index.image] * t[index.prompt]).sum(axis=1), abs=1e-6)


def test_batches_hold_the_chosen_rows(rows):
    chosen = np.array([5, 0, 200])
    (batch,) = rows.batches(chosen, batch_size=8).in_order()
    assert batch.v_BD.dtype == batch.t_BD.dtype == torch.float32
    assert batch.label_B["quality"].tolist() == rows.label("quality")[chosen].tolist()
    assert batch.label_B["consistency"].tolist() == rows.label("consistency")[chosen].tolist()
    assert torch.equal(batch.v_BD, rows.v_ID[rows.rows.image[chosen]].float())
    assert torch.equal(batch.t_BD, rows.t_TD[rows.rows.prompt[chosen]].float())
    assert rows.dim == batch.v_BD.shape[1]


def test_explanations_are_those_of_the_rows(rows, demo_rows):
    (batch,) = rows.batches(None, batch_size=8, explanations=True).in_order()
    said = np.array([bool(row["explanation"]) for row in demo_rows])
    assert 0 < said.sum() < len(said)
    assert torch.equal(~batch.e_BD[:, 0].isnan(), torch.from_numpy(said))
    index = rows.rows.explanation[said]
    assert torch.equal(batch.e_BD[torch.from_numpy(said)], rows.t_TD[index].float())
    (plain,) = rows.batches(None, batch_size=8).in_order()
    assert plain.e_BD is None
