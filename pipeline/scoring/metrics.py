"""How well predictions agree with people: the field's figures, each defined for every input.

Knows SROCC, KROCC, PLCC (raw and mapped) and RMSE of two arrays, also per source. Must not know heads,
files or splits.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from deltaclip.pipeline.scoring.groups import known_groups
from deltaclip.pipeline.scoring.ranks import centred, json_number, krocc, labelled_rows, pearson, srocc

if TYPE_CHECKING:
    import numpy.typing as npt

    from deltaclip.pipeline.scoring.ranks import FloatArray

__all__ = ["Agreement", "agreement", "agreement_by", "json_number", "krocc", "pearson", "srocc"]

# A correlation of two rows is always -1 or 1 and says nothing.
MIN_ROWS = 3
# The logistic has 4 parameters: it goes through any 4 rows, so that its error would be 0 by construction.
MIN_ROWS_MAPPED = 5


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Agreement of predictions with labels over `n` labelled rows; a figure that does not exist is NaN.

    `main` is the mean of SROCC and raw PLCC: raw, so that it rests on no fit that may fail or flatter.
    `note` says in words why a figure is missing or was not mapped, and is empty otherwise.
    """

    srocc: float
    krocc: float
    plcc: float
    plcc_mapped: float
    rmse: float
    main: float
    n: int
    note: str = ""

    def to_json(self) -> dict[str, float | int | str | None]:
        """Return the figures by name, NaN as None."""
        return {name: json_number(v) if isinstance(v, float) else v for name, v in asdict(self).items()}


def agreement(predicted_N: npt.ArrayLike, label_N: npt.ArrayLike) -> Agreement:
    """Score predictions against labels with every figure of the field.

    Args:
        predicted_N: (N,) predictions, any real dtype; finite in rows with a label.
        label_N: (N,) labels; NaN marks a missing one, its row is left out.

    Returns:
        The figures: SROCC and KROCC (tau-b) on raw predictions, PLCC raw and after the 4-parameter logistic
        of `fit_logistic`, RMSE = sqrt(mean((f(x) - y)^2)) after it. Where no logistic can be fitted, f(x) = x
        and `note` says so. Fewer than 3 labelled rows: all NaN. A constant side: NaN but for the RMSE.

    Raises:
        ValueError: see `labelled_rows`.
    """
    mask = labelled_rows(predicted_N, label_N)
    x = np.asarray(predicted_N, dtype=np.float64)[mask]
    y = np.asarray(label_N, dtype=np.float64)[mask]
    if x.size < MIN_ROWS:
        return undefined(n=x.size, note=f"{x.size} labelled rows, {MIN_ROWS} are needed")
    mapped, note = _mapped(x, y)
    rank, linear = srocc(x, y), pearson(x, y)
    return Agreement(
        srocc=rank,
        krocc=krocc(x, y),
        plcc=linear,
        plcc_mapped=pearson(mapped, y),
        rmse=math.sqrt(float(np.mean((mapped - y) ** 2))),
        main=(rank + linear) / 2,
        n=x.size,
        note=note,
    )


def agreement_by(
    predicted_N: npt.ArrayLike, label_N: npt.ArrayLike, *, groups_N: npt.ArrayLike
) -> dict[str, Agreement]:
    """Score every group (a source, say) on its own; groups (N,) hold strings or integers."""
    names, code_N = np.unique(known_groups(groups_N), return_inverse=True)
    predicted, label = np.asarray(predicted_N), np.asarray(label_N)
    if predicted.shape != code_N.shape or label.shape != code_N.shape:
        message = f"predictions {predicted.shape}, labels {label.shape} and groups {code_N.shape} differ in length"
        raise ValueError(message)
    rows_by_name = np.split(np.argsort(code_N, kind="stable"), np.cumsum(np.bincount(code_N))[:-1])
    pairs = zip(names.tolist(), rows_by_name, strict=True) if names.size else ()
    return {str(name): agreement(predicted[rows], label[rows]) for name, rows in pairs}


def undefined(*, n: int, note: str) -> Agreement:
    """Return an agreement without a single figure, with the reason."""
    nan = math.nan
    return Agreement(srocc=nan, krocc=nan, plcc=nan, plcc_mapped=nan, rmse=nan, main=nan, n=n, note=note)


def _mapped(x_N: FloatArray, y_N: FloatArray) -> tuple[FloatArray, str]:
    """Return f(x) and an empty note, or x itself and the reason why there is no f."""
    for name, values in (("predictions", x_N), ("labels", y_N)):
        if values.min() == values.max():
            return x_N, f"constant {name}: no correlation, not mapped"
    if x_N.size < MIN_ROWS_MAPPED:
        return x_N, f"{x_N.size} rows, too few for the logistic: not mapped"
    mapped = fit_logistic(x_N, y_N)
    if mapped is None:
        return x_N, "the logistic did not converge: not mapped"
    return mapped, ""


def fit_logistic(x_N: FloatArray, y_N: FloatArray) -> FloatArray | None:
    """Fit the field's 4-parameter logistic to labels by least squares and apply it to the predictions.

    f(x) = (b1 - b2) / (1 + exp(-(x - b3) / |b4|)) + b2, start [max y, min y, mean x, std x / 4]
    (VQEG 2000, in the form of Seshadrinathan et al., IEEE TIP 19(6), 2010). Levenberg-Marquardt of MINPACK,
    as `curve_fit` runs it, with the exact Jacobian; `leastsq` itself, because it reports where that warns.

    Returns:
        f(x) (N,), or None where the fit does not converge or ends in a constant.
    """
    from scipy.optimize import leastsq
    from scipy.special import expit

    # In units of its own spread around its own mean x may have any scale and offset; f is the same function.
    z_N = centred(x_N)
    z_N = z_N / z_N.std()

    def curve(b: FloatArray) -> FloatArray:
        return np.asarray((b[0] - b[1]) * expit((z_N - b[2]) / _width(b)) + b[1], dtype=np.float64)

    def jacobian(b: FloatArray) -> FloatArray:
        u_N = (z_N - b[2]) / _width(b)
        g_N = expit(u_N)
        slope_N = (b[0] - b[1]) * g_N * (1 - g_N) / _width(b)
        return np.stack([g_N, 1 - g_N, -slope_N, -slope_N * u_N * np.sign(b[3])])

    start = np.array([y_N.max(), y_N.min(), 0.0, 0.25])
    with np.errstate(over="ignore", invalid="ignore"):  # a fit that runs away is found below
        b, _, _, _, status = leastsq(
            lambda b: curve(b) - y_N, start, Dfun=jacobian, col_deriv=True, full_output=True, maxfev=2000
        )
        mapped = curve(b)
    converged = status in (1, 2, 3, 4) and bool(np.isfinite(mapped).all())
    return mapped if converged and mapped.min() < mapped.max() else None


def _width(b: FloatArray) -> float:
    return max(abs(float(b[3])), 1e-9)  # a step is the steepest logistic there is
