"""Fine-tuning end to end on a few drawn images: what trains, what is written, and who can use it."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open

from deltaclip.base.errors import UserError
from deltaclip.features.backbone.load import load_backbone, save_model
from deltaclip.features.backbone.weights import TINY, find_weights
from deltaclip.features.extract import extract
from deltaclip.features.settings import ExtractConfig
from deltaclip.pipeline.ablate import ablate
from deltaclip.pipeline.api.scorer import Scorer
from deltaclip.pipeline.evaluate import evaluate
from deltaclip.pipeline.finetune import finetune
from deltaclip.pipeline.loop.epochs import StateFile
from deltaclip.pipeline.predict import predict
from deltaclip.pipeline.runs.folder import open_run
from deltaclip.pipeline.settings import AblateConfig, EvaluateConfig, FinetuneConfig, PredictConfig, TrainConfig
from deltaclip.pipeline.train import train
from deltaclip.tests.pipeline.conftest import TORCHRUN, numbers, read_csv, read_json, write_csv, written_again

# Higher rates than anybody would take, so that two epochs of a few steps move everything.
QUICK = {"epochs": 2, "batch_size": 8, "lr": 1e-3, "precision": "fp32", "device": "cpu"}


@pytest.fixture(scope="session")
def tuned(tmp_path_factory, few_cache):
    """Return a run with both towers partly frozen, and the whole model beside; never written to by a test."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    return finetune(
        FinetuneConfig(cache=few_cache, out=out, freeze_layers=4, freeze_text_layers=3, save_full=True, **QUICK)
    )


@pytest.fixture
def tune_few(tmp_path, few_cache):
    def run(**settings):
        out = tmp_path / f"tuned{len(list(tmp_path.glob('tuned*')))}"
        return finetune(FinetuneConfig(**{"cache": few_cache, "out": out, **QUICK, **settings}))

    return run


@pytest.fixture
def few_again(tmp_path, few_folder, few_cache):
    """Return a function that makes a table and its cache of the few images from changed rows; none is embedded anew."""

    def make(change, **settings):
        table, cache = tmp_path / "again.csv", tmp_path / "again.h5"
        write_csv(table, [change(place, row) for place, row in enumerate(read_csv(few_folder / "demo.csv"))])
        shutil.copyfile(few_cache, cache)
        extract(
            ExtractConfig(
                data=str(table), out=cache, backbone="tiny", image_root=few_folder, **settings, views="center"
            )
        )
        return table, cache

    return make


def refused(run, **settings):
    with pytest.raises(UserError) as error:
        run(**settings)
    return str(error.value)


def scored_alike(scores, rows, targets):
    """Scores are those that a table has, with base and correction."""
    assert list(scores.targets) == targets
    for target in targets:
        for name in (target, f"{target}_base", f"{target}_delta"):
            np.testing.assert_allclose(scores.columns()[name], numbers(rows, name), atol=2e-5, err_msg=name)


def loss_of(result):
    return numbers(read_csv(result.run / "history.csv"), "train_loss")


def test_the_run_has_what_train_writes(tuned):
    names = {entry.name for entry in tuned.run.iterdir()}
    assert names == {
        *("config.json", "history.csv", "metrics.json", "predictions.csv", "rows.safetensors", "open_clip"),
        "trust.safetensors",
        "residual_partial_freeze_4L_best.safetensors",
    }
    assert not list(tuned.run.parent.glob(".*"))  # neither state nor lock is left
    metrics = read_json(tuned.run / "metrics.json")
    sides, judged = ("test", "val", "train"), ("floors", "per_source", "diagnostics", "verdict", "intervals", "unlike")
    assert metrics.keys() == {"split", *sides, *judged}
    assert "srocc_ci" in metrics["test"]["quality"]
    config = read_json(tuned.run / "config.json")
    assert (config["stage"], config["mode"]) == ("finetune", "residual_partial_freeze_4L")
    assert config["frozen"] == {"image": 4, "text": 3}
    assert config["settings"]["freeze_layers"] == 4
    words = "\n".join(config["description"])
    assert "image tower: 4 of 6 blocks frozen, embeddings too; " in words
    assert "text tower: 3 of " in words
    assert "frozen part   run once, activations kept; training images: as they are" in words
    assert "quality       clamp(sigmoid(w . v + b0) + 0.2 tanh(MLP(v)), 0, 1)" in words
    assert len(read_csv(tuned.run / "history.csv")) == 2


