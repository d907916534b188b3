"""The explanation head: its loss, its mask, and what it shares with the consistency head."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deltaclip.pipeline.model.heads import HeadSpec, RationaleHead, build_heads, rationale_loss
from deltaclip.pipeline.model.losses import weighted_loss
from deltaclip.pipeline.model.scores import Batch

DIM = 6
KINDS = ["residual", "direct"]


def unit_rows(num_rows):
    return torch.nn.functional.normalize(torch.randn(num_rows, DIM), dim=1)


def targets(num_rows, explained):
    e = unit_rows(num_rows)
    e[torch.randperm(num_rows)[explained:]] = torch.nan
    return e


@pytest.mark.parametrize("explained", [0, 1, 7, 20])
def test_loss_is_the_mean_square_over_explained_rows(explained):
    predicted, target = torch.randn(20, DIM, dtype=torch.float64, requires_grad=True), targets(20, explained).double()
    loss = rationale_loss(predicted, target)
    loss.backward()
    kept = ~np.isnan(target.numpy()[:, 0])
    error = np.where(kept[:, None], predicted.detach().numpy() - np.nan_to_num(target.numpy()), 0)
    count = max(explained, 1) * DIM
    assert loss.item() == pytest.approx((error**2).sum() / count, rel=1e-12)
    np.testing.assert_allclose(predicted.grad, 2 * error / count, rtol=1e-12)
    if explained == 20:
        judge = torch.nn.functional.mse_loss(predicted, target)
        assert loss.item() == pytest.approx(judge.item(), rel=1e-12)


def batch_of(num_rows, explained):
    labels = dict(zip(("quality", "consistency"), torch.rand(2, num_rows), strict=True))
    return Batch(unit_rows(num_rows), unit_rows(num_rows), labels, e_BD=targets(num_rows, explained))


HALF = {"quality": 0.5, "consistency": 0.5}


def gradients(heads, batch, *, w_exp=0.0):
    heads.zero_grad()
    weighted_loss("mse", weights=HALF, w_exp=w_exp)(heads(batch.v_BD, batch.t_BD), batch).backward()
    return {name: parameter.grad for name, parameter in heads.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_explanation_leave_the_rationale_head_alone(kind):
    heads = build_heads(HeadSpec(dim=DIM, kind=kind, rationale=True, dropout=0.0)).train()
    none = gradients(heads, batch_of(8, 0), w_exp=0.1)
    assert not none["consistency_head.rationale.out.weight"].any()
    assert not none["consistency_head.rationale.out.bias"].any()
    batch = batch_of(8, 3)
    some = gradients(heads, batch, w_exp=0.1)
    kept = ~batch.e_BD[:, 0].isnan()
    alone = gradients(heads, batch.map(lambda x: x[kept]), w_exp=0.1)
    torch.testing.assert_close(
        some["consistency_head.rationale.out.weight"], alone["consistency_head.rationale.out.weight"]
    )
    assert some["consistency_head.rationale.out.weight"].any()


@pytest.mark.parametrize("kind", KINDS)
def test_explanations_teach_the_layer_that_consistency_reads(kind):
    heads = build_heads(HeadSpec(dim=DIM, kind=kind, rationale=True, dropout=0.0)).train()
    batch = batch_of(8, 8)
    with_them, without = gradients(heads, batch, w_exp=5.0), gradients(heads, batch)
    assert not torch.allclose(
        with_them["consistency_head.fusion.wide.weight"], without["consistency_head.fusion.wide.weight"]
    )
    quality = [name for name in with_them if name.startswith("quality_head.")]
    assert quality
    assert all(torch.equal(with_them[name], without[name]) for name in quality)
    assert torch.equal(with_them["consistency_head.fusion.out.weight"], without["consistency_head.fusion.out.weight"])


@pytest.mark.parametrize("spec", [{}, {"kind": "direct"}, {"kind": "direct", "two_branch": True, "refinement": True}])
def test_scores_are_the_same_with_a_rationale_head(spec):
    plain = build_heads(HeadSpec(dim=DIM, dropout=0.0, **spec))
    heads = build_heads(HeadSpec(dim=DIM, dropout=0.0, rationale=True, **spec))
    heads.load_state_dict(plain.state_dict(), strict=False)
    v, t = unit_rows(5), unit_rows(5)
    for mode in (True, False):
        expected, found = plain.train(mode)(v, t), heads.train(mode)(v, t)
        for target in HALF:
            assert torch.equal(found.of(target), expected.of(target))
        assert (found.e_ND is None) is not mode  # only the loss reads it
        assert expected.e_ND is None


def test_prediction_is_linear_in_the_shared_layer():
    heads = build_heads(HeadSpec(dim=DIM, rationale=True, dropout=0.0)).train()
    rationale, layers = heads.consistency_head.rationale, heads.consistency_head.fusion
    assert isinstance(rationale, RationaleHead)
    v, t = unit_rows(5), unit_rows(5)
    x = torch.cat((v, t, (v * t).sum(1, keepdim=True)), dim=1)
    hidden = torch.nn.functional.gelu(layers.wide(layers.norm(x)))
    expected = hidden @ rationale.out.weight.T + rationale.out.bias
    torch.testing.assert_close(heads(v, t).e_ND, expected)


def test_the_random_start_of_the_scores_does_not_depend_on_it():
    states = []
    for rationale in (False, True):
        torch.manual_seed(3)
        states.append(build_heads(HeadSpec(dim=DIM, rationale=rationale)).state_dict())
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())
    assert states[1].keys() - states[0].keys() == {
        "consistency_head.rationale.out.weight",
        "consistency_head.rationale.out.bias",
    }


def test_refusals():
    with pytest.raises(ValueError, match=r"^w_exp must not be negative, got -1$"):
        weighted_loss("mse", weights=HALF, w_exp=-1)
    batch = batch_of(4, 4)
    with pytest.raises(ValueError, match=r"^w_exp needs heads with a rationale, and batches with explanations$"):
        gradients(build_heads(HeadSpec(dim=DIM)).train(), batch, w_exp=0.1)
