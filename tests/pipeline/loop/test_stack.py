"""Heads trained together: each ends where `fit` leaves it alone."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from deltaclip.pipeline.loop.batches import memory_batches
from deltaclip.pipeline.loop.epochs import FitPlan, Validation, seeded
from deltaclip.pipeline.loop.head_learner import fit
from deltaclip.pipeline.loop.stack_learner import CHUNK, HeadPlan, StackJob, fit_stacks
from deltaclip.pipeline.model.calibrate import calibrate
from deltaclip.pipeline.model.heads import HeadSpec, TargetSpec, build_heads
from deltaclip.pipeline.model.losses import BATCH_LOSSES, weighted_loss
from deltaclip.pipeline.model.scores import score_rows
from deltaclip.pipeline.model.stack import HeadStack
from deltaclip.pipeline.scoring.agreement import srocc

DIM = 24
TARGETS = {"quality": "image", "composition": "image", "consistency": "pair"}
# Fields of one setting: lr, weight decay, loss, dropout, seed, and weights and scales by target.
SETTINGS = [
    (1e-3, 1e-4, "mse", 0.1, 1, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)),
    (1e-3, 1e-4, "mse", 0.0, 1, (0.5, 0.2, 0.5), (0.1, 0.3, 0.5)),
    (1e-3, 1e-4, "huber", 0.1, 2, (0.9, 0.5, 0.1), (0.0, 0.2, 0.3)),
    (1e-3, 1e-4, "plcc", 0.5, 2, (0.5, 0.5, 0.5), (0.3, 0.0, 0.05)),
    (1e-3, 1e-4, "rank", 0.3, 3, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)),  # the fifth of its kind: one over CHUNK
    (5e-3, 1e-4, "fidelity", 0.1, 1, (0.5, 0.5, 0.5), (0.2, 0.1, 0.2)),
    (5e-3, 0.1, "mse", 0.1, 3, (0.0, 0.5, 1.0), (0.2, 0.2, 0.2)),
]


def rows(num_rows=150, seed=0, missing=0.0, batch_size=32):
    generator = torch.Generator().manual_seed(seed)
    v, t = (torch.nn.functional.normalize(torch.randn(num_rows, DIM, generator=generator), dim=1) for _ in range(2))
    labels = {
        target: torch.sigmoid(4 * v[:, k] + t[:, 1 + k] + 0.1 * torch.randn(num_rows, generator=generator))
        for k, target in enumerate(TARGETS)
    }
    for label in labels.values():
        label[torch.rand(num_rows, generator=generator) < missing] = torch.nan
    return memory_batches(v, t, labels, batch_size=batch_size, seed=seed)


def spec_of(scales, dropout, scale_mode):
    targets = tuple(TargetSpec(*target, scale) for target, scale in zip(TARGETS.items(), scales, strict=True))
    return HeadSpec(dim=DIM, targets=targets, dropout=dropout, scale_mode=scale_mode)


def judge(predicted, batches, target):
    """SROCC on labelled rows: what the epoch is chosen by here."""
    truth = batches.label_N[target]
    known = ~torch.isnan(truth)
    predicted = predicted[known].numpy()
    return srocc(predicted, truth[known].numpy()) if np.isfinite(predicted).all() else math.nan


def alone(setting, batches, val, *, plan, scale_mode="fixed"):
    lr, decay, loss, dropout, seed, weights, scales = setting

    def validate():
        scores = score_rows(heads, val.in_order())
        return Validation({target: judge(scores.of(target), val, target) for target in TARGETS})

    with seeded(seed):
        heads = build_heads(spec_of(scales, dropout, scale_mode))
        calibrate(heads, batches.in_order)
        changed = FitPlan(**{**plan.__dict__, "lr": lr, "weight_decay": decay})
        objective = weighted_loss(loss, weights=dict(zip(TARGETS, weights, strict=True)))
        return heads, fit(heads, batches, objective=objective, plan=changed, validate=validate if val else None)


def together(settings, batches, val, *, plan, scale_mode="fixed", half=False):
    heads, generators = [], {}
    for _, _, _, dropout, seed, _, scales in settings:
        with seeded(seed):
            heads.append(build_heads(spec_of(scales, dropout, scale_mode)))
            calibrate(heads[-1], batches.in_order)
            generators[seed] = torch.Generator()
            generators[seed].set_state(torch.get_rng_state())
    jobs = []
    for index, target in enumerate(TARGETS):
        own = HeadPlan(
            lr=[s[0] for s in settings],
            weight_decay=[s[1] for s in settings],
            loss=[s[2] for s in settings],
            weight=[s[5][index] for s in settings],
            dropout=[s[3] for s in settings],
            seed=[s[4] for s in settings],
        )
        jobs.append(StackJob(HeadStack(heads, target, half=half), own))

    def validate(stack):
        scores, _ = stack.forward(next(iter(val.in_order())))
        said_KB, target = scores.reported, stack.target
        return [Validation({target: judge(said_KB[k], val, target)}) for k in range(len(stack))]

    fit_stacks(jobs, batches, plan=plan, generators=generators, validate=validate if val else None)
    return jobs


def scores_of(job, k, batches):
    """Unclamped scores of head k with the weights that were kept."""
    stack = copy.copy(job.stack)
    stack.parameters = job.best
    stack._product_KHF = job.best[stack.wide_weight]
    batch = next(iter(batches.in_order()))
    with torch.no_grad():
        return stack.forward(batch)[0].sum_N[k]


def assert_same(settings, jobs, batches, val, **options):
    for k, setting in enumerate(settings):
        heads, result = alone(setting, batches, val, **options)
        # Plcc, rank and fidelity are blind to an offset: its gradient is rounding, which Adam magnifies. So scores are
        # compared, without their mean for these. 6 epochs of float32 sums in another order stay within 1e-4.
        found = score_rows(heads, batches.in_order())
        for job in jobs:
            if job.own.weight[k] == 0:
                continue  # alone it has no gradient at all; together it only decays
            difference_N = scores_of(job, k, batches) - found.targets[job.stack.target].sum_N
            if setting[2] in BATCH_LOSSES:
                difference_N = difference_N - difference_N.mean()
            assert difference_N.abs().max() < 1e-4
        for job in jobs:
            if job.own.weight[k] > 0:
                assert job.choice[k].epoch == result.best_epoch[job.stack.target]
        # What each head adds to the loss of a setting is its own.
        losses = [sum(job.history[e].train_loss[k] for job in jobs) for e in range(len(result.history))]
        assert losses == pytest.approx([row.train_loss for row in result.history], rel=1e-4)


def test_each_head_ends_where_it_would_alone():
    assert len(SETTINGS) > CHUNK
    batches, val = rows(), rows(40, seed=1)
    plan = FitPlan(epochs=6)
    assert_same(SETTINGS, together(SETTINGS, batches, val, plan=plan), batches, val, plan=plan)


@pytest.mark.parametrize("scale_mode", ["learned", "curriculum"])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.01])
def test_scale_modes_clipping_and_missing_labels(scale_mode, max_grad_norm):
    batches = rows(missing=0.3)
    plan = FitPlan(epochs=4, max_grad_norm=max_grad_norm, schedule="linear", warmup_ratio=0.3)
    options = {"plan": plan, "scale_mode": scale_mode}
    assert_same(SETTINGS, together(SETTINGS, batches, None, **options), batches, None, **options)


@pytest.mark.parametrize("count", [1, CHUNK - 1, CHUNK, CHUNK + 1])
def test_any_number_of_heads(count):
    settings = [(1e-3, 1e-4, "mse", 0.1, 1, (0.5,) * 3, (0.1 + 0.01 * k, 0.2, 0.3)) for k in range(count)]
    batches, plan = rows(), FitPlan(epochs=2)
    assert_same(settings, together(settings, batches, None, plan=plan), batches, None, plan=plan)


def test_patience_stops_each_head_as_alone():
    batches, val = rows(), rows(40, seed=1)
    plan = FitPlan(epochs=30, patience=2)
    jobs = together(SETTINGS[:4], batches, val, plan=plan)
    assert len(jobs[0].history) < 30
    for k, setting in enumerate(SETTINGS[:4]):
        _, result = alone(setting, batches, val, plan=plan)
        assert [job.choice[k].epoch for job in jobs] == [result.best_epoch[target] for target in TARGETS]


def test_a_head_that_diverges_stops_no_other():
    wild = (1e38, 0.0, "mse", 0.1, 1, (0.5,) * 3, (0.2,) * 3)
    settings = [SETTINGS[0], wild]
    batches, val = rows(), rows(40, seed=1)
    plan = FitPlan(epochs=3, max_grad_norm=0.0)
    jobs = together(settings, batches, val, plan=plan)
    assert not math.isfinite(jobs[-1].history[-1].train_loss[1])
    assert math.isnan(jobs[-1].history[-1].val_score[1])
    assert_same(settings[:1], jobs, batches, val, plan=plan)


def test_bf16_products_stay_close():
    """Products are rounded to 8 bits; corrections are bounded, so scores move by far less than labels scatter."""
    batches, plan = rows(), FitPlan(epochs=6)
    exact, half = (together(SETTINGS[:3], batches, None, plan=plan, half=half) for half in (False, True))
    for job, rounded in zip(exact, half, strict=True):
        assert not torch.equal(job.best[job.stack.wide_weight], rounded.best[job.stack.wide_weight])
        scores = [each.stack.forward(next(iter(batches.in_order())))[0].reported for each in (job, rounded)]
        assert (scores[0] - scores[1]).abs().max() < 5e-3
