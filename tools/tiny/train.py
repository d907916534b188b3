"""Recipe of the bundled backbone, out of the installed package.

Recipe of the bundled backbone: a small CLIP trained on drawn scenes (`make backbone`).

Two helps make under an hour of two CPU cores enough: batches of scenes that differ in one attribute
(tiny_batches.py), and linear layers that name what stands in the picture (tiny_fit.py). The first phase teaches
what is shown; the second, with more damage, also how well. Each phase saves what it made, and the second starts from
what the first saved, so that it can be repeated alone (`--late-only`).
Knows the model's configuration and its files; must not know manifests, caches or heads.

The training of the bundled backbone: losses, schedule, steps; knows a CLIP model and batches, no files.

Plain CLIP (Radford et al. 2021), helped by linear layers, thrown away in the end, that read from the
picture's embedding what stands in it and, in the second phase, how it is damaged: captions rarely say that, and
contrastive training alone makes the embedding forget it.

Letters: B batch, T tokens, W width of the text tower, D width of the embedding.

Endless batches of drawn scenes and captions for the bundled backbone; knows scenes and tokens, no model.

A batch is made of families: one scene and several edits of it, each wrong in one attribute and each with a
caption of its own. Every picture so meets captions, and every caption pictures, right but for one word.

How well a small CLIP knows drawn scenes it was never trained on: recall@1 and zero-shot correlation.

Knows open_clip and scenes; must not know the recipe, caches or heads.
Letters: N pictures or captions, D width of the embedding.
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

import numpy as np
from PIL import Image

from deltaclip.base.device import choose_device, choose_precision
from deltaclip.base.errors import UserError
from deltaclip.base.files import whole_file
from deltaclip.features.scenes.captions import write_caption
from deltaclip.features.scenes.damage import DAMAGES, Damage, damage_image
from deltaclip.features.scenes.draw import (
    BACKGROUNDS,
    COLOURS,
    MAX_COUNT,
    RELATIONS,
    SHAPES,
    STYLES,
    draw_scene,
    random_scene,
)
from deltaclip.features.scenes.mismatch import edit_scene, possible_mistakes
from deltaclip.features.scenes.render import draw_row, plan_demo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from deltaclip.features.scenes.draw import Scene


# ---- Recipe of the bundled backbone: a small CLIP trained on drawn scenes (`make backbone`)


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


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training run did and how good the result is on scenes that were held out.

    `loss` is the mean contrastive loss of the last 100 steps; `scores` are those of eval_tiny.
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
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "tiny", help="folder that receives it")
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


# ---- The training of the bundled backbone: losses, schedule, steps; knows a CLIP model and batches, no files


if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    # steps done, contrastive loss of the last one
    Report = Callable[[int, float], None]

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


# ---- Endless batches of drawn scenes and captions for the bundled backbone; knows scenes and tokens, no model


# First number of every seed here, so that no scene of the demo set or of a test is ever trained on.
TRAIN_STREAM = 1_000_001
HELD_OUT_STREAM = 1_000_002
# Pictures are drawn at the demo's size and reduced as open_clip's preprocessing does it.
DRAWN_SIZE = 128
FAMILY = 4
DAMAGED_SHARE = 0.35
# In the second phase, which teaches the picture's embedding to tell damage; one or two kinds at once, as in the demo.
LATE_DAMAGED_SHARE = 0.7
SAID_SHARE = 0.3
SAID_FROM = 0.4
DAMAGE_WORDS: dict[str, str] = {
    "warp": "warped",
    "colours": "faded",
    "low_resolution": "low resolution",
    "blur": "blurry",
    "noise": "noisy",
    "jpeg": "compressed",
}
# What the auxiliary layer names, per shape: how many, which colour, where; then of the whole picture.
PLACES = ("alone", *RELATIONS)
PER_SHAPE: tuple[int, ...] = (1 + MAX_COUNT, 1 + len(COLOURS), 1 + len(PLACES))
WHOLE: tuple[int, ...] = (len(STYLES), len(BACKGROUNDS))

Item = tuple[np.ndarray[Any, Any], str, np.ndarray[Any, Any], np.ndarray[Any, Any]]


def scene_targets(scene: Scene) -> np.ndarray[Any, Any]:
    """Return int64 (12 * 3 + 2,): count, colour, place of every shape (0 = absent); style, background."""
    per_shape = np.zeros((len(SHAPES), 3), dtype=np.int64)
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for index, group in enumerate(scene.groups):
        place = "alone" if len(scene.groups) == 1 else scene.relation if index == 0 else opposite[scene.relation]
        colour = 1 + list(COLOURS).index(group.colour)
        per_shape[SHAPES.index(group.shape)] = (group.count, colour, 1 + PLACES.index(place))
    whole = (STYLES.index(scene.style), list(BACKGROUNDS).index(scene.background))
    return np.concatenate([per_shape.ravel(), np.array(whole, dtype=np.int64)])


def _picture(scene: Scene, damages: list[Damage], seed: int, size: int) -> np.ndarray[Any, Any]:
    image = damage_image(draw_scene(scene, DRAWN_SIZE), damages, seed)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def _damages(rng: np.random.Generator, *, late: bool) -> list[Damage]:
    """Draw the damages of one picture for the first or the second phase; often none."""
    if not late:
        if rng.random() >= DAMAGED_SHARE:
            return []
        kind = DAMAGES[int(rng.integers(len(DAMAGES)))]
        return [Damage(kind=kind, strength=float(rng.uniform(0.1, 1.0)))]
    damaged = rng.random() < LATE_DAMAGED_SHARE
    kinds = rng.permutation(DAMAGES)[: int(rng.integers(1, 3))].tolist() if damaged else []
    return [Damage(kind=str(kind), strength=float(rng.uniform(0.1, 1.0))) for kind in kinds]


def strengths_of(damages: list[Damage]) -> np.ndarray[Any, Any]:
    """Return float32 (6,): the strength of each kind in DAMAGES, 0 where it is absent."""
    strengths = np.zeros(len(DAMAGES), dtype=np.float32)
    for damage in damages:
        strengths[DAMAGES.index(damage.kind)] = damage.strength
    return strengths


def draw_family(seed: int, index: int, size: int, *, late: bool = False) -> list[Item]:
    """Return FAMILY items of a scene and its edits: picture uint8 (size, size, 3), caption, targets, strengths."""
    stream = [TRAIN_STREAM, seed, index]
    rng = np.random.default_rng(stream)
    scene = random_scene([*stream, 1])
    caption_seed = int(rng.integers(2**31))
    possible = possible_mistakes(scene, write_caption(scene, caption_seed))
    edits = rng.permutation(possible)[: FAMILY - 1]
    scenes = [scene] + [edit_scene(scene, [str(edit)], int(rng.integers(2**31))).scene for edit in edits]
    while len(scenes) < FAMILY:
        scenes.append(random_scene([*stream, 1 + len(scenes)]))
    items = []
    for member in scenes:
        text = write_caption(member, caption_seed).text
        damages = _damages(rng, late=late)
        if damages and damages[0].strength > SAID_FROM and rng.random() < SAID_SHARE:
            text = f"{DAMAGE_WORDS[damages[0].kind]}, {text}"
        picture = _picture(member, damages, int(rng.integers(2**31)), size)
        items.append((picture, text, scene_targets(member), strengths_of(damages)))
    return items


def draw_batch(
    seed: int, step: int, batch_size: int, size: int, *, late: bool = False
) -> tuple[Any, list[str], Any, Any]:
    """Return pictures uint8 (B, size, size, 3), B captions, targets int64 (B, 38), strengths (B, 6) of one step."""
    families = batch_size // FAMILY
    items = [item for i in range(families) for item in draw_family(seed, step * families + i, size, late=late)]
    pictures, texts, targets, strengths = zip(*items, strict=True)
    return np.stack(pictures), list(texts), np.stack(targets), np.stack(strengths)


class SceneBatches:
    """Dataset of training steps for torch's DataLoader: item k is batch k, whichever worker draws it."""

    def __init__(
        self, tokenize: Callable[[list[str]], Any], *, seed: int, steps: int, batch_size: int, size: int, late: bool
    ) -> None:
        self.tokenize, self.late = tokenize, late
        self.seed, self.steps, self.batch_size, self.size = seed, steps, batch_size, size

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Any, ...]:
        """Return pictures uint8 (B, 3, size, size), tokens (B, T) cut to the longest, targets, strengths."""
        import torch

        if step >= self.steps:
            raise IndexError(step)
        drawn = draw_batch(self.seed, step, self.batch_size, self.size, late=self.late)
        pictures, texts, targets, strengths = drawn
        tokens = self.tokenize(texts)
        # Exact for a causal tower: nothing after the end token is read.
        length = int((tokens != 0).sum(dim=1).max())
        return (
            torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(),
            tokens[:, :length],
            torch.from_numpy(targets),
            torch.from_numpy(strengths),
        )


