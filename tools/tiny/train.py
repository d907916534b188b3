"""Recipe of the bundled backbone: a small CLIP trained on drawn scenes (`make backbone`).

Plain CLIP (Radford et al. 2021). Two helps make under an hour of two CPU cores enough: batches of scenes that differ in
one attribute (scenes.py), and linear layers, thrown away in the end, that read from the picture's embedding what stands
in it and, in the second phase, how it is damaged: captions rarely say that, and contrastive training alone makes the
embedding forget it. Each phase saves what it made, and the second starts from what the first saved, so that it can be
repeated alone (`--late-only`).
Knows the model's configuration, its training and its files; must not know manifests, caches or heads.

Letters: B batch, T tokens, W width of the text tower, D width of the embedding.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from deltaclip.base.device import choose_device, choose_precision
from deltaclip.base.errors import UserError
from deltaclip.base.files import whole_file
from deltaclip.features.backbone.weights import TINY
from deltaclip.features.scenes.damage import DAMAGES
from deltaclip.features.scenes.draw import SHAPES
from tools.tiny.scenes import FAMILY, PER_SHAPE, WHOLE, SceneBatches, batches, evaluate_tiny

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    # steps done, contrastive loss of the last one
    Report = Callable[[int, float], None]


# ---- What is made


MODEL_CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 96, "patch_size": 16, "layers": 6, "width": 128, "head_width": 64},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 96, "heads": 3, "layers": 4},
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}
CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
LOG = """# The bundled backbone `tiny`

A small CLIP in open_clip's `local-dir:` layout ({megabytes:.1f} MB, fp16), trained on scenes that
`features/scenes` draws, with captions, hard negatives and damage. It knows twelve shapes, nine colours, four
numbers, four places, five styles and six backgrounds, and nothing of photographs: use it for the demo set and
for tests.

Made by `make backbone` (`python -m tools.tiny.train`):

| | |
|---|---|
| first phase, steps x batch | {steps} x {batch_size}, learning rate {peak_lr} |
| second phase, steps x batch | {late_steps} x {batch_size}, learning rate {late_peak_lr} |
| optimiser | AdamW, in each phase a warm-up of 100 steps, then cosine |
| seed | {seed}; every picture is drawn once |
| precision | {precision} |
| threads | {num_threads}, and one process that draws |
| time of the phase that ran last | {minutes:.0f} min at {samples_per_s:.0f} samples/s |
| contrastive loss at the end | {loss:.3f} |
| recall@1, {captions} held-out captions | {recall:.2f} |
| zero-shot SROCC with consistency, {images} demo images | {srocc:.3f} |
"""


# ---- The training: losses, schedule, steps


MAX_LOGIT_SCALE = math.log(100.0)
AUXILIARY_WEIGHT = 0.5
DAMAGE_WEIGHT = 5.0
WEIGHT_DECAY = 0.05
WARMUP_STEPS = 100
MAX_GRAD_NORM = 1.0


def build_model(config: dict[str, Any], seed: int) -> torch.nn.Module:
    """Return open_clip's CLIP of `config`, freshly initialised from `seed`."""
    import torch
    from open_clip.model import CLIP

    torch.manual_seed(seed)
    model: torch.nn.Module = CLIP(**config["model_cfg"])
    return model


class Readers(NamedTuple):
    """The linear layers that are thrown away: what stands in a picture, and how it is damaged."""

    scene: Any
    damage: Any


