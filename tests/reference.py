"""Slow float64 truth: formulas written out from their sources, row by row, sharing no code with deltaclip."""

from __future__ import annotations

import math

import numpy as np


def ranks(values):
    """Average ranks: 1 + values below + half of the other equal ones (Kendall 1970, chapter 3)."""
    values = [float(value) for value in values]
    below = [sum(other < value for other in values) for value in values]
    equal = [sum(other == value for other in values) for value in values]
    return [1 + b + (e - 1) / 2 for b, e in zip(below, equal, strict=True)]


def pearson(x, y):
    """sum((x - mx)(y - my)) / sqrt(sum((x - mx)^2) sum((y - my)^2)) with exact sums (Pearson 1895)."""
    x, y = [float(v) for v in x], [float(v) for v in y]
    mx, my = math.fsum(x) / len(x), math.fsum(y) / len(y)
    xy = math.fsum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    xx, yy = math.fsum((a - mx) ** 2 for a in x), math.fsum((b - my) ** 2 for b in y)
    return xy / math.sqrt(xx * yy)


def spearman(x, y):
    """Pearson's correlation of average ranks (Spearman 1904)."""
    return pearson(ranks(x), ranks(y))


def kendall_tau_b(x, y):
    """(concordant - discordant) / sqrt(pairs untied in x * untied in y), by all pairs (Kendall 1945)."""
    surplus = untied_x = untied_y = 0
    for i in range(len(x)):
        for j in range(i):
            dx, dy = np.sign(float(x[i]) - float(x[j])), np.sign(float(y[i]) - float(y[j]))
            surplus, untied_x, untied_y = surplus + dx * dy, untied_x + abs(dx), untied_y + abs(dy)
    return surplus / math.sqrt(untied_x * untied_y)


def logistic_map(x, y):
    """f(x) of the 4-parameter logistic by trust-region least squares, numerical derivatives (VQEG 2000).

    f(x) = (b1 - b2) / (1 + exp(-(x - b3) / |b4|)) + b2 from [max y, min y, mean x, std x / 4].
    """
    from scipy.optimize import least_squares

    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)

    def curve(b):
        power = np.clip(-(x - b[2]) / abs(b[3]), -700, 700)
        return (b[0] - b[1]) / (1 + np.exp(power)) + b[1]

    start = [y.max(), y.min(), x.mean(), x.std() / 4]
    scale = [y.std(), y.std(), x.std(), x.std()]
    fit = least_squares(lambda b: curve(b) - y, start, x_scale=scale, xtol=1e-14, ftol=1e-14, gtol=1e-14, max_nfev=5000)
    return curve(fit.x)


def rmse(x, y):
    """sqrt(mean((x - y)^2))."""
    return math.sqrt(math.fsum((float(a) - float(b)) ** 2 for a, b in zip(x, y, strict=True)) / len(x))


def bootstrap_spearman(x, y, *, groups, resamples, rng):
    """SROCC of resamples of whole groups, each built and ranked from scratch (Field and Welsh 2007)."""
    names = sorted(set(groups))
    rows_of = {name: [i for i, group in enumerate(groups) if group == name] for name in names}
    values = []
    for _ in range(resamples):
        drawn = [names[i] for i in rng.integers(len(names), size=len(names))]
        rows = [row for name in drawn for row in rows_of[name]]
        values.append(spearman([x[row] for row in rows], [y[row] for row in rows]))
    return values


def corrected_t_interval(differences, *, num_train, num_test, level):
    """mean -+ t sqrt((1/K + n_test/n_train) S^2), K - 1 degrees of freedom (Nadeau and Bengio 2003, equation 9)."""
    from scipy.stats import t

    k, mean = len(differences), math.fsum(differences) / len(differences)
    variance = math.fsum((d - mean) ** 2 for d in differences) / (k - 1)
    half = t.ppf((1 + level) / 2, k - 1) * math.sqrt((1 / k + num_test / num_train) * variance)
    return mean - half, mean + half