def batches(dataset: SceneBatches, num_workers: int) -> Iterator[tuple[Any, ...]]:
    """Yield the batches of `dataset` in order, drawn ahead by `num_workers` processes (0: by this one)."""
    from torch.utils.data import DataLoader

    loader: Any = DataLoader(dataset, batch_size=None, shuffle=False, num_workers=num_workers)  # type: ignore[arg-type]
    yield from loader


# ---- How well a small CLIP knows drawn scenes it was never trained on: recall@1 and zero-shot correlation


BATCH = 64


@dataclass(frozen=True, kw_only=True)
class TinyScores:
    """Share of captions that find their picture first, Spearman's rho with the label, and of how many."""

    recall_at_1: float
    num_captions: int
    zero_shot_srocc: float
    num_demo_images: int

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


class TinyClip:
    """A CLIP in open_clip's `local-dir:` layout, read for evaluation in fp32 on the CPU."""

    def __init__(self, folder: Path) -> None:
        import open_clip

        name = f"local-dir:{folder}"
        self.model, _, self.preprocess = open_clip.create_model_and_transforms(name)
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(name)

    def encode_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Return L2-normalised embeddings (N, D) of RGB pictures of any size."""
        import torch

        parts = []
        with torch.no_grad():
            for start in range(0, len(images), BATCH):
                pixels = torch.stack([self.preprocess(image) for image in images[start : start + BATCH]])
                parts.append(self.model.encode_image(pixels, normalize=True))
        return torch.cat(parts).numpy()

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return L2-normalised embeddings (N, D) of prompts."""
        import torch

        parts = []
        with torch.no_grad():
            for start in range(0, len(texts), BATCH):
                tokens = self.tokenizer(list(texts[start : start + BATCH]))
                parts.append(self.model.encode_text(tokens, normalize=True))
        return torch.cat(parts).numpy()


