"""The loop that trains heads and towers: what it keeps, and that an interrupted run is an unbroken one."""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deltaclip.base.errors import UserError
from deltaclip.pipeline.loop.epochs import StateFile, Validation, seeded
from deltaclip.pipeline.loop.tower_learner import TunePlan, trained_tensors, tune, tuning_groups
from deltaclip.pipeline.model.heads import HeadSpec, build_heads
from deltaclip.pipeline.model.losses import weighted_loss
from deltaclip.pipeline.model.scores import Batch, run_heads

ROWS, DIM = 48, 8
PLAN = TunePlan(epochs=4, lr=1e-2, head_lr=1e-2, warmup_ratio=0.1)


class Part(NamedTuple):
    x: torch.Tensor
    batch: Batch

    def __len__(self):
        return len(self.x)


class Tower:
    """Three blocks of which the first is frozen."""

    depth = 3

    def __init__(self):
        self.blocks = nn.ModuleDict({f"block{number}": nn.Linear(DIM, DIM) for number in (1, 2, 3)})
        self.blocks["block1"].requires_grad_(False)

    def named_trainable(self):
        return {name: p for name, p in self.blocks.named_parameters() if p.requires_grad}

    def block_of(self, name):
        return int(name[len("block")])

    def __call__(self, x):
        for block in self.blocks.values():
            x = torch.tanh(block(x))
        return x


class Model:
    """Heads over a tower, as `finetune` has them."""

    def __init__(self, dropout=0.1):
        self.heads = build_heads(HeadSpec(dim=DIM, dropout=dropout))
        self.tower = Tower()
        self.towers = [self.tower]
        self.objective = weighted_loss(weights={"quality": 0.5, "consistency": 0.5})
        self.calls = 0

    def loss(self, part):
        self.calls += 1
        batch = part.batch._replace(v_BD=F.normalize(self.tower(part.x), dim=1))
        return self.objective(run_heads(self.heads, batch), batch)

    def share_gradients(self):
        pass


class Steps:
    """Rows in memory; `stop_at` ends the process's part as a kill would, after so many steps in all."""

    def __init__(self, batch_size=8, parts=1, rows=ROWS):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(rows, DIM, generator=generator)
        self.t = F.normalize(torch.randn(rows, DIM, generator=generator), dim=1)
        self.q = torch.sigmoid(self.x[:, 0])
        self.c = torch.sigmoid(self.x[:, 1] + self.t[:, 0])
        self.batch_size, self.parts, self.stop_at, self.given = batch_size, parts, None, 0

    @property
    def steps_per_epoch(self):
        return len(self.x) // self.batch_size

    def __call__(self, epoch, *, first=0):
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(epoch))
        for rows in order.tensor_split(self.steps_per_epoch)[first:]:
            if self.given == self.stop_at:
                raise InterruptedError
            self.given += 1
            yield [self.part(part) for part in rows.tensor_split(self.parts)]

    def part(self, rows):
        nothing = torch.zeros(len(rows), DIM)
        labels = {"quality": self.q[rows], "consistency": self.c[rows]}
        return Part(self.x[rows], Batch(nothing, self.t[rows], labels))


def train(steps=None, *, plan=PLAN, state=None, validate=None, dropout=0.1, **kwargs):
    with seeded(3):
        model = Model(dropout)
        result = tune(
            model,
            steps or Steps(),
            plan=plan,
            state=state,
            validate=validate and (lambda: validate(model)),
            **kwargs,
        )
    return model, result


def losses(result):
    return [row.train_loss for row in result.history]


