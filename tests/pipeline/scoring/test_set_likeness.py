"""Sets of rows: measures against scipy, sets of known sources and of a new one between them, what is too little."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import mahalanobis

from deltaclip.pipeline.scoring.groups import group_keys
from deltaclip.pipeline.scoring.set_likeness import MIN_SET, ROUND, _fit_metric, fit_set_likeness

PLACES = np.array([[2.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0], [-1.2, -1.2, -1.2, 0]])


def drawn(rng, place_C, num_groups):
    """Return rows of one source: prompts move them all over the place, the source only a little."""
    return place_C + rng.standard_normal((num_groups, 4)) * [1, 1, 1, 8]


def training(rng, num_groups):
    x_NC = np.concatenate([drawn(rng, place_C, num_groups) for place_C in PLACES])
    groups_N = np.tile(np.arange(num_groups), len(PLACES))
    return x_NC, groups_N, group_keys(np.repeat(["a", "b", "c", "d"], num_groups))


def drawn_towards_diagonal(cov_CC):
    return (1 - ROUND) * cov_CC + ROUND * np.diag(np.diag(cov_CC))


def test_measure_is_the_relative_mahalanobis_distance():
    rng = np.random.default_rng(0)
    x_NC, _, source_N = training(rng, 60)
    code_N = np.unique(source_N, return_inverse=True)[1]
    mean_KC = np.stack([x_NC[code_N == code].mean(axis=0) for code in range(4)])
    within = np.linalg.inv(drawn_towards_diagonal(np.cov((x_NC - mean_KC[code_N]).T, bias=True)))
    overall = np.linalg.inv(drawn_towards_diagonal(np.cov(x_NC.T, bias=True)))
    point_NC = 3 * rng.standard_normal((20, 4))
    expected_N = [
        min(mahalanobis(x_C, mean_C, within) ** 2 for mean_C in mean_KC)
        - mahalanobis(x_C, x_NC.mean(axis=0), overall) ** 2
        for x_C in point_NC
    ]
    # Matrices are kept in float32, and 1e-6 of a variance is added to each.
    assert _fit_metric(x_NC, code_N).relative(point_NC) == pytest.approx(expected_N, rel=1e-4, abs=1e-3)


def test_sets_of_known_sources_are_usual_and_those_of_a_new_one_are_not():
    rng = np.random.default_rng(1)
    found = fit_set_likeness(*training(rng, 200))
    images_M = np.arange(40)
    between_C = PLACES.mean(axis=0)

    def share(draw):
        excess = [found.usual.excess(found.rank(draw()), images_M) for _ in range(200)]
        return np.mean([each > 1 for each in excess])

    for place_C in PLACES:
        assert share(lambda place_C=place_C: drawn(rng, place_C, 40)) <= 0.03  # 200 sets at 1 %: an SD of .007
    assert share(lambda: np.concatenate([drawn(rng, place_C, 10) for place_C in PLACES])) <= 0.03
    assert share(lambda: drawn(rng, between_C, 40)) > 0.9
    # No single one of these is stranger than rows of the training are.
    assert (found.rank(drawn(rng, between_C, 400)) > 0.99).mean() < 0.05


def test_too_little_says_nothing():
    rng = np.random.default_rng(2)
    x_NC, groups_N, source_N = training(rng, 40)
    assert fit_set_likeness(x_NC[:40], groups_N[:40], source_N[:40]) is None  # a single source
    few = groups_N < MIN_SET - 1
    assert fit_set_likeness(x_NC[few], groups_N[few], source_N[few]) is None
    found = fit_set_likeness(x_NC, groups_N, source_N)
    rank_N = found.rank(x_NC[:MIN_SET])
    assert found.usual.excess(rank_N, np.arange(MIN_SET)) is not None
    assert found.usual.excess(rank_N, np.arange(MIN_SET) // 2) is None  # every image twice
    rank_N[0] = np.nan
    assert found.usual.excess(rank_N, np.arange(MIN_SET)) is None
    assert found.usual.excess(rank_N[:0], np.arange(0)) is None


def test_rows_and_coordinates_that_say_nothing():
    rng = np.random.default_rng(3)
    x_NC, groups_N, source_N = training(rng, 40)
    constant_NC = np.concatenate([x_NC, np.full((len(x_NC), 1), 7.0)], axis=1)
    found, wider = (fit_set_likeness(each_NC, groups_N, source_N) for each_NC in (x_NC, constant_NC))
    odd_NC = np.concatenate([x_NC[:5], np.full((5, 1), 9.0)], axis=1)
    assert wider.rank(odd_NC) == pytest.approx(found.rank(x_NC[:5]))
    assert np.isnan(found.rank(np.full((2, 4), np.nan))).all()
    far_N = found.rank(np.full((1, 4), 1e4) * [1, -1, 1, 1])
    assert far_N.tolist() == pytest.approx([160.5 / 161])  # beyond all 160 rows
