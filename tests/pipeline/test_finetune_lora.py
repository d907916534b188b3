"""`finetune --lora-rank` end to end: what trains, what is written, who can use it, and that nothing else moves."""

from __future__ import annotations

import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from deltaclip.base.errors import UserError
from deltaclip.features.backbone.load import load_backbone
from deltaclip.features.backbone.weights import find_weights
from deltaclip.pipeline.api.scorer import Scorer
from deltaclip.pipeline.compare import compare
from deltaclip.pipeline.evaluate import evaluate
from deltaclip.pipeline.export import export
from deltaclip.pipeline.finetune import finetune
from deltaclip.pipeline.loop.epochs import StateFile
from deltaclip.pipeline.runs.folder import open_run
from deltaclip.pipeline.settings import CompareConfig, EvaluateConfig, ExportConfig, FinetuneConfig, ShareConfig
from deltaclip.pipeline.share import share
from deltaclip.pipeline.training.finetune_job import run_mode
from deltaclip.pipeline.training.presets import apply_preset
from deltaclip.tests.pipeline.conftest import TORCHRUN, numbers, read_csv, read_json
from deltaclip.tests.pipeline.test_finetune import QUICK, loss_of, scored_alike
from deltaclip.tests.pipeline.test_finetune_families import interrupted, under_torchrun

LORA = {"lora_rank": 4, "lora_alpha": 8.0, "freeze_layers": 4, "freeze_text_layers": 3, "lr": 1e-2}
NAME = "residual_lora_R4_4L"
# Blocks 5 and 6 of the image tower, width 128: q, k, v and out, c_fc, c_proj; block 4 of the text tower, width 96.
NUMBERS = sum(blocks * 4 * ((3 + 3) + (1 + 1) + (4 + 1) + (1 + 4)) * width for blocks, width in ((2, 128), (1, 96)))


@pytest.fixture(scope="session")
def lora(tmp_path_factory, few_cache):
    """Return a run with additions in both towers, and the whole model beside; never written to by a test."""
    out = tmp_path_factory.mktemp("lora") / "run"
    return finetune(FinetuneConfig(cache=few_cache, out=out, save_full=True, **(QUICK | LORA))).run


@pytest.fixture
def tune_lora(tmp_path, few_cache):
    def run(**settings):
        out = tmp_path / f"lora{len(list(tmp_path.glob('lora*')))}"
        return finetune(FinetuneConfig(**{"cache": few_cache, "out": out, **QUICK, **LORA, **settings}))

    return run


def config(**settings):
    return FinetuneConfig(**{"cache": "c.h5", **settings})