def same_bits(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


def test_it_learns_and_leaves_what_is_frozen():
    with seeded(3):
        before = Model().tower.blocks["block1"].weight.detach()
    model, result = train(plan=TunePlan(epochs=15, lr=1e-2, head_lr=1e-2))
    assert losses(result)[-1] < 0.5 * losses(result)[0]
    assert torch.equal(model.tower.blocks["block1"].weight, before)
    assert not model.heads.training


def test_a_rate_of_zero_keeps_towers_or_heads_as_they_are():
    with seeded(3):
        start = {name: tensor.clone() for name, tensor in trained_tensors(Model()).items()}
    for kept, plan in (("backbone.", TunePlan(epochs=1, lr=0.0)), ("heads.", TunePlan(epochs=1, lr=1e-2, head_lr=0.0))):
        model, _ = train(plan=plan)
        for name, tensor in trained_tensors(model).items():
            if name.startswith(kept):
                assert torch.equal(tensor, start[name])
        moved = [name for name, tensor in trained_tensors(model).items() if not torch.equal(tensor, start[name])]
        assert moved
        assert not [name for name in moved if name.startswith(kept)]


@pytest.mark.parametrize("stop_at", [0, 7, 12])
def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path, stop_at):
    """Killed between any two steps; the state is saved after every step (save_seconds is under a step's time)."""
    plan = TunePlan(**{**PLAN.__dict__, "save_seconds": 1e-9})
    whole, expected = train(plan=plan)
    state, steps = StateFile(tmp_path / "state.safetensors"), Steps()
    steps.stop_at = stop_at
    with pytest.raises(InterruptedError):
        train(steps, plan=plan, state=state)
    left = Steps()
    model, result = train(left, plan=plan, state=StateFile(state.path))
    assert losses(result) == losses(expected)
    assert same_bits(trained_tensors(model), trained_tensors(whole))
    assert left.given == 24 - stop_at
    assert result.best_epoch == expected.best_epoch


def test_killed_after_the_last_step_of_an_epoch_its_row_is_the_same(tmp_path):
    """The state was saved within the epoch, and nothing of it is left but to judge and to record it."""
    plan = TunePlan(**{**PLAN.__dict__, "save_seconds": 1e-9})

    def validate(_model):
        calls.append(1)
        if len(calls) == 3:
            raise InterruptedError
        return Validation({"quality": 0.1 * len(calls)})

    calls = [1, 1, 1]
    _, expected = train(plan=plan, validate=validate)
    state = StateFile(tmp_path / "state.safetensors")
    calls = []
    with pytest.raises(InterruptedError):
        train(plan=plan, state=state, validate=validate)
    left = Steps()
    _, result = train(left, plan=plan, state=state, validate=validate)
    assert left.given == 12
    assert [(row.lr, row.train_loss) for row in result.history] == [
        (row.lr, row.train_loss) for row in expected.history
    ]


def test_without_saves_within_an_epoch_its_steps_are_taken_again(tmp_path):
    whole, expected = train()
    state, steps = StateFile(tmp_path / "state.safetensors"), Steps()
    steps.stop_at = 15
    with pytest.raises(InterruptedError):
        train(steps, state=state)
    left, done = Steps(), []
    model, result = train(left, state=state, on_steps=done.append)
    assert left.given == 12
    assert sum(done) == 24
    assert losses(result) == losses(expected)
    assert same_bits(trained_tensors(model), trained_tensors(whole))


def test_the_state_is_saved_when_it_is_time_and_at_the_end(tmp_path, monkeypatch):
    """Not after every epoch; in the end the best weights are all that is needed."""
    saved, write = [], StateFile._write

    def counted(self, names, *given):
        saved.append(names)
        write(self, names, *given)

    monkeypatch.setattr(StateFile, "_write", counted)
    state = StateFile(tmp_path / "state.safetensors")
    train(plan=TunePlan(**{**PLAN.__dict__, "save_seconds": 1e6}), state=state)
    (names,) = saved
    assert {name.partition(".")[0] for name in names} == {"best", "losses", "random"}
    train(state=StateFile(tmp_path / "each.safetensors"))
    assert len(saved) == 1 + PLAN.epochs


def test_the_training_goes_on_while_its_state_is_written(tmp_path, monkeypatch):
    """And what is written is what was saved, whatever the steps change meanwhile."""
    plan, steps, write = TunePlan(**{**PLAN.__dict__, "save_seconds": 1e-9}), Steps(), StateFile._write
    whole, expected = train(plan=plan)
    taken, writing = threading.Event(), []

    def slow(self, *given):
        if not writing:
            writing.append(steps.given)
            assert taken.wait(60), "the step waits for the file"
        write(self, *given)

    class Watched(Steps):
        def part(self, rows):
            if writing and steps.given > writing[0]:
                taken.set()
            return super().part(rows)

    steps = Watched()
    steps.stop_at = 2  # the second save is behind the first, and so is the kill
    monkeypatch.setattr(StateFile, "_write", slow)
    state = StateFile(tmp_path / "state.safetensors")
    with pytest.raises(InterruptedError):
        train(steps, plan=plan, state=state)
    model, result = train(plan=plan, state=StateFile(state.path))
    assert losses(result) == losses(expected)
    assert same_bits(trained_tensors(model), trained_tensors(whole))