def test_the_checkpoint_holds_what_trains_and_no_more(tuned):
    with safe_open(tuned.run / "residual_partial_freeze_4L_best.safetensors", "pt") as file:
        names = {name for name in file.keys() if name.startswith("backbone.")}  # noqa: SIM118 - no dict
        header = json.loads(file.metadata()["deltaclip"])
    blocks = {
        int(name.split(".resblocks.")[1].split(".")[0]) for name in names if "visual" in name and "resblocks" in name
    }
    assert blocks == {4, 5}
    assert not [name for name in names if "conv1" in name or "token_embedding" in name]
    assert "backbone.visual.proj" in names
    assert len(header["request"]["weights_sha256"]) == 64


def test_towers_moved_and_what_is_frozen_did_not(tuned):
    source = find_weights("tiny", None)
    before = load_backbone(source, device="cpu", precision="fp32").model.state_dict()
    after = Scorer.load(tuned.run, device="cpu").backbone.model.state_dict()
    changed = open_run(tuned.run).tuned_tensors().keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (name not in changed), name


def test_predict_scores_what_the_run_recorded(tuned, few_folder):
    rows = read_csv(tuned.run / "predictions.csv")[:12]
    scorer = Scorer.load(tuned.run, device="cpu")
    found = scorer.score([few_folder / row["image"] for row in rows], [row["prompt"] for row in rows])
    scored_alike(found.scores, rows, ["quality", "consistency"])


def predicted_as_recorded(run, table, folder, targets):
    """`predict` gives the scores of a run's own rows that it recorded."""
    recorded = read_csv(run / "predictions.csv")
    found = predict(PredictConfig(run=run, target=str(table), image_root=folder)).columns
    assert list(found["image"]) == [row["image"] for row in recorded]
    for name in (f"{target}{part}" for target in targets for part in ("", "_base", "_delta")):
        np.testing.assert_allclose(found[name], numbers(recorded, name), atol=2e-5, err_msg=name)
    return recorded


@pytest.mark.slow
def test_three_targets_are_learned_and_predicted(tune_few, few_again, few_folder):
    """One of them of a name of its own, with labels in two thirds of the rows; each has a weight and a scale."""
    names = ["quality", "consistency", "composition"]
    table, cache = few_again(
        lambda place, row: row | {"comp": "" if place % 3 == 0 else f"{1 + place % 5}"},
        target=["composition=comp:image"],
        label_range=["composition=1,5"],
    )
    scales = {"quality": 0.1, "consistency": 0.2, "composition": 0.3}
    settings = {"cache": cache, "freeze_layers": 4, "freeze_text_layers": 3, "base": "identity"}
    run = tune_few(scale="0.2,quality=0.1,composition=0.3", **settings).run
    config, metrics = read_json(run / "config.json"), read_json(run / "metrics.json")
    assert config["labels"] == names == list(metrics["test"]) == list(config["best_epoch"])
    assert config["scales"] == pytest.approx(scales)
    assert config["frozen"] == {"image": 4, "text": 3}
    history = read_csv(run / "history.csv")
    assert {*(f"scale_{name}" for name in names), *(f"val_{name}_srocc" for name in names)} <= history[0].keys()
    with safe_open(run / "residual_partial_freeze_4L_best.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    moved = {name.split("_head")[0] for name, found in tensors.items() if name.endswith(".out.weight") and found.any()}
    assert moved == set(names)  # the last layers of corrections start at 0
    rows = predicted_as_recorded(run, table, few_folder, names)
    assert [row["composition_label"] for row in rows[:4]] == ["", "0.25", "0.5", ""]
    assert all((row["q"], row["c"]) == (row["quality"], row["consistency"]) for row in rows)
    plain = tune_few(weight="composition=0", **settings)
    assert list(plain.metrics["test"]) == names[:2]


@pytest.mark.slow
def test_targets_of_images_alone_leave_the_text_tower_as_it_is(tune_few, few_again, few_folder, capsys):
    names = ["quality", "authenticity"]
    table, cache = few_again(
        lambda place, row: {"image": row["image"], "quality": row["quality"], "authenticity": f"{place % 7}"},
        label_range=["authenticity=0,6"],
    )
    last = {"fractions": "0.8,0,0.2"}  # without validation rows the last epoch is kept
    run = tune_few(cache=cache, freeze_layers=4, freeze_text_layers=2, **last).run
    said = capsys.readouterr().err
    assert "warning: --freeze-text-layers is not used: nothing that trains sees the prompt" in said
    config = read_json(run / "config.json")
    assert (config["labels"], config["frozen"]) == (names, {"image": 4, "text": 4})
    trained = open_run(run).tuned_tensors()
    assert trained
    assert all("visual." in name for name in trained)
    before = load_backbone(find_weights("tiny", None), device="cpu", precision="fp32").model.state_dict()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in trained.items())
    rows = predicted_as_recorded(run, table, few_folder, names)
    assert not {"c", "consistency"} & rows[0].keys()
    assert evaluate(EvaluateConfig(run=run)).scores.startswith("the scores that the run recorded; 16 of them")


