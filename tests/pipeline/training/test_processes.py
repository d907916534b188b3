"""Gradients that processes exchange: summed, and still laid out in memory as their parameters."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch
import torch.distributed as dist
from torch import nn

from deltaclip.base.errors import UserError
from deltaclip.pipeline.loop.optimizer import laid_out_like, same_layout
from deltaclip.pipeline.training.processes import OneVoice, Processes
from deltaclip.tests.pipeline.conftest import TORCHRUN


@pytest.fixture
def _a_group():
    """A real group of one process: what it sends comes back as it is."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def layers():
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(6, 8, 3), nn.Conv2d(8, 8, 7, groups=8), nn.Conv2d(8, 4, 1)]
    model = nn.Sequential(*convolutions).to(memory_format=torch.channels_last)
    return model, nn.Linear(4, 3)


@pytest.mark.usefixtures("_a_group")
@pytest.mark.parametrize(("exchange", "size"), [("sum_gradients", 1), ("mean_gradients", 2)])
def test_gradients_come_back_laid_out_as_their_parameters(exchange, size):
    model, head = layers()
    unused = nn.Parameter(torch.ones(3))
    parameters = [*model.parameters(), *head.parameters(), unused]
    head(model(torch.randn(2, 6, 12, 12)).mean((2, 3))).square().sum().backward()
    before = [None if p.grad is None else p.grad.clone() for p in parameters]
    getattr(Processes(rank=0, size=2), exchange)(parameters)
    for parameter, grad in zip(parameters[:-1], before, strict=False):
        torch.testing.assert_close(parameter.grad, grad / size, rtol=0, atol=0)
        assert same_layout(parameter.grad, parameter)
    assert unused.grad is None  # a gradient of zeros would let it decay


def test_layouts_are_told_apart():
    channels_last = torch.empty(4, 3, 2, 2).to(memory_format=torch.channels_last)
    values = torch.arange(48.0)
    copy = laid_out_like(channels_last, values)
    assert copy.stride() == channels_last.stride()
    assert torch.equal(copy.reshape(-1), values)
    assert not same_layout(channels_last, values.view(4, 3, 2, 2))
    assert not same_layout(torch.empty(2, 3), torch.empty(3, 2))
    one_channel = torch.empty(4, 1, 2, 2)
    assert same_layout(one_channel, torch.empty_strided((4, 1, 2, 2), (4, 1, 2, 1)))
    with pytest.raises(RuntimeError):
        laid_out_like(channels_last, torch.zeros(47))


def torchrun(*words):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*TORCHRUN, *words], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_what_stops_all_processes_is_told_once(tmp_path):
    done = torchrun("finetune", str(tmp_path / "nothing.h5"))
    assert done.returncode
    assert done.stderr.count("deltaclip: ") == 1
    assert f"deltaclip: {tmp_path / 'nothing.h5'}: no such cache; " in done.stderr


def test_variables_of_torchrun_that_lack_are_named(monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError) as error, OneVoice():
        pass
    assert str(error.value) == (
        "WORLD_SIZE: is '4' and RANK is not set; unset it, or start the processes with torchrun"
    )


def test_an_error_before_the_processes_have_joined_is_the_firsts_to_tell(monkeypatch):
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for rank, is_silent in (("0", False), ("1", True)):
        for name, value in (variables | {"RANK": rank}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError) as error, OneVoice():
            raise UserError("wrong")
        assert getattr(error.value, "is_silent", False) is is_silent
