"""The training of the bundled backbone: losses, schedule, steps; knows a CLIP model and batches, no files.

Plain CLIP (Radford et al. 2021), helped by linear layers, thrown away in the end, that read from the
picture's embedding what stands in it and, in the second phase, how it is damaged: captions rarely say that, and
contrastive training alone makes the embedding forget it.

Letters: B batch, T tokens, W width of the text tower, D width of the embedding.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from deltaclip.features.backbone.tiny_batches import PER_SHAPE, WHOLE, SceneBatches, batches
from deltaclip.features.scenes.damage import DAMAGES
from deltaclip.features.scenes.shapes import SHAPES

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
