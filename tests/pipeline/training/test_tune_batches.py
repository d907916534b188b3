"""The parts of a step: their losses, weighted by rows, are the loss of the step."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from deltaclip.pipeline.loop.batches import memory_batches
from deltaclip.pipeline.model.heads import HeadSpec, build_heads
from deltaclip.pipeline.model.losses import weighted_loss
from deltaclip.pipeline.model.scores import run_heads
from deltaclip.pipeline.training.processes import Processes
from deltaclip.pipeline.training.tower_model import Entries, SideBatches

ROWS, DIM = 41, 8


class NoTower:
    """A side whose tower is given nothing: entry e has the embedding that is cached of row e."""

    def entries(self, entry_B, _epoch):
        return Entries(torch.empty(0), torch.from_numpy(entry_B), None, all_have=True)


def steps_in(parts, *, loss, weighted):
    draw = torch.Generator().manual_seed(0)
    v, t = (F.normalize(torch.randn(ROWS, DIM, generator=draw), dim=1) for _ in range(2))
    q, c = (torch.rand(ROWS, generator=draw) for _ in range(2))
    q[5:30], c[33:] = torch.nan, torch.nan  # most rows lack one of their labels
    labels = {"quality": q, "consistency": c}
    columns = {"weight_B": {target: torch.rand(ROWS, generator=draw) for target in labels}} if weighted else None
    memory = memory_batches(v, t, labels, batch_size=21, columns_N=columns)
    torch.manual_seed(0)
    heads = build_heads(HeadSpec(dim=DIM)).eval()
    objective = weighted_loss(loss, weights=dict.fromkeys(labels, 0.5))
    entries = torch.arange(ROWS).numpy()
    batches = SideBatches(
        memory=memory,
        image_N=entries,
        prompt_N=entries,
        image=NoTower(),
        text=None,
        device=torch.device("cpu"),
        parts=parts,
        processes=Processes(),
        by_row=True,
    )
    losses = []
    for step in batches(1):
        assert len(step) == parts
        num_rows = sum(len(part) for part in step)
        assert all(part.batch.v_BD.shape == (len(part), 0) for part in step)  # the tower makes them
        batches_of = [part.batch._replace(v_BD=v[part.images.index_B]) for part in step]
        found = [objective(run_heads(heads, batch), batch) * batch.num_rows / num_rows for batch in batches_of]
        losses.append(sum(found).item())
    return losses


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_rows_without_a_label_weigh_in_parts_what_they_weigh_in_the_whole(loss, weighted):
    whole = steps_in(1, loss=loss, weighted=weighted)
    assert len(whole) == 2
    for parts in (2, 7, 20):
        assert steps_in(parts, loss=loss, weighted=weighted) == pytest.approx(whole, rel=1e-5)