def parameter_groups(model: torch.nn.Module, readers: Readers, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's groups: decay on matrices only, never on embeddings.

    Words that no caption uses then keep their first random vector, so that they still differ from each other.
    """
    named = [item for module in (model, *readers) for item in module.named_parameters()]
    decayed = [p for n, p in named if p.ndim >= 2 and "embedding" not in n]
    plain = [p for n, p in named if p.ndim < 2 or "embedding" in n]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Return the rate of `step`: linear warm-up, then a half cosine down to 1 % of `peak`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def contrastive_loss(v_BD: Tensor, t_BD: Tensor, scale: Tensor) -> Tensor:
    """Return CLIP's symmetric cross-entropy of the (B, B) cosines times `scale` (CLIP, figure 3)."""
    import torch
    import torch.nn.functional as F

    logits = scale * v_BD @ t_BD.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def auxiliary_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of what stands in the picture, read linearly from the embedding.

    `outputs` float (B, 12 * 21 + 11), `targets` int64 (B, 38). Absent shapes (10 or 11 of 12) share one vote.
    """
    import torch.nn.functional as F

    num_shapes, width = len(SHAPES), sum(PER_SHAPE)
    table = outputs[:, : num_shapes * width].reshape(-1, num_shapes, width)
    wanted = targets[:, : num_shapes * 3].reshape(-1, num_shapes, 3)
    present = (wanted[..., 0] > 0).float()
    vote = present + (1 - present) / (num_shapes - 1)
    total = outputs.new_zeros(())
    for slot, logits in enumerate(table.split(PER_SHAPE, dim=2)):
        each = F.cross_entropy(logits.permute(0, 2, 1), wanted[..., slot], reduction="none")
        total = total + (each * vote).sum() / vote.sum()
    for slot, logits in enumerate(outputs[:, num_shapes * width :].split(WHOLE, dim=1)):
        total = total + F.cross_entropy(logits, targets[:, num_shapes * 3 + slot])
    return total / (len(PER_SHAPE) + len(WHOLE))


def _encode_text(model: Any, tokens: Tensor) -> Tensor:
    """Return what `model.encode_text` returns (B, D), for tokens (B, T) that are cut to any T."""
    num_tokens = tokens.shape[1]
    x_BTW = model.token_embedding(tokens) + model.positional_embedding[:num_tokens]
    x_BTW = model.ln_final(model.transformer(x_BTW, attn_mask=model.attn_mask[:num_tokens, :num_tokens]))
    # The end token has the highest number of all.
    last_BW = x_BTW[range(len(tokens)), tokens.argmax(dim=1)]
    return last_BW @ model.text_projection  # type: ignore[no-any-return]


def _step_loss(model: Any, readers: Readers, batch: tuple[Tensor, ...], *, late: bool) -> tuple[Tensor, Tensor]:
    """Return (total loss, contrastive part) of one batch of uint8 pictures, tokens, targets and strengths."""
    import torch.nn.functional as F

    pictures, tokens, targets, strengths = batch
    v_BD = model.encode_image((pictures.float() / 255 - 0.5) / 0.25).float()
    t_BD = _encode_text(model, tokens).float()
    unit_BD = F.normalize(v_BD, dim=1)
    contrast = contrastive_loss(unit_BD, F.normalize(t_BD, dim=1), model.logit_scale.exp())
    total = contrast + AUXILIARY_WEIGHT * auxiliary_loss(readers.scene(v_BD), targets)
    if late:
        # Read from the unit vector, as a quality head does; times sqrt(D), so that its entries are about 1.
        read = readers.damage(unit_BD * unit_BD.shape[1] ** 0.5)
        total = total + DAMAGE_WEIGHT * F.mse_loss(read.float(), strengths)
    return total, contrast.detach()


def _readers_and_optimizer(model: Any, peak_lr: float) -> tuple[Readers, Any]:
    """Return new readers and the optimiser."""
    import torch

    dim, device = model.text_projection.shape[1], model.text_projection.device
    scene = torch.nn.Linear(dim, len(SHAPES) * sum(PER_SHAPE) + sum(WHOLE)).to(device)
    readers = Readers(scene, torch.nn.Linear(dim, len(DAMAGES)).to(device))
    groups = parameter_groups(model, readers, WEIGHT_DECAY)
    return readers, torch.optim.AdamW(groups, lr=peak_lr, betas=(0.9, 0.98), eps=1e-6, fused=True)


def fit(model: Any, dataset: SceneBatches, *, peak_lr: float, bf16: bool, report: Report) -> float:
    """Train `model` in place on all of `dataset`; return the mean contrastive loss of the last 100 steps.

    Raises:
        FloatingPointError: the loss is no longer finite; names the step.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    readers, optimizer = _readers_and_optimizer(model.train(), peak_lr)
    device = model.text_projection.device
    losses: list[float] = []
    for step, batch in enumerate(batches(dataset, num_workers=1)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, dataset.steps, peak_lr, WARMUP_STEPS)
        optimizer.zero_grad(set_to_none=True)
        # For 37 tokens torch's flash attention makes a step 1.7 times slower (backward, CPU, bf16).
        with sdpa_kernel(SDPBackend.MATH):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                loss, contrast = _step_loss(model, readers, tuple(x.to(device) for x in batch), late=dataset.late)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        losses = [*losses[-99:], float(contrast)]
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"training stopped: the loss of step {step} is {losses[-1]}")
        report(step + 1, losses[-1])
    return sum(losses) / len(losses)