@pytest.mark.slow
def test_a_cache_decoded_otherwise_is_trained_on_its_own_pixels(tune_few, tmp_path, few_folder):
    """With the boundary cache and without it, and what the run scores later is what it recorded."""
    data, out = str(few_folder / "demo.csv"), tmp_path / "fast.h5"
    cache = extract(
        ExtractConfig(data=data, out=out, backbone="tiny", decode="fast", precision="fp32", views="center")
    ).cache
    settings = {"cache": cache, "epochs": 1, "freeze_layers": 4}
    kept, plain = (tune_few(boundary_cache=kept, **settings) for kept in (True, False))
    np.testing.assert_allclose(loss_of(kept), loss_of(plain), atol=1e-5)
    rows = read_csv(kept.run / "predictions.csv")[:12]
    found = Scorer.load(kept.run, device="cpu").score(
        [few_folder / row["image"] for row in rows], [row["prompt"] for row in rows]
    )
    scored_alike(found.scores, rows, ["quality", "consistency"])


def test_evaluate_takes_recorded_scores_or_scores_images(tuned, tmp_path, few_cache, few_folder):
    own = evaluate(EvaluateConfig(run=tuned.run))
    recorded = "the scores that the run recorded; 16 of them, scored anew, differ by at most "
    assert own.scores.startswith(recorded)
    # The table has six digits of each score.
    assert own.metrics["test"]["quality"]["srocc"] == pytest.approx(tuned.metrics["test"]["quality"]["srocc"], abs=1e-4)
    moved = tmp_path / "elsewhere" / "moved.h5"
    moved.parent.mkdir()
    shutil.copyfile(few_cache, moved)
    assert evaluate(EvaluateConfig(run=tuned.run, cache=moved)).scores == own.scores
    gone = few_folder.rename(few_folder.with_name("elsewhere"))
    try:
        unchecked = evaluate(EvaluateConfig(run=tuned.run)).scores
    finally:
        gone.rename(few_folder)
    assert unchecked.startswith(f"the scores that the run recorded, not checked ({few_folder}: 48 of 48 images are not")
    sides = {row["image"]: row["split"] for row in read_csv(tuned.run / "predictions.csv")}
    rows = [row for row in read_csv(few_folder / "demo.csv") if sides[row["image"]] == "test"]
    write_csv(tmp_path / "part.csv", rows)
    part, other = tmp_path / "part.h5", tmp_path / "other"
    extract(
        ExtractConfig(data=str(tmp_path / "part.csv"), out=part, backbone="tiny", image_root=few_folder, views="center")
    )
    anew = evaluate(EvaluateConfig(run=tuned.run, cache=part))
    assert anew.scores == "scored from the images with the run's own tower"
    for label, found in anew.metrics["test"].items():
        assert found["srocc"] == pytest.approx(tuned.metrics["test"][label]["srocc"], abs=1e-4)
    # Other pictures under these names are not what people rated.
    shutil.copytree(few_folder, other)
    first, second = (other / row["image"] for row in rows[:2])
    first.write_bytes(second.read_bytes())
    assert refused(evaluate_run, of=tuned.run, cache=part, image_root=other) == (
        f"{first}: changed since its content was recorded; give the images as they were extracted"
    )