def test_a_state_that_cannot_be_written_stops_the_training(tmp_path):
    (tmp_path / "file").write_text("no folder")
    steps = Steps()
    with pytest.raises(OSError, match="file"):
        train(steps, state=StateFile(tmp_path / "file" / "state.safetensors"))
    assert steps.given < 24  # told at the next save


def test_a_finished_training_is_not_trained_again(tmp_path):
    state = StateFile(tmp_path / "state.safetensors")
    model, result = train(state=state)
    steps = Steps()
    again, found = train(steps, state=state)
    assert steps.given == 0
    assert losses(found) == losses(result)
    assert same_bits(trained_tensors(again), trained_tensors(model))


def test_parts_of_a_step_give_its_gradient():
    """Gradients of parts, weighted by rows, are those of the whole; dropout off, as it is drawn part by part."""
    whole, expected = train(Steps(batch_size=24), dropout=0.0)
    parts, result = train(Steps(batch_size=24, parts=5), dropout=0.0)
    assert losses(result) == pytest.approx(losses(expected), abs=1e-6)
    for a, b in zip(trained_tensors(whole).values(), trained_tensors(parts).values(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)  # Adam's first steps divide by gradients near 0


def test_the_best_epoch_is_one_for_both_heads():
    scores = iter([0.0, 0.3, 0.9, 0.1, 0.2])
    seen = []

    def validate(model):
        seen.append({name: tensor.clone() for name, tensor in trained_tensors(model).items()})
        score = next(scores)
        return Validation({"quality": score, "consistency": -score / 2}, {"figure": score})

    model, result = train(validate=validate)
    assert result.best_epoch == {"quality": 2, "consistency": 2}
    assert result.best_score["quality"] == pytest.approx(0.225)
    assert same_bits(trained_tensors(model), seen[2])
    assert [row.figures["figure"] for row in result.history] == [0.3, 0.9, 0.1, 0.2]


def test_patience_stops():
    scores = iter([0.0, 0.5, 0.4, 0.3, 0.2])
    plan = TunePlan(**{**PLAN.__dict__, "patience": 2})
    _, result = train(plan=plan, validate=lambda _model: Validation({"quality": next(scores)}))
    assert (len(result.history), result.stopped_early, result.best_epoch["quality"]) == (3, True, 1)


def test_a_loss_that_is_no_number_is_named():
    steps = Steps()
    steps.x[7] = math.nan
    with pytest.raises(UserError, match=r"the training loss is nan at epoch 1, step \d; lower --lr, which is 0.01, or"):
        train(steps)


def test_gradients_in_another_layout_than_the_weights_stop_the_step():
    """As they came back from other processes: fused AdamW would have mixed them up."""

    class Shared(Model):
        def share_gradients(self):
            weight = self.tower.blocks["block2"].weight
            weight.grad = weight.grad.t().contiguous().t()

    with seeded(3), pytest.raises(AssertionError, match=r"laid out as \(1, 8\), not \(8, 1\)"):
        tune(Shared(), Steps(), plan=PLAN)


def test_a_damaged_state_is_refused_by_name(tmp_path):
    state = StateFile(tmp_path / "state.safetensors")
    train(state=state)
    state.path.write_bytes(state.path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"state.safetensors: cannot be resumed from .*; remove it to start again"):
        train(state=state)


def test_rates_fall_with_depth_and_vectors_do_not_decay():
    model = Model()
    model.tower.blocks["block2"].register_parameter("cls_token", nn.Parameter(torch.zeros(1, 1, DIM)))  # as in timm
    groups = tuning_groups(model.heads, [model.tower], lr=1.0, head_lr=0.5, layer_decay=0.5, weight_decay=0.1)
    rate = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    blocks = model.tower.blocks
    assert rate[id(blocks["block3"].weight)] == (0.5, 0.1)
    assert rate[id(blocks["block2"].weight)] == (0.25, 0.1)
    assert rate[id(blocks["block2"].bias)] == (0.25, 0.0)
    assert rate[id(blocks["block2"].cls_token)] == (0.25, 0.0)
    assert id(blocks["block1"].weight) not in rate
    assert rate[id(model.heads.quality_head.base.weight)] == (0.5, 0.1)
    assert rate[id(model.heads.consistency_head.slope)] == (0.5, 0.0)
    held = [id(p) for group in groups for p in group["params"]]
    trainable = [*model.heads.parameters(), *model.tower.named_trainable().values()]
    assert sorted(held) == sorted(id(p) for p in trainable)