# ---- The two phases, what they write, and the command


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training run did and how good the result is on scenes that were held out.

    `loss` is the mean contrastive loss of the last 100 steps; `scores` are those of `evaluate_tiny`.
    """

    steps: int
    batch_size: int
    seed: int
    peak_lr: float
    late_steps: int
    late_peak_lr: float
    precision: str
    num_threads: int
    seconds: float
    samples_per_s: float
    loss: float
    scores: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def write_model(model: Any, folder: Path) -> None:
    """Write configuration and weights (fp16, under 20 MB) to `folder`, open_clip's `local-dir:` layout."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().half().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with whole_file(folder / WEIGHTS_NAME) as weights, whole_file(folder / CONFIG_NAME) as config:
        mode = weights.stat().st_mode
        save_file(tensors, weights, metadata={"format": "pt"})
        # safetensors puts a private file in the place of the one it was given.
        weights.chmod(mode)
        config.write_text(json.dumps(MODEL_CONFIG, indent=2) + "\n", encoding="utf-8")


def write_log(trained: Trained, folder: Path) -> None:
    """Write `README.md`, recipe and measured figures of the weights beside it."""
    scores = trained.scores
    text = LOG.format(
        **trained.to_json(),
        minutes=trained.seconds / 60,
        recall=scores["recall_at_1"],
        captions=scores["num_captions"],
        srocc=scores["zero_shot_srocc"],
        images=scores["num_demo_images"],
        megabytes=(folder / WEIGHTS_NAME).stat().st_size / 1e6,
    )
    with whole_file(folder / "README.md") as path:
        path.write_text(text, encoding="utf-8")


def train_tiny(  # noqa: PLR0913 - the recipe's own numbers, all with defaults
    out_dir: Path,
    *,
    steps: int = 2000,
    late_steps: int = 1500,
    batch_size: int = 128,
    seed: int = 0,
    peak_lr: float = 1.5e-3,
    late_peak_lr: float = 6e-4,
    late_only: bool = False,
    report: Callable[[str], None] | None = None,
) -> Trained:
    """Train the bundled backbone and write configuration, weights (fp16) and log to `out_dir`.

    Args:
        out_dir: receives `open_clip_config.json`, `open_clip_model.safetensors` and `README.md`.
        steps: training steps of the first phase.
        late_steps: training steps of the second phase.
        batch_size: pictures per step, a multiple of 4 (one family of scenes).
        seed: of weights and scenes; the same seed draws the same batches.
        peak_lr: learning rate after the warm-up of the first phase.
        late_peak_lr: the same of the second phase.
        late_only: start from the weights in `out_dir` and run the second phase alone.
        report: called with a line on rate, time left and loss every 25 steps.

    Raises:
        UserError: `batch_size` is no multiple of 4, or a number of steps is below 1.
    """
    import torch

    if min(steps, late_steps) < 1 or batch_size < FAMILY or batch_size % FAMILY:
        remedy = f"give at least one step and a multiple of {FAMILY}"
        raise UserError(f"steps {steps} and {late_steps}, batch size {batch_size}", place="train_tiny", remedy=remedy)
    last = None
    for late in (True,) if late_only else (False, True):
        phase = _Phase(
            late=late,
            steps=late_steps if late else steps,
            batch_size=batch_size,
            seed=seed + late,
            peak_lr=late_peak_lr if late else peak_lr,
        )
        last = _run_phase(phase, out_dir, report)
    assert last is not None, "one phase at least has run"
    seconds, loss = last
    trained = Trained(
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        peak_lr=peak_lr,
        late_steps=late_steps,
        late_peak_lr=late_peak_lr,
        precision=choose_precision("auto", choose_device("auto")),
        num_threads=torch.get_num_threads(),
        seconds=seconds,
        samples_per_s=late_steps * batch_size / seconds,
        loss=loss,
        scores=evaluate_tiny(out_dir).to_json(),
    )
    write_log(trained, out_dir)
    return trained


