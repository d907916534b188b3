"""How probable it is that people prefer one of two scores: Bradley-Terry with ties, after Davidson.

With eta the difference of two worths, P(a) = e^(eta/2) / Z, P(b) = e^(-eta/2) / Z and P(tie) = nu / Z, where
Z = e^(eta/2) + e^(-eta/2) + nu. Bradley and Terry, Biometrika 39 (1952) 324; ties: Davidson, Journal of the American
Statistical Association 65 (1970) 317. Knows differences and preferences. Must not know heads, rows or files.

Shapes: P pairs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

TIE = 0.5  # of `preferred_P`: exactly that
# Bounds of the scale: worths of scores in [0, 1] that differ by 1 are 1/100 to 1,000 logits apart.
_SCALES = (1e-2, 1e3)
# A hundredth of a pair that ties, so that the share of ties is no 0 whose logarithm has no end.
_PRIOR_TIES = 0.01


class PairScale(NamedTuple):
    """What makes a difference of scores one of worths, eta = kappa (x_a - x_b), and how ties come about."""

    kappa: float
    log_nu: float

    def loss(self, difference_P: Tensor, preferred_P: Tensor) -> Tensor:
        """Return the negative log-likelihood of each pair, (P,): see `davidson_loss`."""
        return davidson_loss(self.kappa * difference_P, preferred_P, self.log_nu)


def davidson_loss(eta_P: Tensor, preferred_P: Tensor, log_nu: float | Tensor) -> Tensor:
    """Return the negative log-likelihood of each pair, (P,), convex in eta and log nu.

    log Z - (p - 1/2) eta - [tie] log nu. A probability p other than 1/2 stands for a share p of wins.

    Args:
        eta_P: differences of worths, a less b, in logits.
        preferred_P: probability in [0, 1] that a is preferred; exactly .5 is a tie.
        log_nu: of the ties; -inf is Bradley-Terry, which gives ties the loss of half a win and half a defeat.
    """
    log_nu_P = torch.as_tensor(log_nu, dtype=eta_P.dtype, device=eta_P.device).expand_as(eta_P)
    log_z_P = torch.logsumexp(torch.stack([eta_P / 2, -eta_P / 2, log_nu_P]), dim=0)
    tie_P = (preferred_P == TIE) & torch.isfinite(log_nu_P)
    return log_z_P - (preferred_P - TIE) * eta_P - torch.where(tie_P, log_nu_P, 0.0)


def davidson_slopes(eta_P: Tensor, preferred_P: Tensor, log_nu: float) -> tuple[Tensor, Tensor]:
    """Return first and second derivative of `davidson_loss` by eta, (P,) each; the second is above 0."""
    terms_3P = torch.stack([eta_P / 2, -eta_P / 2, torch.full_like(eta_P, log_nu)])
    a_P, b_P, _ = torch.softmax(terms_3P, dim=0)
    mean_P = (a_P - b_P) / 2
    return mean_P - (preferred_P - TIE), (a_P + b_P) / 4 - mean_P.square()


def fit_scale(difference_P: Tensor, preferred_P: Tensor, *, kappa: float | None = None) -> PairScale:
    """Return the scale and the ties of greatest likelihood for differences of scores.

    Args:
        difference_P: score of a less that of b, of scores that did not learn from these pairs.
        preferred_P: as in `davidson_loss`.
        kappa: where it is known already.
    """
    from scipy.optimize import minimize

    x_P, p_P = difference_P.double(), preferred_P.double()
    ties = float((p_P == TIE).sum()) + _PRIOR_TIES
    start = math.log(2 * ties / max(len(p_P) - ties, 1.0))

    def loss(values: list[float]) -> tuple[float, list[float]]:
        at = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        scale = torch.exp(at[0]) if kappa is None else kappa
        found = davidson_loss(scale * x_P, p_P, at[1]).sum() - _PRIOR_TIES * at[1]
        (slope,) = torch.autograd.grad(found, at)
        return float(found.detach()), slope.tolist()

    bounds = [(math.log(_SCALES[0]), math.log(_SCALES[1])), (-20.0, 20.0)]
    first = math.log(1 / max(float(x_P.square().mean().sqrt()), 1e-3)) if kappa is None else 0.0
    first = min(max(first, bounds[0][0]), bounds[0][1])
    best = minimize(loss, [first, start], jac=True, method="L-BFGS-B", bounds=bounds).x
    return PairScale(float(math.exp(best[0])) if kappa is None else kappa, float(best[1]))
