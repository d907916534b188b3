"""Parameter groups: every parameter in one, and what must not decay does not."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from deltaclip.pipeline.loop.optimizer import AdamW, Moments, adamw_step, parameter_groups
from deltaclip.pipeline.model.heads import HeadSpec, build_heads


@pytest.mark.parametrize(
    "spec",
    [
        {"scale_mode": "learned"},
        {"scale_mode": "fixed"},
        {"kind": "direct"},
        {"kind": "direct", "two_branch": True, "refinement": True, "rationale": True},
    ],
)
def test_every_parameter_in_exactly_one_group(spec):
    heads = build_heads(HeadSpec(dim=6, **spec))
    groups = parameter_groups(heads, weight_decay=0.1)
    held = [id(parameter) for group in groups for parameter in group.parameters]
    assert sorted(held) == sorted(id(parameter) for parameter in heads.parameters())
    assert len(set(held)) == len(held)


def test_what_decays():
    heads = build_heads(HeadSpec(dim=6, scale_mode="learned"))
    names = {id(parameter): name for name, parameter in heads.named_parameters()}
    decayed, plain = parameter_groups(heads, weight_decay=0.1)
    assert decayed.weight_decay == 0.1
    assert plain.weight_decay == 0.0
    assert {names[id(p)] for p in decayed.parameters} == {
        *(f"quality_head.{name}.weight" for name in ("base", "mlp.wide", "mlp.out")),
        *(f"consistency_head.fusion.{name}.weight" for name in ("wide", "narrow", "out")),
    }


def test_decay_acts_on_weights_only():
    heads = build_heads(HeadSpec(dim=6, scale_mode="learned"))
    before = {name: parameter.detach().clone() for name, parameter in heads.named_parameters()}
    optimizer = AdamW(heads, weight_decay=0.5)
    for parameter in heads.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.1)
    for name, parameter in heads.named_parameters():
        decays = name.endswith("weight") and "norm" not in name
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if decays else 1))


def test_same_bits_as_torch():
    """Over steps, changing rates, and a head without gradients in some of them."""
    ours, theirs = (build_heads(HeadSpec(dim=6, scale_mode="learned")) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    mine = AdamW(ours, weight_decay=0.3)
    judge = torch.optim.AdamW(
        [
            {"params": group.parameters, "weight_decay": group.weight_decay}
            for group in parameter_groups(theirs, weight_decay=0.3)
        ],
        fused=True,
    )
    for step in range(7):
        for (name, parameter), its in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            missing = step % 3 == 1 and name.startswith("consistency_head.")
            parameter.grad = None if missing else torch.randn(parameter.shape)
            its.grad = None if missing else parameter.grad.clone()
        for group in judge.param_groups:
            group["lr"] = 0.01 * (step + 1)
        mine.step(0.01 * (step + 1))
        judge.step()
    for parameter, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(parameter, its)
        assert parameter.grad is None


@pytest.mark.slow
def test_training_does_not_import_the_compiler():
    """That takes seconds, longer than the training."""
    program = """
import sys, torch
from deltaclip.pipeline.model.losses import weighted_loss
from deltaclip.pipeline.model.heads import HeadSpec, build_heads
from deltaclip.pipeline.loop.batches import memory_batches
from deltaclip.pipeline.loop.epochs import FitPlan
from deltaclip.pipeline.loop.head_learner import fit
rows = torch.rand(8, 4)
labels = {"quality": rows[:, 0], "consistency": rows[:, 1]}
fit(build_heads(HeadSpec(dim=4)), memory_batches(rows, rows, labels),
    objective=weighted_loss(weights={"quality": 0.5, "consistency": 0.5}), plan=FitPlan(epochs=2))
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_frozen_parameters_are_left_out():
    heads = build_heads(HeadSpec(dim=6))
    heads.consistency_head.fusion.requires_grad_(requires_grad=False)
    groups = parameter_groups(heads, weight_decay=0.1)
    assert sum(len(group.parameters) for group in groups) == 2 + 4 + 2


def test_a_parameter_without_a_rule_is_an_error():
    module = torch.nn.Module()
    module.gain = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError) as caught:  # the whole text is compared
        parameter_groups(module, weight_decay=0.1)
    assert str(caught.value) == "no decay rule for parameter 'gain'; add one to DECAY_RULES"


@pytest.mark.parametrize("wrong", ["grad", "mean", "square"])
def test_another_layout_is_never_walked(wrong):
    """Torch's kernel would take the numbers of one place for those of another, and say nothing."""
    parameter = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    moments = Moments.of(parameter)
    tensors = {"grad": torch.ones_like(parameter), "mean": moments.mean, "square": moments.square}
    tensors[wrong] = tensors[wrong].contiguous()
    with pytest.raises(AssertionError, match=r"laid out as \(12, 4, 2, 1\), not \(12, 1, 6, 3\)"):
        adamw_step(
            [parameter],
            [tensors["grad"]],
            [Moments(tensors["mean"], tensors["square"], moments.num_steps)],
            lr=1.0,
            weight_decay=0.0,
        )