def test_the_whole_model_is_one_of_open_clip(tuned, few_folder):
    import open_clip
    from PIL import Image

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tuned.run / 'open_clip'}")
    model.eval()
    ours = Scorer.load(tuned.run, device="cpu").backbone
    image = preprocess(Image.open(next((few_folder / "images").glob("*.png"))).convert("RGB"))[None]
    tokens = ours.tokenizer(["a red circle"], context_length=ours.context_length)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(image), ours.model.encode_image(image))
        torch.testing.assert_close(model.encode_text(tokens), ours.model.encode_text(tokens))


@pytest.mark.parametrize(
    ("settings", "mode"),
    [
        ({"freeze_layers": 0.75, "residual_learning": False}, "direct_partial_freeze_5L"),
        ({"partial_freeze": False, "freeze_text_layers": 4}, "residual_full"),
    ],
)
def test_modes_have_names_of_their_own(tune_few, settings, mode):
    result = tune_few(epochs=1, **settings)
    assert [path.name for path in result.run.glob("*_best*")] == [f"{mode}_best.safetensors"]


@pytest.mark.slow
def test_heads_of_a_run_are_heads_trained_first(tune_few, tmp_path, few_cache):
    alike = {"base": "identity", "batch_size": 8}  # a calibrated base is hard to beat in three epochs
    heads = train(TrainConfig(cache=few_cache, out=tmp_path / "heads", epochs=3, lr=3e-3, device="cpu", **alike))
    started, first, plain = (
        loss_of(tune_few(epochs=1, head_lr=3e-3, base="identity", **settings))
        for settings in ({"init_heads": heads.run}, {"head_epochs": 3}, {})
    )
    assert max(heads.best_epoch.values()) > 0
    np.testing.assert_array_equal(started, first)
    assert not np.isclose(plain, first).any()


def test_heads_that_do_not_belong_are_refused_by_name(tune_few, tuned, tmp_path, *, few_cache, few_again):
    assert refused(tune_few, init_heads=tuned.run) == (
        f"{tuned.run}: its heads belong to the tower that it changed; give a run of `deltaclip train`"
    )
    heads = train(TrainConfig(cache=few_cache, out=tmp_path / "heads", epochs=1, base="calibrated")).run
    assert refused(tune_few, init_heads=heads, scale="quality=0.1") == (
        f"{heads}: its heads have a quality scale of 0.2, the settings ask for 0.1; give --scale as that run had it, "
        "or train heads anew"
    )
    assert refused(tune_few, init_heads=heads, residual_learning=False) == (
        f"{heads}: its heads have kind residual, the settings ask for direct; give --residual-learning as that run "
        "had it, or train heads anew"
    )
    assert "has seen" in refused(tune_few, init_heads=heads, seed=7)
    rated = few_again(lambda place, row: row | {"authenticity": f"{place % 5}"}, label_range=["authenticity=0,4"])[1]
    assert refused(tune_few, cache=rated, init_heads=heads) == (
        f"{heads}: its heads predict quality and consistency, the cache has quality and consistency and authenticity; "
        "train heads on this cache first"
    )


