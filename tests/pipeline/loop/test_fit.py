"""The training loop: what it learns, what it keeps, when it stops, and that it repeats."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from deltaclip.base.errors import UserError
from deltaclip.pipeline.loop.batches import memory_batches
from deltaclip.pipeline.loop.epochs import FitPlan, Validation, seeded
from deltaclip.pipeline.loop.head_learner import fit
from deltaclip.pipeline.model.heads import HeadSpec, build_heads
from deltaclip.pipeline.model.losses import weighted_loss
from deltaclip.pipeline.model.scores import head_of, score_rows

DIM = 16
TARGETS = ("quality", "consistency")
HALF = dict.fromkeys(TARGETS, 0.5)
SPECS = [{"scales": dict.fromkeys(TARGETS, 0.4)}, {"kind": "direct"}]


def toy(num_rows=200, seed=0, batch_size=32):
    """Rows whose labels are smooth functions of the embeddings: all of it can be learned."""
    generator = torch.Generator().manual_seed(seed)
    v, t = (torch.nn.functional.normalize(torch.randn(num_rows, DIM, generator=generator), dim=1) for _ in range(2))
    direction = torch.randn(DIM, generator=generator)
    q = torch.sigmoid(v @ direction)
    c = 0.5 + 0.4 * (v * t).sum(1) + 0.1 * torch.sin(6 * t[:, 0])
    return memory_batches(v, t, {"quality": q, "consistency": c}, batch_size=batch_size, seed=seed)


def relabelled(batches, **labels):
    return replace(batches, label_N={**batches.label_N, **labels})


def train(*, batches=None, plan=None, seed=0, validate=None, scales=None, **spec):
    batches = batches or toy()
    with seeded(seed):
        heads = build_heads(HeadSpec(dim=DIM, **spec).with_scales(scales or {}))
        result = fit(
            heads,
            batches,
            objective=weighted_loss(weights=HALF),
            plan=plan or FitPlan(epochs=3, lr=3e-3),
            validate=validate and (lambda: validate(heads)),
        )
    return heads, result


def both(score, **figures):
    return Validation({"quality": score, "consistency": score}, figures)


def scripted(scores, start=-1.0):
    values = iter([start, *scores])
    return lambda _heads: both(next(values))


def same_bits(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


@pytest.mark.parametrize("spec", SPECS)
def test_learns_a_toy_problem(spec):
    batches = toy()
    heads, result = train(batches=batches, plan=FitPlan(epochs=40, lr=2e-2), dropout=0.0, **spec)
    assert result.history[-1].train_loss < 0.1 * result.history[0].train_loss
    scores = score_rows(heads, batches.in_order())
    assert not heads.training
    label_N = batches.label_N["quality"]
    assert ((scores.of("quality") - label_N) ** 2).mean() < 0.1 * label_N.var()


def test_history_has_a_row_per_epoch():
    seen = []
    batches = toy()
    heads = build_heads(HeadSpec(dim=DIM))
    result = fit(
        heads,
        batches,
        objective=weighted_loss(weights=HALF),
        plan=FitPlan(epochs=4, lr=2e-3, schedule="constant", warmup_ratio=0.0),
        validate=lambda: both(0.5, srocc_q=0.25),
        on_epoch=seen.append,
    )
    assert tuple(seen) == result.history
    assert [row.epoch for row in seen] == [1, 2, 3, 4]
    assert [row.lr for row in seen] == [2e-3] * 4
    assert seen[0].figures == {"srocc_q": 0.25}
    assert seen[0].scales == pytest.approx({"quality": 0.2, "consistency": 0.2})
    assert seen[0].seconds > 0
    _, direct = train(kind="direct")
    assert direct.history[0].scales == {}


def test_train_loss_is_the_mean_over_steps():
    """With a rate of 0 nothing moves, so the loss is that of the start: computed here by hand."""
    batches = toy()
    heads, result = train(batches=batches, plan=FitPlan(epochs=1, lr=0.0), dropout=0.0)
    by_hand = []
    for batch in batches(1):
        scores = heads(batch.v_BD, batch.t_BD)
        squares = sum((scores.targets[target].sum_N - batch.label_B[target]) ** 2 for target in TARGETS)
        by_hand.append(0.5 * float(squares.mean().detach()))
    assert result.history[0].train_loss == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([0.1, 0.5, 0.3, 0.4], 2),
        ([0.5, 0.5, 0.5, 0.5], 1),  # on a tie the earlier wins
        ([math.nan, -0.2, math.nan, -0.3], 2),  # NaN loses to any number
        ([math.nan] * 4, 4),  # nothing to choose by: the last, as without validation
        ([0.1, 0.2, 0.3, 0.4], 4),
        ([-0.3, -0.2, -0.25, -0.4], 0),  # no epoch beats the start
    ],
)
def test_best_epoch_is_chosen_and_restored(scores, best):
    states = []
    start = -0.1 if best == 0 else math.nan
    values = iter([start, *scores])

    def validate(heads):
        assert not heads.training
        assert not torch.is_grad_enabled()
        states.append({name: tensor.clone() for name, tensor in heads.state_dict().items()})
        return both(next(values))

    heads, result = train(plan=FitPlan(epochs=4), validate=validate)
    assert result.best_epoch == {"quality": best, "consistency": best}
    expected = pytest.approx([start, *scores][best], nan_ok=True)
    assert (result.best_score["quality"], result.best_score["consistency"]) == (expected, expected)
    assert same_bits(heads.state_dict(), states[best])
    assert not same_bits(states[0], states[1])
    assert not result.stopped_early


@pytest.mark.parametrize("spec", SPECS)
def test_each_head_keeps_its_own_best_epoch(spec):
    states = []
    values = iter([(0.0, 0.0), (0.5, 0.1), (0.2, 0.3), (0.1, 0.2)])

    def validate(heads):
        states.append({name: tensor.clone() for name, tensor in heads.state_dict().items()})
        return Validation(dict(zip(TARGETS, next(values), strict=True)))

    heads, result = train(plan=FitPlan(epochs=3), validate=validate, **spec)
    assert result.best_epoch == {"quality": 1, "consistency": 2}
    assert [row.val_score for row in result.history] == pytest.approx([0.3, 0.25, 0.15])
    for name, tensor in heads.state_dict().items():
        assert torch.equal(tensor, states[result.best_epoch[head_of(name)]][name])


def test_a_head_that_cannot_be_judged_keeps_its_last_epoch():
    scores = iter([0.9, 0.5, 0.4, 0.3])
    _, result = train(plan=FitPlan(epochs=3), validate=lambda _: Validation({"quality": next(scores)}))
    assert result.best_epoch == {"quality": 0, "consistency": 3}


def test_heads_share_no_parameter_and_no_clipping():
    """A quality label a million times too large throttles the quality head alone."""
    full = toy()
    states = []
    for factor in (1.0, 1e6):
        batches = relabelled(full, quality=full.label_N["quality"] * factor)
        heads, _ = train(batches=batches, plan=FitPlan(epochs=2))
        states.append({name: t for name, t in heads.state_dict().items() if head_of(name) == "consistency"})
    assert same_bits(*states)


@pytest.mark.parametrize(
    ("patience", "epochs_run"),
    [(0, 8), (1, 3), (2, 4), (3, 8)],
)
def test_early_stop(patience, epochs_run):
    scores = [0.1, 0.5, 0.4, 0.3, 0.6, 0.2, 0.2, 0.1]
    _, result = train(plan=FitPlan(epochs=8, patience=patience), validate=scripted(scores))
    assert len(result.history) == epochs_run
    assert result.stopped_early == (epochs_run < 8)
    assert result.best_epoch == dict.fromkeys(TARGETS, 5 if epochs_run > 4 else 2)


def test_without_validation_the_last_epoch_is_kept():
    _, result = train(plan=FitPlan(epochs=3, patience=1))
    assert result.best_epoch == dict.fromkeys(TARGETS, 3)
    assert all(math.isnan(score) for score in result.best_score.values())


def test_same_seed_same_bits_and_untouched_generator():
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    first, first_result = train(seed=7)
    assert torch.equal(torch.rand(3), expected)
    again, again_result = train(seed=7)
    assert same_bits(first.state_dict(), again.state_dict())
    assert [row.train_loss for row in first_result.history] == [row.train_loss for row in again_result.history]
    other, _ = train(seed=8)
    assert not same_bits(first.state_dict(), other.state_dict())
    smaller, _ = train(seed=7, batches=toy(batch_size=25))
    assert not same_bits(first.state_dict(), smaller.state_dict())


def test_stops_at_the_first_loss_that_is_not_finite():
    with pytest.raises(UserError) as caught:
        train(plan=FitPlan(epochs=3, lr=1e30, warmup_ratio=0.0, max_grad_norm=0.0))
    # The first step has a finite loss, its update sends the weights to 1e30.
    assert str(caught.value) == "the training loss is nan at epoch 1, step 2; lower --lr, which is 1e+30"


def test_names_a_damaged_embedding_rather_than_the_rate():
    batches = toy()
    batches.v_ID[17] = torch.nan
    step = next(i for i, batch in enumerate(batches(1), start=1) if batch.v_BD.isnan().any())
    with pytest.raises(UserError) as caught:
        train(batches=batches)
    assert str(caught.value) == (
        f"the training loss is nan at epoch 1, step {step}, where an embedding is not finite; "
        "find the damaged rows with `deltaclip inspect --verify`"
    )


def test_long_epochs_are_checked_on_the_way():
    """600 steps: the loss is read every 256, and the step is named exactly after the first reading too."""
    batches = toy(num_rows=600, batch_size=1)
    order = [batch.label_B["quality"].item() for batch in batches(1)]
    row = int((batches.label_N["quality"] == order[399]).nonzero()[0])
    batches.v_ID[row] = torch.inf
    with pytest.raises(UserError, match=r"epoch 1, step 400, where"):
        train(batches=batches, plan=FitPlan(epochs=1, lr=0.0))


def test_learned_scale_moves_and_stays_bounded():
    for given, upper in ((0.05, 0.5), (0.6, 1.0)):
        plan = FitPlan(epochs=20, lr=0.2, schedule="constant")
        heads, result = train(plan=plan, scale_mode="learned", scales=dict.fromkeys(TARGETS, given))
        scales = [row.scales for row in result.history]
        assert abs(scales[-1]["quality"] - given) > 0.01
        assert all(0 < scale < upper for by_target in scales for scale in by_target.values())
        assert heads.scales() == scales[-1]


def test_learned_scale_of_zero_stays_zero():
    heads, _ = train(scale_mode="learned", scales={"quality": 0.0, "consistency": 0.2})
    assert heads.scales()["quality"] == 0.0
    assert heads.scales()["consistency"] != pytest.approx(0.2, abs=1e-6)


def test_fixed_scale_does_not_move():
    heads, _ = train(scales={"quality": 0.3, "consistency": 0.0})
    assert heads.scales() == {"quality": pytest.approx(0.3), "consistency": 0.0}


def test_curriculum_ramps_and_the_best_epochs_scale_is_restored():
    plan = FitPlan(epochs=4)
    given = {"quality": 0.2, "consistency": 0.4}
    heads, result = train(plan=plan, validate=scripted([0.1, 0.9, 0.2, 0.3]), scale_mode="curriculum", scales=given)
    for target, scale in given.items():
        expected = pytest.approx([scale * share for share in (0.1, 0.4, 0.7, 1.0)])
        assert [row.scales[target] for row in result.history] == expected
    assert heads.scales() == pytest.approx({"quality": 0.08, "consistency": 0.16})


def test_a_label_that_is_all_missing_trains_the_other_head():
    batches = relabelled(toy(), consistency=torch.full((200,), torch.nan))
    heads, result = train(batches=batches, plan=FitPlan(epochs=10, lr=1e-2))
    assert result.history[-1].train_loss < 0.5 * result.history[0].train_loss
    found = score_rows(heads, batches.in_order()).targets["consistency"]
    assert torch.equal(found.reported, found.base_N)
    assert heads.consistency_head.slope == 1


def test_clipping_bounds_the_step():
    """Adam forgets the size of a lasting gradient, but not of one step that is a million times the others."""

    def first_losses(max_grad_norm):
        full = toy()
        quality = full.label_N["quality"].clone()
        quality[5] = 1e6
        batches = relabelled(full, quality=quality)
        heads, _ = train(batches=batches, plan=FitPlan(epochs=1, max_grad_norm=max_grad_norm))
        return heads.state_dict()

    assert not same_bits(first_losses(0.0), first_losses(1.0))
    assert not same_bits(first_losses(0.1), first_losses(1.0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"lr": -1.0}, "lr must not be negative, got -1.0"),
        ({"lr": math.nan}, "lr must not be negative, got nan"),
        ({"warmup_ratio": 1.5}, "warmup_ratio must lie in [0, 1], not 1.5"),
        ({"patience": -1}, "patience must not be negative, got -1"),
    ],
)
def test_plan_refusals(values, message):
    with pytest.raises(ValueError) as caught:  # the whole text is compared
        FitPlan(**values)
    assert str(caught.value) == message