def no_image_floor(label, *, prompts, sources, train, test, k):
    """Source mean + n / (n + k) * mean residual of the prompt, by dictionaries (Henderson 1975)."""
    label = [float(value) for value in label]
    train = [row for row in train if not math.isnan(label[row])]
    overall = sum(label[row] for row in train) / len(train)
    source_mean, effect = {}, {}
    for name in set(sources):
        of_source = [label[row] for row in train if sources[row] == name]
        source_mean[name] = sum(of_source) / len(of_source) if of_source else overall
    for name in set(prompts):
        residuals = [label[row] - source_mean[sources[row]] for row in train if prompts[row] == name]
        effect[name] = sum(residuals) / (len(residuals) + k) if residuals else 0.0
    return [source_mean[sources[row]] + effect[prompts[row]] for row in test]


def variance_ratio(values, codes):
    """Residual over group variance by the method of moments, unequal sizes (Searle, Casella, McCulloch 1992).

    k = MSW / ((MSB - MSW) / n0), n0 = (N - sum n_g^2 / N) / (G - 1).
    """
    groups = [[v for v, c in zip(values, codes, strict=True) if c == name] for name in sorted(set(codes))]
    total, mean = len(values), math.fsum(values) / len(values)
    inside = sum((v - sum(group) / len(group)) ** 2 for group in groups for v in group)
    outside = sum(len(group) * (sum(group) / len(group) - mean) ** 2 for group in groups)
    msw, msb = inside / (total - len(groups)), outside / (len(groups) - 1)
    n0 = (total - sum(len(group) ** 2 for group in groups) / total) / (len(groups) - 1)
    return msw / ((msb - msw) / n0)


def leaks(sides, groups):
    """Tell whether two sides (collections of rows) share a group, by sets."""
    seen = [{groups[row] for row in side} for side in sides]
    return any(seen[i] & seen[j] for i in range(len(seen)) for j in range(i))


def huber(x, y, w, *, delta):
    """Mean of w h(x - y), h = e^2/2 up to delta, then delta (|e| - delta/2) (Huber 1964)."""
    errors = [abs(a - b) for a, b in zip(x, y, strict=True)]
    return math.fsum(
        g * (e * e / 2 if e <= delta else delta * (e - delta / 2)) for g, e in zip(w, errors, strict=True)
    ) / len(errors)


def weighted_pearson(x, y, w, *, eps=0.0):
    """Pearson's correlation where row i has the mass w_i / sum w; eps joins the product of variances."""
    mass = [g / math.fsum(w) for g in w]
    mx, my = (math.fsum(g * a for g, a in zip(mass, values, strict=True)) for values in (x, y))
    xy = math.fsum(g * (a - mx) * (b - my) for g, a, b in zip(mass, x, y, strict=True))
    xx, yy = (
        math.fsum(g * (a - m) ** 2 for g, a in zip(mass, values, strict=True)) for values, m in ((x, mx), (y, my))
    )
    return xy / math.sqrt(xx * yy + eps)


def margin_rank(x, y, w):
    """Mean over pairs y_i > y_j of w_i w_j max(0, (y_i - y_j) - (x_i - x_j)) (Sun, Min, Lu, Zhai 2022)."""
    found = [
        w[i] * w[j] * max(0.0, (y[i] - y[j]) - (x[i] - x[j]))
        for i in range(len(x))
        for j in range(len(x))
        if y[i] > y[j]
    ]
    return math.fsum(found) / max(len(found), 1)


def thurstone_fidelity(x, y, w, std):
    """Mean over pairs i < j of w_i w_j (1 - sqrt(p p') - sqrt((1 - p)(1 - p'))) (Thurstone 1927; Tsai 2007)."""
    from scipy.stats import norm

    found = []
    for i in range(len(x)):
        for j in range(i):
            spread = math.hypot(std[i], std[j])
            p, q = norm.cdf((y[i] - y[j]) / spread), norm.cdf((x[i] - x[j]) / spread)
            p_not, q_not = norm.sf((y[i] - y[j]) / spread), norm.sf((x[i] - x[j]) / spread)
            found.append(w[i] * w[j] * (1 - math.sqrt(p * q) - math.sqrt(p_not * q_not)))
    return math.fsum(found) / max(len(found), 1)