@dataclass(frozen=True, kw_only=True)
class _Phase:
    late: bool
    steps: int
    batch_size: int
    seed: int
    peak_lr: float


def _run_phase(phase: _Phase, out_dir: Path, report: Callable[[str], None] | None) -> tuple[float, float]:
    """Train one phase, save it, and return its seconds and its mean loss at the end."""
    from open_clip.tokenizer import SimpleTokenizer
    from safetensors.torch import load_file

    device = choose_device("auto")
    model = build_model(MODEL_CONFIG, phase.seed).to(device)
    if phase.late:
        saved = load_file(out_dir / WEIGHTS_NAME)
        model.load_state_dict({name: tensor.float() for name, tensor in saved.items()})
    size = MODEL_CONFIG["model_cfg"]["vision_cfg"]["image_size"]
    dataset = SceneBatches(
        SimpleTokenizer(),
        seed=phase.seed,
        steps=phase.steps,
        batch_size=phase.batch_size,
        size=size,
        late=phase.late,
    )
    began = time.monotonic()

    def tell(step: int, loss: float) -> None:
        if report is not None and (step % 25 == 0 or step == phase.steps):
            spent = time.monotonic() - began
            left = spent / step * (phase.steps - step)
            rate = step * phase.batch_size / spent
            report(f"step {step}/{phase.steps}  loss {loss:.3f}  {rate:.0f} samples/s  {left / 60:.1f} min left")

    bf16 = choose_precision("auto", device) == "bf16"
    loss = fit(model, dataset, peak_lr=phase.peak_lr, bf16=bf16, report=tell)
    seconds = time.monotonic() - began
    write_model(model, out_dir)
    return seconds, loss


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def main() -> None:
    """Train from the command line; progress goes to stderr."""
    import torch

    parser = argparse.ArgumentParser(prog="train_tiny", description="Train the bundled backbone `tiny`.")
    parser.add_argument("--out", type=Path, default=TINY, help="folder that receives it")
    parser.add_argument("--steps", type=int, default=2000, help="of the first phase")
    parser.add_argument("--late-steps", type=int, default=1500, help="of the second phase")
    parser.add_argument("--late-only", action="store_true", help="repeat the second phase from the weights in --out")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak-lr", type=float, default=1.5e-3)
    parser.add_argument("--late-peak-lr", type=float, default=6e-4)
    parser.add_argument("--threads", type=int, default=None, help="threads of the training; one more process draws")
    given = parser.parse_args()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    trained = train_tiny(
        given.out,
        steps=given.steps,
        late_steps=given.late_steps,
        late_only=given.late_only,
        late_peak_lr=given.late_peak_lr,
        batch_size=given.batch_size,
        seed=given.seed,
        peak_lr=given.peak_lr,
        report=_say,
    )
    _say(json.dumps(trained.to_json(), indent=2))


if __name__ == "__main__":
    main()
