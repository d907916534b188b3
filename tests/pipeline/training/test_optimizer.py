"""Parameter groups: every parameter in one, and what must not decay does not."""

from __future__ import annotations

import pytest
import torch

from deltaclip.pipeline.model.spec import HeadSpec, build_heads
from deltaclip.pipeline.training.optimizer import make_adamw, parameter_groups


@pytest.mark.parametrize("spec", [{"scale_mode": "learned"}, {"scale_mode": "fixed"}, {"kind": "direct"}])
def test_every_parameter_in_exactly_one_group(spec):
    heads = build_heads(HeadSpec(dim=6, **spec))
    groups = parameter_groups(heads, weight_decay=0.1)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in heads.parameters())
    assert len(set(held)) == len(held)


def test_what_decays():
    heads = build_heads(HeadSpec(dim=6, scale_mode="learned"))
    names = {id(parameter): name for name, parameter in heads.named_parameters()}
    decayed, plain = parameter_groups(heads, weight_decay=0.1)
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    assert {names[id(p)] for p in decayed["params"]} == {
        *("q_base.weight", "q_mlp.wide.weight", "q_mlp.out.weight"),
        *("c_fusion.wide.weight", "c_fusion.narrow.weight", "c_fusion.out.weight"),
    }


def test_decay_acts_on_weights_only():
    heads = build_heads(HeadSpec(dim=6, scale_mode="learned"))
    before = {name: parameter.detach().clone() for name, parameter in heads.named_parameters()}
    optimizer = make_adamw(heads, lr=0.1, weight_decay=0.5)
    for parameter in heads.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in heads.named_parameters():
        decays = name.endswith("weight") and "norm" not in name
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if decays else 1))


def test_frozen_parameters_are_left_out():
    heads = build_heads(HeadSpec(dim=6))
    heads.c_fusion.requires_grad_(requires_grad=False)
    groups = parameter_groups(heads, weight_decay=0.1)
    assert sum(len(group["params"]) for group in groups) == 2 + 4 + 2


def test_a_parameter_without_a_rule_is_an_error():
    module = torch.nn.Module()
    module.gain = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError) as caught:  # the whole text is compared
        parameter_groups(module, weight_decay=0.1)
    assert str(caught.value) == "no decay rule for parameter 'gain'; add one to DECAY_RULES"