@pytest.mark.slow
def test_heads_that_know_the_prompts_of_test_rows_are_refused(tune_few, tmp_path, few_folder, few_cache):
    """Heads of other images of the same prompts have seen no test row, but what a clean split keeps from them."""
    rows = read_csv(few_folder / "demo.csv")
    caches = {}
    for name, half in (("even", rows[::2]), ("odd", rows[1::2])):
        with (tmp_path / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(half)
        data, out = str(tmp_path / f"{name}.csv"), tmp_path / f"{name}.h5"
        caches[name] = extract(
            ExtractConfig(data=data, out=out, backbone="tiny", image_root=few_folder, views="center")
        ).cache
    heads = train(TrainConfig(cache=caches["even"], out=tmp_path / "heads", epochs=1, seed=7, base="calibrated")).run
    line = refused(tune_few, cache=caches["odd"], init_heads=heads)
    assert "test rows, or others of their images, prompts or groups, of split seed 42 in training" in line
    assert tune_few(cache=caches["odd"], init_heads=heads, seed=7, epochs=1, freeze_layers=5).run.is_dir()


def test_heads_that_know_test_rows_under_other_names_of_groups_are_refused(tune_few, tmp_path, few_folder, few_cache):
    heads = train(TrainConfig(cache=few_cache, out=tmp_path / "heads", epochs=1, base="calibrated")).run
    rows = read_csv(few_folder / "demo.csv")
    with (tmp_path / "regrouped.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], "group"])
        writer.writeheader()
        writer.writerows(row | {"group": f"g{place // 8}"} for place, row in enumerate(rows))  # two prompts each
    shutil.copyfile(few_cache, tmp_path / "regrouped.h5")
    config = ExtractConfig(
        data=str(tmp_path / "regrouped.csv"),
        out=tmp_path / "regrouped.h5",
        backbone="tiny",
        image_root=few_folder,
        views="center",
    )
    line = refused(tune_few, cache=extract(config).cache, init_heads=heads)
    assert re.search(r"has seen \d+ test rows, or others of their images, prompts or groups, of split seed 42", line)


def test_heads_that_know_near_copies_of_test_rows_are_refused(tune_few, tmp_path, few_folder, few_cache):
    """Files of other bytes and names, with other prompts: what they show is known by the embeddings alone."""
    heads = train(TrainConfig(cache=few_cache, out=tmp_path / "heads", epochs=1, base="calibrated")).run
    line = refused(tune_few, cache=written_again(tmp_path, few_folder), init_heads=heads)
    assert re.search(r"has seen \d+ test rows, or others of their images, prompts or groups, of split seed 42", line)


@pytest.mark.slow
def test_recorded_scores_are_not_taken_for_other_rows(tuned, tmp_path, few_cache):
    """A cache of the same plan may by now have an image that could not be read when the run was made."""
    run = tmp_path / "run"
    shutil.copytree(tuned.run, run)
    table = run / "predictions.csv"
    lines = table.read_text(encoding="utf-8").splitlines(keepends=True)
    table.write_text("".join(lines[:-1]), encoding="utf-8")
    assert evaluate(EvaluateConfig(run=run)).scores == "scored from the images with the run's own tower"
    moved = shutil.copytree(TINY, tmp_path / "moved")
    found = evaluate(EvaluateConfig(run=run, backbone=f"local-dir:{moved}"))
    assert found.metrics == evaluate(EvaluateConfig(run=run)).metrics
    (moved / "open_clip_model.safetensors").unlink()
    assert f"{moved}: has no weights" in refused(evaluate_run, of=run, backbone=f"local-dir:{moved}")
    assert "--pretrained" in refused(evaluate_run, of=run, backbone="tiny", pretrained="other")
    # A run of `train` scores embeddings: it has no use for a backbone.
    heads = train(TrainConfig(cache=few_cache, out=tmp_path / "heads", epochs=1, base="calibrated")).run
    for name in ("backbone", "pretrained"):
        assert refused(evaluate_run, of=heads, **{name: "tiny"}).startswith(f"--{name}: would not be used; ")


def evaluate_run(**settings):
    return evaluate(EvaluateConfig(run=settings.pop("of"), **settings))


def test_images_that_are_gone_or_have_changed_are_named(tune_few, tmp_path, few_cache, few_folder):
    folder = tmp_path / "copy"
    shutil.copytree(few_folder, folder)
    image = next(iter(sorted((folder / "images").iterdir())))
    image.write_bytes(sorted((folder / "images").iterdir())[1].read_bytes())
    assert f"{image}: cannot be read (changed since its content was recorded" in refused(
        tune_few, image_root=folder, freeze_layers=0
    )
    image.unlink()
    assert refused(tune_few, image_root=folder) == (
        f"{folder}: 1 of 48 images are not there, the first: {image.name}; "
        "give --image-root FOLDER of the images that were extracted"
    )


@pytest.mark.slow
def test_repeats_keep_the_first(tune_few):
    result = tune_few(epochs=1, repeats=2)
    single = tune_few(epochs=1)
    assert result.metrics["test"]["quality"]["srocc"]["values"][0] == single.metrics["test"]["quality"]["srocc"]
    first, other = (open_run(one.run).tuned_tensors() for one in (result, single))
    assert all(torch.equal(first[name], other[name]) for name in first)
    assert (result.run / "predictions_43.csv").is_file()


def test_presets_freeze_and_an_option_wins(tune_few, capsys):
    result = tune_few(preset="small", epochs=1, batch_size=16)
    settings = read_json(result.run / "config.json")["settings"]
    assert (settings["freeze_layers"], settings["lr"], settings["scale"]) == (0.83, 1e-3, "0.1")
    assert "preset        small (for under 1,000 rows): " in capsys.readouterr().err
    assert result.run.joinpath("residual_partial_freeze_5L_best.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"freeze_text_layers": 2}, {"augment": "views", "crops": 1}])
def test_cached_activations_give_the_losses_of_the_whole_towers(tune_few, settings):
    """fp32: both ways compute the same numbers, in batches of other sizes; over 20 steps they stay within 1e-4."""
    steps = {"epochs": 5, "batch_size": 9, "freeze_layers": 4, **settings}  # 4 steps an epoch
    cached, plain = (loss_of(tune_few(boundary_cache=cache, **steps)) for cache in (True, False))
    assert len(cached) == 5
    np.testing.assert_allclose(cached, plain, atol=1e-4)
    assert abs(plain[0] - plain[-1]) > 1e-2  # it is a training that moves


def test_activations_are_computed_once_and_said_before(tune_few, few_cache, capsys):
    settings = {"epochs": 1, "freeze_layers": 2, "augment": "views", "crops": 1}
    tune_few(**settings)
    said = capsys.readouterr().err
    assert "boundary      48 images x 3 views after block 2: " in said
    files = sorted(few_cache.parent.glob("few.boundary-image-2-*"))
    assert [path.name for path in files] == [
        f"few.boundary-image-2-{view}-fp32.h5" for view in ("center", "crop-1", "flip")
    ]
    written = [path.stat().st_mtime_ns for path in files]
    tune_few(**settings)
    assert "boundary " not in capsys.readouterr().err
    assert [path.stat().st_mtime_ns for path in files] == written


@pytest.mark.slow
def test_a_killed_command_goes_on_bit_for_bit(tune_few, tmp_path, few_cache):
    """A real process, killed by SIGKILL once it has saved a state within an epoch."""
    out = tmp_path / "killed" / "run"
    command = [sys.executable, "-m", "deltaclip", "finetune", str(few_cache), "--out", str(out), "--epochs", "10"]
    command += ["--batch-size", "4", "--lr", "1e-3", "--precision", "fp32", "--device", "cpu", "--save-minutes", "1e-9"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        for _ in range(2400):
            if states := list(out.parent.glob(".run.*.resume/42.safetensors")):
                break
            assert process.poll() is None, "it ended before it had saved anything"
            time.sleep(0.05)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    taken = int(StateFile(states[0]).load()[1]["step"])
    assert 0 < taken < 10 * 9
    settings = {"epochs": 10, "batch_size": 4, "save_minutes": 0.0}
    resumed, whole = (
        finetune(FinetuneConfig(**{"cache": few_cache, "out": out, **QUICK, **settings})),
        tune_few(**settings),
    )
    np.testing.assert_array_equal(loss_of(resumed), loss_of(whole))
    first, other = (open_run(one.run) for one in (resumed, whole))
    assert first.metrics == other.metrics
    ours, theirs = first.tuned_tensors(), other.tuned_tensors()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list(out.parent.glob(".*"))


@pytest.mark.slow
def test_augmentations_change_what_is_trained_on_and_repeat(tune_few):
    plain = loss_of(tune_few(epochs=1, boundary_cache=False))
    found = {name: loss_of(tune_few(epochs=1, boundary_cache=False, augment=name)) for name in ("views", "crops")}
    assert not np.isclose(found["views"], plain).any()
    assert not np.isclose(found["crops"], found["views"]).any()
    np.testing.assert_array_equal(loss_of(tune_few(epochs=1, boundary_cache=False, augment="crops")), found["crops"])


@pytest.mark.slow
def test_checkpointing_and_parts_change_memory_not_losses(tune_few):
    plain = loss_of(tune_few(dropout=0.0))
    np.testing.assert_allclose(loss_of(tune_few(dropout=0.0, checkpointing=True)), plain, rtol=1e-5)
    np.testing.assert_allclose(loss_of(tune_few(dropout=0.0, batch_size=4, accumulate=2)), plain, rtol=1e-4)


@pytest.mark.slow
def test_rates_are_felt(tune_few):
    plain = loss_of(tune_few())
    for settings in ({"lr": 1e-4}, {"head_lr": 1e-4}, {"layer_decay": 0.3}, {"precision": "bf16"}):
        assert not np.array_equal(loss_of(tune_few(**settings)), plain), settings


@pytest.mark.slow
def test_ablate_compares_frozen_partial_and_full(tmp_path, few_cache, capsys, tune_few):
    out = tmp_path / "ablation"
    settings = {"cache": few_cache, "repeats": 1, "epochs": 1, "device": "cpu"}
    result = ablate(AblateConfig(out=out, finetune=True, against="partial-freeze", **settings))
    assert "finetune      2 trainings x 1 epochs x 36 rows: 72 images forward and back" in capsys.readouterr().err
    assert {"residual", "partial-freeze", "full"} <= result.compared.keys()
    partial = tune_few(epochs=1, batch_size=32, lr=3e-5, precision="auto").metrics["test"]["quality"]["srocc"]
    found = result.compared["partial-freeze"]["quality"]["test"]["srocc"]["mean"]
    assert found == pytest.approx(partial)
    assert result.compared["full"]["quality"]["difference"]["mean"] is not None
    assert read_json(out / "config.json")["variants"]["full"] == {"freeze_layers": 0.0}
    assert not list(few_cache.parent.glob(".*resume*"))
    assert refused(lambda **given: ablate(AblateConfig(**settings, **given)), against="full") == (
        "--against: 'full' trains CLIP; add --finetune"
    )


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_batch(tune_few, tmp_path, few_cache):
    """Under torchrun, gloo: rows are shared out, embeddings and gradients exchanged; a loss that compares rows too."""
    settings = {"epochs": 2, "batch_size": 8, "loss": "plcc", "freeze_layers": 4, "freeze_text_layers": 3, "lr": 3e-4}
    alone = tune_few(**settings)
    out = tmp_path / "two" / "run"
    command = [*TORCHRUN, "finetune", str(few_cache), "--out", str(out), "--device", "cpu", "--precision", "fp32"]
    for name, value in settings.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.stdout.count("split: grouped") == 1
    assert done.stderr.count("2 processes") == 1
    np.testing.assert_allclose(numbers(read_csv(out / "history.csv"), "train_loss"), loss_of(alone), atol=1e-5)
    for name in ("quality", "consistency"):
        ours, theirs = (numbers(read_csv(run / "predictions.csv"), name) for run in (out, alone.run))
        # A correlation does not know an offset: its gradient is rounding, which Adam takes for a direction.
        inside = (theirs > 0.01) & (theirs < 0.99)
        difference = (ours - theirs)[inside]
        np.testing.assert_allclose(difference, np.median(difference), atol=1e-4)
    assert not list(out.parent.glob(".*"))


@pytest.mark.slow
def test_a_whole_model_of_a_known_name_is_loaded_by_it(tmp_path):
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    made = open_clip.create_model("ViT-S-32-alt")
    save_file({name: tensor.clone() for name, tensor in made.state_dict().items()}, tmp_path / "weights.safetensors")
    backbone = load_backbone(
        find_weights("ViT-S-32-alt", str(tmp_path / "weights.safetensors")), device="cpu", precision="fp32"
    )
    with torch.no_grad():
        backbone.model.visual.proj.mul_(2)
    save_model(backbone, tmp_path / "open_clip")
    path = tmp_path / "open_clip" / "open_clip_model.safetensors"
    pixels, ids = torch.rand(2, 3, 224, 224), backbone.tokenizer(["a cat", "two dogs"])
    for name, tag in (("ViT-S-32-alt", str(path)), (f"local-dir:{path.parent}", None)):
        model = open_clip.create_model(name, pretrained=tag).eval()
        with torch.no_grad():
            torch.testing.assert_close(model.encode_image(pixels), backbone.model.encode_image(pixels))
            torch.testing.assert_close(model.encode_text(ids), backbone.model.encode_text(ids))
