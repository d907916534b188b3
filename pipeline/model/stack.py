"""K heads of one kind as one stack of parameters that all see the same batch.

Knows how the heads that `ResidualHeads` have for one target are laid side by side, so that a sweep computes what
they share once and their first layers are one matrix product. Must not know optimizers, files or grids.

Shapes: K heads, B rows, D embedding width, M = 2D + 1, F width in front of the wide layer (D or M), H its width.
Activations lie as (K, H, B), rows last: the product of all K heads is then one contiguous block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaclip.pipeline.model.heads import ImageHead, ResidualHeads, clamp_straight, dropout_factor
from deltaclip.pipeline.model.losses import LOSSES
from deltaclip.pipeline.model.scores import Batch, TargetScores, cosine

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class WideTape(NamedTuple):
    """What the gradient of the wide layer needs: outputs h_KHB (their gradient is in `h_KHB.grad`), inputs x_BF."""

    h_KHB: Tensor
    x_BF: Tensor


class HeadStack:
    """Heads of one target, shape and scale mode; `parameters[name][k]` is the parameter `name` of head k.

    The wide layer holds 97 % of the weights (D = 768). Its gradient is left to the caller (`WideTape`), who can make
    and use it a few heads at a time. `half` makes its products in bfloat16 with float32 sums from a copy that follows
    the float32 weights (`refresh`); everything else is float32.
    """

    def __init__(self, heads: Sequence[ResidualHeads], target: str, *, half: bool = False) -> None:
        own = [each.head(target) for each in heads]
        self.target, self.scale_mode, self.half = target, heads[0].scale_mode, half
        self.sees_image = isinstance(own[0], ImageHead)
        self.wide = "mlp.wide" if self.sees_image else "fusion.wide"
        columns = [dict(each.named_parameters()) for each in own]
        self.parameters = {name: torch.stack([column[name].detach() for column in columns]) for name in columns[0]}
        for name, stacked in self.parameters.items():
            stacked.requires_grad_(name != self.wide_weight)
        device = self.parameters[self.wide_weight].device
        self._given_K = torch.tensor([each.scale.given for each in own], device=device)
        self._upper_K = torch.tensor([each.scale.upper for each in own], device=device)
        self._fraction = 1.0
        weight_KHF = self.parameters[self.wide_weight]
        self._product_KHF = weight_KHF.bfloat16() if half else weight_KHF

    def __len__(self) -> int:
        return len(self._given_K)

    @property
    def wide_weight(self) -> str:
        """Name of the weight whose gradient `forward` leaves to the caller."""
        return f"{self.wide}.weight"

    @property
    def width(self) -> int:
        """Width H of the wide layer."""
        return int(self.parameters[self.wide_weight].shape[1])

    def refresh(self, part: slice) -> None:
        """Bring the product's copy of some heads' wide weights up to date."""
        if self.half:
            self._product_KHF[part].copy_(self.parameters[self.wide_weight][part])

    def scales(self) -> Tensor:
        """Return the scales in force, (K,)."""
        if self.scale_mode == "learned":
            return self._upper_K * torch.sigmoid(self.parameters["scale.theta"])
        return self._given_K * self._fraction

    def set_scale_fraction(self, fraction: float) -> None:
        """Put a share of the given scales in force; curriculum only."""
        self._fraction = fraction

    def forward(self, batch: Batch, mask_KHB: Tensor | None = None) -> tuple[TargetScores, WideTape]:
        """Score rows as `ResidualHeads.forward` does, (K, B) each, scale (K, 1).

        `mask_KHB` is what dropout multiplies the wide layer with, None in evaluation.
        """
        scale_K1 = self.scales()[:, None]
        score = self._of_image if self.sees_image else self._of_pair
        base_KB, delta_KB, tape = score(batch, batch.fitted_B.get(self.target), mask_KHB)
        return TargetScores(base_KB + scale_K1 * delta_KB, base_KB, delta_KB, scale_K1), tape

    def _of_image(
        self, batch: Batch, fitted_B: Tensor | None, mask_KHB: Tensor | None
    ) -> tuple[Tensor, Tensor, WideTape]:
        hidden_KHB, tape = self._hidden(batch.v_BD, mask_KHB)
        delta_KB = torch.tanh(self._affine("mlp.out", hidden_KHB)[:, 0])
        if fitted_B is not None:
            return fitted_B.clamp(0, 1).expand_as(delta_KB), delta_KB, tape
        return torch.sigmoid(self._affine("base", batch.v_BD.T)[:, 0]), delta_KB, tape

    def _of_pair(
        self, batch: Batch, fitted_B: Tensor | None, mask_KHB: Tensor | None
    ) -> tuple[Tensor, Tensor, WideTape]:
        v_BD, t_BD = batch.v_BD, batch.t_BD
        s_B = cosine(v_BD, t_BD)
        vts_BM = torch.cat((v_BD, t_BD, s_B.unsqueeze(-1)), dim=-1)
        hidden_KHB, tape = self._hidden(F.layer_norm(vts_BM, vts_BM.shape[-1:]), mask_KHB)
        slope_K1, offset_K1 = (self.parameters[name][:, None] for name in ("slope", "offset"))
        line_KB = slope_K1 * ((s_B + 1) / 2) + offset_K1
        base_KB = clamp_straight(line_KB if fitted_B is None else line_KB + fitted_B)
        narrow_KHB = F.gelu(self._affine("fusion.narrow", hidden_KHB))
        return base_KB, torch.tanh(self._affine("fusion.out", narrow_KHB)[:, 0]), tape

    def _hidden(self, x_BF: Tensor, mask_KHB: Tensor | None) -> tuple[Tensor, WideTape]:
        """Return dropout(GELU(W x + b)) of every head: one matrix product, as all heads see the same rows."""
        x_BF = x_BF.to(self._product_KHF.dtype)
        h_KHB = (self._product_KHF.flatten(0, 1) @ x_BF.T).view(len(self), -1, len(x_BF)).float()
        if mask_KHB is not None:
            h_KHB.requires_grad_()
        hidden_KHB = F.gelu(h_KHB + self.parameters[f"{self.wide}.bias"][:, :, None])
        return (hidden_KHB if mask_KHB is None else hidden_KHB * mask_KHB), WideTape(h_KHB, x_BF)

    def _affine(self, layer: str, x_KHB: Tensor) -> Tensor:
        """Return weight @ x + bias for every head, (K, outputs, B); x may be shared by all heads, (H, B)."""
        return torch.matmul(self.parameters[f"{layer}.weight"], x_KHB) + self.parameters[f"{layer}.bias"][:, :, None]


class DropoutMasks:
    """Dropout of heads trained together: what each would draw alone, drawn once per seed.

    Args:
        generators: of each seed, in the state in which training alone would find torch's own.
        seeds: of each head.
        p: of each head.
    """

    def __init__(self, generators: Mapping[int, torch.Generator], seeds: Sequence[int], p: Sequence[float]) -> None:
        self.pairs = list(zip(seeds, p, strict=True))
        self.kinds = list(dict.fromkeys(self.pairs))
        self.generators = generators
        device = next(iter(generators.values())).device
        self.device = device
        self.kind_K = torch.tensor([self.kinds.index(pair) for pair in self.pairs], device=device)

    def of(self, uniform: Mapping[int, Tensor], shape_HB: tuple[int, int]) -> Tensor:
        """Return what to multiply with, (K, H, B) or (1, H, B) where all heads have the same.

        `uniform` has the numbers drawn for each seed, (B, H); heads with p = 0 need none.
        """
        factors = [
            dropout_factor(uniform[seed].T, p) if p > 0 else torch.ones(shape_HB, device=self.device)
            for seed, p in self.kinds
        ]
        # One kind of mask stays one: broadcasting it reads a tenth of the memory.
        return factors[0][None] if len(factors) == 1 else torch.stack(factors)[self.kind_K]


def heads_by_loss(names: Sequence[str], device: torch.device) -> dict[str, Tensor | None]:
    """Return by the name of a loss which heads have it, (L,) int64 on the device; None where all have the same."""
    kinds = list(dict.fromkeys(names))
    if len(kinds) == 1:
        return {kinds[0]: None}
    return {kind: torch.tensor([k for k, name in enumerate(names) if name == kind], device=device) for kind in kinds}


def stacked_loss(
    sum_KB: Tensor, batch: Batch, *, target: str, heads: Mapping[str, Tensor | None], weight_K: Tensor
) -> Tensor:
    """Return the loss of each head, (K,): its weight times its loss by name, as `weighted_loss` gives it alone.

    `heads` is what `heads_by_loss` gives.
    """
    label_B, weight_B, std_B = batch.label_B[target], batch.weight_B.get(target), batch.std_B.get(target)
    total_K = torch.zeros_like(weight_K)
    for name, heads_L in heads.items():
        sum_LB = sum_KB if heads_L is None else sum_KB.index_select(0, heads_L)
        loss_L = LOSSES[name](sum_LB, label_B, weight_B=weight_B, std_B=std_B)
        total_K = loss_L if heads_L is None else total_K.index_add(0, heads_L, loss_L)
    # A weight of 0 leaves its part out, whatever it is.
    return torch.where(weight_K > 0, weight_K * total_K, 0.0)
