"""Two-branch and refined direct heads against float64 formulas, and the bound of the refinement."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import erf, expit, logit, softmax

from deltaclip.pipeline.model.calibrate import LABEL_MARGIN, calibrate_branch
from deltaclip.pipeline.model.heads import BOUND, HEADS, LAYERS, WIDTH, DirectHeads, HeadSpec, Refinement, build_heads
from deltaclip.pipeline.model.scores import Batch

DIM = 12


def unit_rows(num_rows):
    return torch.nn.functional.normalize(torch.randn(num_rows, DIM), dim=1)


def direct_heads(**parts):
    return DirectHeads(HeadSpec(dim=DIM, kind="direct", **parts))


def scrambled(module, magnitude=0.1):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(magnitude * torch.randn(parameter.shape))
    return module.eval()


def norm(x, w, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def gelu(x):
    return x * 0.5 * (1 + erf(x / np.sqrt(2)))


def attention(x_3W, w, name):
    """Softmax(q k^T / sqrt(d)) v, head by head (Vaswani et al. 2017)."""
    q, k, v = np.split(x_3W @ w[f"{name}.in_proj_weight"].T + w[f"{name}.in_proj_bias"], 3, axis=1)
    size = WIDTH // HEADS
    parts = []
    for head in range(HEADS):
        cut = slice(head * size, (head + 1) * size)
        parts.append(softmax(q[:, cut] @ k[:, cut].T / np.sqrt(size), axis=1) @ v[:, cut])
    return linear(np.concatenate(parts, axis=1), w, f"{name}.out_proj")


def reference(module, v_D, t_D, c):
    """One row, three tokens, from the text of the specification."""
    w = {name: tensor.double().numpy() for name, tensor in module.state_dict().items()}
    x = np.stack([linear(v_D, w, "v_token"), linear(t_D, w, "t_token"), linear(np.array([c]), w, "c_token")])
    for layer in range(LAYERS):
        at = f"layers.{layer}"
        x = x + attention(norm(x, w, f"{at}.norm1"), w, f"{at}.self_attn")
        x = x + linear(gelu(linear(norm(x, w, f"{at}.norm2"), w, f"{at}.linear1")), w, f"{at}.linear2")
    return np.tanh(linear(norm(x[2], w, "norm"), w, "out")[0])


def test_refinement_is_a_transformer_over_three_tokens():
    module = scrambled(Refinement(DIM))
    v, t, c = unit_rows(4), unit_rows(4), torch.rand(4)
    with torch.no_grad():
        found = module(v, t, c).numpy()
    expected = [reference(module, *(x.double().numpy() for x in row)) for row in zip(v, t, c, strict=True)]
    # float32 against float64 through four layers of width 256
    np.testing.assert_allclose(found, expected, atol=5e-4)
    assert np.abs(found).max() > 0.01


def test_the_shape_is_that_of_the_specification():
    module = Refinement(DIM)
    assert (len(module.layers), module.layers[0].self_attn.num_heads, module.norm.normalized_shape) == (4, 8, (256,))


@pytest.mark.parametrize("token", ["v", "t", "c"])
def test_every_token_matters(token):
    module = scrambled(Refinement(DIM))
    rows = {"v": unit_rows(8), "t": unit_rows(8), "c": torch.rand(8)}
    with torch.no_grad():
        before = module(*rows.values())
        rows[token] = rows[token].flip(0)
        assert ((module(*rows.values()) - before).abs() > 1e-5).any()


@pytest.mark.parametrize("bound", [0.0, 0.05, 0.2, 1.0])
@pytest.mark.parametrize("magnitude", [0.1, 10.0])
def test_the_correction_keeps_its_bound(bound, magnitude):
    heads = scrambled(build_heads(HeadSpec(dim=DIM, kind="direct", refinement=True, refine_bound=bound)), magnitude)
    with torch.no_grad():
        scores = heads(unit_rows(200), unit_rows(200))
    found = scores.targets["consistency"]
    assert ((found.reported.double() - found.base_N.double()).abs() <= found.scale.double()).all()
    assert ((found.reported >= 0) & (found.reported <= 1)).all()
    assert (found.delta_N.abs() <= 1).all()
    assert scores.targets["quality"].base_N is None


def test_new_refinement_leaves_the_coarse_score():
    heads = direct_heads(refinement=True).eval()
    found = heads(unit_rows(8), unit_rows(8)).targets["consistency"]
    assert torch.equal(found.reported, found.base_N)
    (found.sum_N - 0.9).square().sum().backward()
    assert heads.consistency_head.refinement.out.weight.grad.any()


@pytest.mark.parametrize("refinement", [False, True])
def test_two_branches_are_averaged(refinement):
    heads = scrambled(direct_heads(two_branch=True, refinement=refinement))
    one = direct_heads().eval()
    one.load_state_dict(heads.state_dict(), strict=False)
    v, t = unit_rows(30), unit_rows(30)
    with torch.no_grad():
        both = heads(v, t).targets["consistency"]
        mlp = one(v, t).targets["consistency"].sum_N.double().numpy()
    head = heads.consistency_head
    k, m = float(head.cosine_slope.detach()), float(head.cosine_offset.detach())
    expected = (mlp + expit(k * (v.double() * t.double()).sum(1).numpy() + m)) / 2
    np.testing.assert_allclose(both.base_N if refinement else both.sum_N, expected, atol=1e-6)


def test_the_cosine_branch_starts_at_least_squares():
    v, t, c = unit_rows(50), unit_rows(50), torch.rand(50)
    c[:2], c[2:9] = torch.tensor([0.0, 1.0]), torch.nan
    heads = direct_heads(two_branch=True)
    nothing = torch.full((50,), torch.nan)
    batch = Batch(v, t, {"quality": nothing, "consistency": c})
    batches = [batch.map(lambda x: x[:20]), batch.map(lambda x: x[20:])]
    told = calibrate_branch(heads, lambda: batches)
    assert list(told) == ["consistency"]
    found = told["consistency"]
    s, kept = (v.double() * t.double()).sum(1).numpy(), ~c.isnan().numpy()
    slope, offset = np.polyfit(s[kept], logit(np.clip(c.double().numpy()[kept], LABEL_MARGIN, 1 - LABEL_MARGIN)), 1)
    assert (found["num_rows"], found["slope"]) == (43, pytest.approx(slope))
    assert found["offset"] - found["level"] == pytest.approx(offset)
    said = expit(found["slope"] * s[kept] + found["offset"])
    assert said.mean() == pytest.approx(float(c[~c.isnan()].double().mean()), abs=1e-9)
    head = heads.consistency_head
    assert float(head.cosine_slope.detach()) == pytest.approx(slope, rel=1e-6)
    assert float(head.cosine_offset.detach()) == pytest.approx(found["offset"], rel=1e-6)
    untouched = direct_heads(two_branch=True)
    nobody = batch._replace(label_B={"quality": nothing, "consistency": nothing})
    assert calibrate_branch(untouched, lambda: [nobody])["consistency"]["slope"] is None
    assert float(untouched.consistency_head.cosine_slope.detach()) == 10


@pytest.mark.parametrize("name", ["two_branch", "refinement"])
def test_residual_heads_refuse_direct_parts(name):
    with pytest.raises(ValueError) as caught:
        HeadSpec(dim=4, **{name: True})
    assert str(caught.value) == f"{name} needs direct heads, these are residual"


def test_the_default_bound_is_that_of_the_residual_scales():
    assert {target.scale for target in HeadSpec(dim=4).targets} == {BOUND}