def test_the_checkpoint_holds_additions_and_no_weight(lora):
    with safe_open(lora / f"{NAME}_best.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith("backbone.")}  # noqa: SIM118
        header = json.loads(file.metadata()["deltaclip"])
    assert all(
        name.endswith((".weight.lora_a", ".weight.lora_b", "in_proj_weight.lora_a", "in_proj_weight.lora_b"))
        for name in tensors
    )
    assert sum(tensor.numel() for tensor in tensors.values()) == NUMBERS
    assert header["low_rank"] == {"rank": 4, "alpha": 8.0, "layers": "all"}
    assert all(tensor.count_nonzero() for tensor in tensors.values())  # B has left 0
    recorded = read_json(lora / "config.json")
    assert (recorded["mode"], recorded["settings"]["lora_rank"]) == (NAME, 4)
    words = "\n".join(recorded["description"])
    assert (
        f"additions     W + 2 B A, rank 4 (LoRA): {NUMBERS:,} numbers, {4 * NUMBERS / 1e6:.2f} MB of the checkpoint"
        in words
    )
    assert "image tower, blocks 5 to 6: attn.in_proj_weight, attn.out_proj, mlp.c_fc, mlp.c_proj" in words
    assert "text tower, block 4: attn.in_proj_weight" in words


def test_scores_of_merged_weights_are_those_that_training_recorded(lora, few_folder):
    """fp32; recorded with the additions beside the weights, predicted with them inside."""
    rows = read_csv(lora / "predictions.csv")[:12]
    scorer = Scorer.load(lora, device="cpu")
    images, prompts = [few_folder / row["image"] for row in rows], [row["prompt"] for row in rows]
    scored_alike(scorer.score(images, prompts).scores, rows, ["quality", "consistency"])
    assert "scored anew, differ by at most" in evaluate(EvaluateConfig(run=lora)).scores
    before = load_backbone(find_weights("tiny", None), device="cpu", precision="fp32").model.state_dict()
    after = scorer.backbone.model.state_dict()
    changed = {name.rpartition(".lora_")[0] for name in open_run(lora).tuned_tensors()}
    assert len(changed) == 3 * 4
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (name not in changed), name
    whole = open_clip.create_model(f"local-dir:{lora / 'open_clip'}").state_dict()
    for name, tensor in after.items():  # the same sum
        assert torch.equal(whole[name], tensor), name


@pytest.mark.slow
def test_a_run_stands_beside_others(lora, tune_lora):
    other = tune_lora(epochs=1, lora_rank=0, lr=1e-3).run
    assert "quality" in json.dumps(compare(CompareConfig(runs=[lora, other])).to_json())


@pytest.mark.slow
def test_cached_activations_give_the_losses_of_the_whole_towers(tune_lora):
    cached, plain = (loss_of(tune_lora(boundary_cache=cache, batch_size=9)) for cache in (True, False))
    np.testing.assert_allclose(cached, plain, atol=1e-4)
    assert abs(plain[0] - plain[-1]) > 1e-3  # it is a training that moves


@pytest.mark.slow
def test_an_interrupted_training_ends_with_the_additions_of_an_unbroken_one(
    tune_lora, tmp_path, few_cache, monkeypatch
):
    """Bit for bit, with other rates by depth and gradients of several batches."""
    settings = {"save_minutes": 1e-9, "layer_decay": 0.8, "accumulate": 2}
    whole = open_run(tune_lora(**settings).run).tuned_tensors()
    again = FinetuneConfig(cache=few_cache, out=tmp_path / "again", **(QUICK | LORA | settings))
    with monkeypatch.context() as patch:
        interrupted(patch, saves=2)
        with pytest.raises(InterruptedError):
            finetune(again)
    (state,) = tmp_path.glob(".again.*.resume/42.safetensors")
    assert 0 < int(StateFile(state).load()[1]["step"]) < 6
    resumed = open_run(finetune(again).run).tuned_tensors()
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.slow
def test_every_repeat_starts_from_the_untouched_tower(tune_lora):
    result, second = tune_lora(epochs=1, repeats=2), tune_lora(epochs=1, seed=43)
    values = result.metrics["test"]["quality"]["srocc"]["values"]
    assert values[1] == second.metrics["test"]["quality"]["srocc"]
    rows, same = read_csv(result.run / "predictions_43.csv"), read_csv(second.run / "predictions.csv")
    np.testing.assert_array_equal(numbers(rows, "quality"), numbers(same, "quality"))


@pytest.mark.slow
def test_sixteen_bits_and_less_memory(tune_lora, few_folder):
    run = tune_lora(epochs=1, precision="bf16", checkpointing=True, lora_layers="mlp", freeze_text_layers=4).run
    assert (run / "residual_lora_R4_mlp_4L_best.safetensors").is_file()
    rows = read_csv(run / "predictions.csv")[:6]
    found = Scorer.load(run, device="cpu").score(
        [few_folder / row["image"] for row in rows], [row["prompt"] for row in rows]
    )
    scored_alike(found.scores, rows, ["quality", "consistency"])


@pytest.mark.slow
def test_two_processes_end_with_the_additions_of_one(tune_lora, tmp_path, few_cache):
    """But for rounding; A and B are drawn alike in both."""
    assert TORCHRUN
    alone, start = (open_run(tune_lora(**more).run).tuned_tensors() for more in ({}, {"lr": 0.0, "epochs": 1}))
    two = under_torchrun(tmp_path / "two", few_cache, **(QUICK | LORA))
    for name, tensor in alone.items():
        way = float((tensor - start[name]).norm())
        assert way > 0
        assert float((two[name] - tensor).norm()) < 5e-2 * way, name


def test_modes_rates_and_presets():
    assert run_mode(config(lora_rank=8), 9) == "residual_lora_R8_9L"
    assert (
        run_mode(config(lora_rank=8, lora_layers="attention", residual_learning=False), 0) == "direct_lora_R8_attention"
    )
    assert (config(lora_rank=8).lr, config(lora_rank=8, lr=3e-5).lr, config().lr) == (3e-4, 3e-5, 3e-5)
    changed, about = apply_preset(config(preset="small", lora_rank=8), num_rows=100)
    assert (changed.freeze_layers, changed.lr, changed.lora_rank) == (0.83, 3e-4, 8)
    assert about.unused == "learning rate 1e-05: that of whole weights, not of --lora-rank"


@pytest.mark.slow
def test_what_looks_unwise_is_said(tune_lora, capsys):
    tune_lora(epochs=1, lr=3e-5)
    assert "warning: --lr 3e-05 is outside 0.0001 to 0.001" in capsys.readouterr().err
    tune_lora(epochs=1, lr=3e-5, lora_rank=0)
    said = capsys.readouterr().err
    assert "warning: --lora-alpha is not used: give --lora-rank" in said
    assert "--lora-layers" not in said


def test_damaged_additions_are_refused(lora, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(lora, run)
    path = run / f"{NAME}_best.safetensors"
    with safe_open(path, "pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    del tensors[next(name for name in tensors if name.endswith(".lora_b"))]
    save_file(tensors, path, metadata=about)
    with pytest.raises(UserError) as error:
        Scorer.load(run, device="cpu")
    assert str(error.value) == f"{path}: holds damaged additions (not pairs of A and B); fine-tune again"


def test_a_shared_folder_scores_to_the_bit(lora, tmp_path, few_folder):
    shared = share(ShareConfig(run=lora, out=tmp_path / "shared", trained_on="drawn pictures")).out
    assert (shared / f"{NAME}_best.safetensors").is_file()
    images, prompts = sorted((few_folder / "images").iterdir())[:3], ["a red circle", "two squares", "a cat"]
    found, expected = (Scorer.load(run, device="cpu").score(images, prompts).scores.columns() for run in (shared, lora))
    for name, column in expected.items():
        np.testing.assert_array_equal(found[name], column, err_msg=name)


@pytest.mark.slow
def test_an_exported_scorer_has_the_sums(lora, tmp_path):
    pytest.importorskip("onnxruntime")
    export(ExportConfig(run=lora, out=tmp_path / "scorer.onnx"))  # refuses a graph whose scores are not the run's
    assert (tmp_path / "scorer.onnx").stat().st_size > 1e6
