"""ONNX files under onnxruntime, on fresh inputs, against torch and against what the run itself says."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from deltaclip.base.errors import UserError
from deltaclip.features.data.images import open_image
from deltaclip.pipeline.api.scorer import Scorer
from deltaclip.pipeline.export import _draw_embeddings, export
from deltaclip.pipeline.model.fitted_base import BaseShape, MemberShape
from deltaclip.pipeline.model.heads import build_heads
from deltaclip.pipeline.model.scores import Batch
from deltaclip.pipeline.rows.cached_rows import load_rows
from deltaclip.pipeline.runs.folder import open_run
from deltaclip.pipeline.runs.prediction_table import base_terms, score
from deltaclip.pipeline.settings import ExportConfig, TrainConfig
from deltaclip.pipeline.train import train

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")

ROWS = (1, 3, 8)
# fp32 in another order of summation; head outputs lie in [0, 1].
CLOSE = 1e-5
OF_QUALITY = ["quality", "quality_base", "quality_delta"]


def session(path):
    return onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])


def about(path):
    (entry,) = [entry for entry in onnx.load(path).metadata_props if entry.key == "deltaclip"]
    return json.loads(entry.value)


def unit_rows(seed, rows, width):
    found = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def by_formula(heads, v, t):
    """Scores of residual heads from their weights alone, float64."""
    state = {name: value.double().numpy() for name, value in heads.state_dict().items()}
    v, t = v.astype(np.float64), t.astype(np.float64)
    erf = np.vectorize(math.erf)

    def layer(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def gelu(x):
        return x * (1 + erf(x / np.sqrt(2))) / 2

    s = (v * t).sum(axis=1)
    q_base = 1 / (1 + np.exp(-layer(v, "quality_head.base")[:, 0]))
    dq = np.tanh(layer(gelu(layer(v, "quality_head.mlp.wide")), "quality_head.mlp.out")[:, 0])
    fusion = "consistency_head.fusion"
    c_base = np.clip(state["consistency_head.slope"] * (s + 1) / 2 + state["consistency_head.offset"], 0, 1)
    x = np.concatenate([v, t, s[:, None]], axis=1)
    x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
    hidden = gelu(layer(gelu(layer(x, f"{fusion}.wide")), f"{fusion}.narrow"))
    dc = np.tanh(layer(hidden, f"{fusion}.out")[:, 0])
    scale_q, scale_c = (state[f"{target}_head.scale.value"] for target in ("quality", "consistency"))
    return np.clip(q_base + scale_q * dq, 0, 1), np.clip(c_base + scale_c * dc, 0, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("part", "asked"), [("heads", "v"), ("scorer", "pixels")])
def test_a_run_that_learned_quality_alone_asks_for_no_prompt(demo_run, tmp_path, part, asked):
    run, out = shutil.copytree(demo_run, tmp_path / "run"), tmp_path / f"{part}.onnx"
    config = json.loads((run / "config.json").read_text(encoding="utf-8")) | {"labels": ["quality"]}
    (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
    result = export(ExportConfig(run=run, out=out, part=part))
    assert (result.inputs, result.outputs) == ([asked], OF_QUALITY)
    assert [each.name for each in session(out).get_inputs()] == [asked]
    names = {each.name for each in onnx.load(out).graph.initializer}
    assert not [name for name in names if "token_embedding" in name or "consistency" in name]  # they see the prompt


@pytest.mark.slow
def test_heads_give_the_formulas_of_the_specification(demo_run, tmp_path):
    out = tmp_path / "heads.onnx"
    result = export(ExportConfig(run=demo_run, out=out, part="heads"))
    assert max(result.largest_difference.values()) < CLOSE
    assert result.size_bytes == out.stat().st_size
    assert result.to_json()["rows_per_s"].keys() == {"torch", "onnxruntime"}
    heads = open_run(demo_run).heads
    for rows in ROWS:
        v, t = unit_rows(rows, rows, heads.dim), unit_rows(rows + 100, rows, heads.dim)
        q, q_base, q_delta, c, c_base, c_delta = session(out).run(None, {"v": v, "t": t})
        expected_q, expected_c = by_formula(heads, v, t)
        assert q == pytest.approx(expected_q, abs=CLOSE)
        assert c == pytest.approx(expected_c, abs=CLOSE)
        assert np.clip(q_base + q_delta, 0, 1) == pytest.approx(q, abs=CLOSE)
        assert np.clip(c_base + c_delta, 0, 1) == pytest.approx(c, abs=CLOSE)
    facts = about(out)
    assert facts["labels"] == ["quality", "consistency"]
    assert facts["backbone"]["preprocessing"]["size"] == [96, 96]
    assert facts["backbone"]["context_length"] == 77
    assert len(facts["backbone"]["weights_sha256"]) == len(facts["checkpoint_sha256"]) == 64
    assert facts["tuned"] is False
    assert {entry.version for entry in onnx.load(out).opset_import if entry.domain == ""} == {23}


@pytest.mark.slow
def test_three_targets_are_outputs_each_with_its_parts(colour_run, tmp_path):
    out = tmp_path / "heads.onnx"
    result = export(ExportConfig(run=colour_run, out=out, part="heads"))
    targets = ("quality", "consistency", "colour")
    assert result.outputs == [f"{target}{part}" for target in targets for part in ("", "_base", "_delta")]
    assert max(result.largest_difference.values()) < CLOSE
    assert about(out)["labels"] == list(targets)
    heads = open_run(colour_run).heads
    v, t = unit_rows(1, 8, heads.dim), unit_rows(2, 8, heads.dim)
    found = session(out).run(["consistency", "colour"], {"v": v, "t": t})
    expected = score(heads, [Batch(torch.from_numpy(v), torch.from_numpy(t), {})])
    assert found[0] == pytest.approx(expected.of("consistency"), abs=CLOSE)
    assert found[1] == pytest.approx(expected.of("colour"), abs=CLOSE)


@pytest.mark.slow
def test_the_whole_scorer_scores_images_as_the_run_does(demo_run, demo_folder, demo_rows, tmp_path):
    out = tmp_path / "scorer.onnx"
    export(ExportConfig(run=demo_run, out=out))
    scorer = Scorer.load(demo_run, device="cpu", precision="fp32")
    running = session(out)
    for rows in ROWS:
        chosen = demo_rows[:rows]
        paths, prompts = [demo_folder / row["image"] for row in chosen], [row["prompt"] for row in chosen]
        pixels = np.stack([scorer.backbone.preprocess(open_image(path.read_bytes())).numpy() for path in paths])
        tokens = scorer.backbone.tokenizer(prompts).numpy()
        q, c = running.run(["quality", "consistency"], {"pixels": pixels, "tokens": tokens})
        expected = scorer.score(paths, prompts)
        assert q == pytest.approx(expected.q, abs=1e-4)
        assert c == pytest.approx(expected.c, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "outputs"),
    [
        ({"residual_learning": False}, ["quality", "consistency"]),
        ({"residual_learning": False, "two_branch": True}, ["quality", "consistency"]),
        (
            {"residual_learning": False, "refinement": True},
            ["quality", "consistency", "consistency_base", "consistency_delta"],
        ),
        ({"scale_mode": "learned", "weight": "0.5,consistency=0"}, OF_QUALITY),
    ],
    ids=["direct", "two-branch", "refinement", "quality alone"],
)
def test_every_kind_of_heads(train_demo, tmp_path, settings, outputs):
    result = export(ExportConfig(run=train_demo(**settings).run, out=tmp_path / "heads.onnx", part="heads"))
    assert result.outputs == outputs
    assert max(result.largest_difference.values()) < CLOSE


BASES = BaseShape(
    {"stages": 5, "anchors": 4, "2:center": 7, "2:cosine": 1},
    {
        "quality": (
            MemberShape("kernel", ("center", "stages"), 9, 0.5),
            MemberShape("line", ("stages", "2:center", "anchors"), 0, 0.5),
        ),
        "consistency": (
            MemberShape("kernel", ("2:center", "prompt", "score"), 6, 0.7),
            MemberShape("line", ("cosine", "2:cosine", "score"), 0, 0.3),
        ),
    },
)


@pytest.mark.slow
def test_bases_of_every_kind_are_exported(demo_run, tmp_path):
    """Kernels and lines, of views, anchors, a second backbone and a score, in a run that has learned nothing else."""
    run, out = shutil.copytree(demo_run, tmp_path / "run"), tmp_path / "heads.onnx"
    spec = dataclasses.replace(open_run(demo_run).spec, bases=BASES)
    heads, generator = build_heads(spec), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in heads.state_dict().items():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (1.0 if "anchors" in name else 0.3))
    (checkpoint,) = run.glob("*_best.safetensors")
    with safe_open(checkpoint, "pt") as file:
        header = json.loads(file.metadata()["deltaclip"])
    save_file(heads.state_dict(), checkpoint, {"deltaclip": json.dumps(header | {"spec": spec.to_json()})})
    result = export(ExportConfig(run=run, out=out, part="heads"))
    assert result.inputs == ["v", "t", "stages", "center_2", "cosine_2"]
    assert about(out)["views"] == {"stages": "stages", "center_2": "2:center", "cosine_2": "2:cosine"}
    assert max(result.largest_difference.values()) < CLOSE
    views = {"stages": 5, "2:center": 7, "2:cosine": 1}
    given = {name: torch.randn(6, width, generator=generator) for name, width in views.items()}
    v, t = (torch.from_numpy(unit_rows(seed, 6, heads.dim)) for seed in (1, 2))
    terms = heads.base_terms(given, v, t)
    expected = score(heads, [Batch(v, t, {}, fitted_B=terms)])
    fed = {"v": v, "t": t, "stages": given["stages"], "center_2": given["2:center"], "cosine_2": given["2:cosine"]}
    found = session(out).run(["quality", "consistency"], {name: value.numpy() for name, value in fed.items()})
    for target, values in zip(("quality", "consistency"), found, strict=True):
        assert values == pytest.approx(expected.of(target), abs=CLOSE)
        assert np.ptp(values) > 0.1  # or there would be nothing to compare


def test_what_an_export_is_checked_on_is_like_what_bases_were_fitted_to(demo_cache, tmp_path):
    """Far from its landmarks a kernel says one thing of all rows, and what a line says there is clamped."""
    done = train(TrainConfig(cache=demo_cache, out=tmp_path / "run", epochs=1, base="kernel", view="center"))
    folder = open_run(done.run)
    drawn = _draw_embeddings(folder)(50)
    terms = folder.heads.base_terms({}, drawn["v"], drawn["t"])
    told = base_terms(folder.heads, load_rows(demo_cache, "cpu"))
    far = folder.heads.base_terms({}, *(torch.from_numpy(unit_rows(seed, 50, folder.heads.dim)) for seed in (1, 2)))
    drawn, told, far = (float(each["quality"].std()) for each in (terms, told, far))
    assert drawn > max(0.5 * told, 1.5 * far)


@pytest.mark.slow
def test_heads_with_fitted_bases_take_their_views_by_name(train_demo, demo_folder, tiny_backbone, tmp_path):
    from deltaclip.features.extract import extract
    from deltaclip.features.settings import ExtractConfig

    config = ExtractConfig(
        data=str(demo_folder / "demo.csv"), out=tmp_path / "views.h5", backbone=tiny_backbone, views="stages"
    )
    run = train_demo(cache=extract(config).cache, base="kernel").run
    result = export(ExportConfig(run=run, out=tmp_path / "heads.onnx", part="heads"))
    assert result.inputs == ["v", "t", "stages"]
    assert about(result.out)["views"] == {"stages": "stages"}
    with pytest.raises(UserError) as error:
        export(ExportConfig(run=run, out=tmp_path / "scorer.onnx"))
    assert str(error.value) == (
        f"{run}: the heads read the view 'stages', whose pixels are not those that the model takes; "
        "give --part heads, which takes the vectors of the view, or train with --base calibrated"
    )


@pytest.mark.slow
def test_a_difference_from_torch_is_no_file(demo_run, tmp_path, monkeypatch):
    monkeypatch.setattr("deltaclip.pipeline.api.onnx_graph.TOLERANCE", -1.0)
    out = tmp_path / "heads.onnx"
    with pytest.raises(UserError, match="onnxruntime differs from torch by"):
        export(ExportConfig(run=demo_run, out=out, part="heads"))
    assert not out.exists()


@pytest.mark.parametrize(
    ("out", "words"),
    [("m.pt", "--out: unknown suffix '.pt'; give NAME.onnx"), ("m", "--out: unknown suffix ''; give NAME.onnx")],
)
def test_other_suffixes_are_refused(demo_run, tmp_path, out, words):
    with pytest.raises(UserError) as error:
        ExportConfig(run=demo_run, out=tmp_path / out)
    assert str(error.value) == words


def test_a_finished_run_is_not_written_into(demo_run):
    with pytest.raises(UserError, match="lies in the run"):
        export(ExportConfig(run=demo_run, out=demo_run / "m.onnx", part="heads"))


def test_without_the_extra_one_line_says_what_to_install(demo_run, tmp_path, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else real(name))
    with pytest.raises(UserError) as error:
        export(ExportConfig(run=demo_run, out=tmp_path / "m.onnx"))
    assert str(error.value) == (
        "export: needs onnxscript, which is not installed; install it with: pip install 'deltaclip[onnx]'"
    )
