"""What `finetune` refuses before anything is loaded, word for word, and what it warns of."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltaclip.base.errors import UserError
from deltaclip.pipeline.settings import FinetuneConfig
from deltaclip.pipeline.training.finetune_job import run_mode
from deltaclip.pipeline.training.presets import apply_preset


def config(**settings):
    return FinetuneConfig(cache=Path("c.h5"), **settings)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"freeze_clip": True},
            "--freeze-clip: leaves nothing of CLIP to train; use `deltaclip train`, which trains heads with all of "
            "CLIP frozen",
        ),
        (
            {"freeze_layers": 2.5},
            "--freeze-layers: 2.5 blocks cannot be frozen; give a whole number of blocks, or a share below 1",
        ),
        (
            {"freeze_text_layers": 1.5},
            "--freeze-text-layers: 1.5 blocks cannot be frozen; give a whole number of blocks, or a share below 1",
        ),
        ({"freeze_clip": False, "freeze_layers": 9}, "--no-freeze-clip: contradicts --freeze-layers 9; give one"),
        ({"partial_freeze": False, "freeze_layers": 9}, "--no-partial-freeze: contradicts --freeze-layers 9; give one"),
        ({"partial_freeze": True, "freeze_layers": 0}, "--partial-freeze: contradicts --freeze-layers 0; give one"),
        ({"partial_freeze": True, "freeze_clip": False}, "--partial-freeze: contradicts --no-freeze-clip; give one"),
        (
            {"augment": "crops"},
            "--augment: crops are random in every epoch; add --no-boundary-cache, or give --augment views",
        ),
        ({"layer_decay": 0.0}, "--layer-decay: 0.0 is out of range; give a value above 0"),
    ],
)
def test_what_is_refused(settings, line):
    with pytest.raises(UserError) as error:
        config(**settings)
    assert str(error.value) == line


@pytest.mark.parametrize(
    ("settings", "everything"),
    [
        ({}, False),
        ({"freeze_layers": 0}, True),
        ({"partial_freeze": False}, True),
        ({"freeze_clip": False}, True),
        ({"partial_freeze": True}, False),
        ({"freeze_layers": 0, "augment": "crops"}, True),
    ],
)
def test_words_for_all_and_for_a_part(settings, everything):
    assert config(**settings).trains_all == everything


def test_modes_have_names():
    assert run_mode(config(), 9) == "residual_partial_freeze_9L"
    assert run_mode(config(residual_learning=False), 0) == "direct_full"


def test_a_preset_sets_freezing_unless_it_was_given():
    changed, about = apply_preset(config(preset="small"), num_rows=100)
    assert (changed.freeze_layers, changed.lr, changed.epochs, changed.batch_size) == (0.83, 1e-5, 30, 16)
    assert about.unused == ""
    for kept in ({"freeze_layers": 0.75}, {"partial_freeze": False}, {"freeze_clip": False}):
        changed, about = apply_preset(config(preset="small", **kept), num_rows=100)
        assert (changed.freeze_layers, changed.trains_all) == (0.75, "freeze_layers" not in kept)
        assert "freeze_layers" in about.given
    changed, about = apply_preset(config(preset="quick"), num_rows=100)
    assert (changed.head_lr, changed.lr, changed.epochs) == (1e-3, 3e-5, 10)
    assert about.unused == "freezing all of CLIP: that is what `train` does"


def test_heads_alone_learn_at_their_own_rate():
    alone = config(head_lr=2e-3, scale="0.3,quality=0.1", weight="consistency=0").heads(epochs=3)
    assert (alone.lr, alone.epochs, alone.weights.of("consistency")) == (2e-3, 3, 0)
    assert [alone.scales.of(name) for name in ("quality", "consistency")] == [0.1, 0.3]