def held_out_pairs(num_pairs: int, seed: int) -> tuple[list[Image.Image], list[str]]:
    """Return clean pictures and captions, all different, from seeds that training never draws."""
    images: dict[str, Image.Image] = {}
    index = 0
    while len(images) < num_pairs:
        scene = random_scene([HELD_OUT_STREAM, seed, index, 1])
        text = write_caption(scene, [HELD_OUT_STREAM, seed, index, 2]).text
        if text not in images:
            images[text] = draw_scene(scene, DRAWN_SIZE)
        index += 1
    return list(images.values()), list(images)


def recall_at_1(clip: TinyClip, *, num_captions: int = 100, seed: int = 0) -> float:
    """Return the share of different captions whose own picture has the highest cosine of all."""
    images, texts = held_out_pairs(num_captions, seed)
    cosines = clip.encode_texts(texts) @ clip.encode_images(images).T
    return float((cosines.argmax(axis=1) == np.arange(num_captions)).mean())


def zero_shot_srocc(clip: TinyClip, *, num_prompts: int = 200, images_per_prompt: int = 6, seed: int = 0) -> float:
    """Return Spearman's rho of cosine and consistency label over a demo set, drawn in memory."""
    from scipy.stats import spearmanr

    rows = plan_demo(seed, num_prompts, images_per_prompt)
    v_ND = clip.encode_images([draw_row(row, DRAWN_SIZE) for row in rows])
    texts = sorted({row.caption.text for row in rows})
    place = {text: index for index, text in enumerate(texts)}
    t_ND = clip.encode_texts(texts)[[place[row.caption.text] for row in rows]]
    return float(spearmanr((v_ND * t_ND).sum(axis=1), [row.shown.consistency for row in rows]).statistic)


def evaluate_tiny(folder: Path, *, num_captions: int = 100, num_prompts: int = 200, seed: int = 0) -> TinyScores:
    """Return both figures for the weights in `folder`, in open_clip's `local-dir:` layout."""
    clip = TinyClip(folder)
    return TinyScores(
        recall_at_1=recall_at_1(clip, num_captions=num_captions, seed=seed),
        num_captions=num_captions,
        zero_shot_srocc=zero_shot_srocc(clip, num_prompts=num_prompts, seed=seed),
        num_demo_images=num_prompts * 6,
    )
