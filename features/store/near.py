"""Near copies: images of other bytes that a backbone sees as the same, such as one picture encoded twice.

Two images are near copies where the cosine of their embeddings is above `COSINE`, and they are also far closer than
images of this set are on average: a backbone that puts all images side by side cannot tell. On 2,455 images of AGIQA-3K
and a MobileNetV2 the closest two of different content have .998, on 1,200 drawings and `tiny` .9975.
Knows embeddings and how to search among them. Must not know files or what near copies mean to a split.

Shapes: K images, D width, P pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Read = Callable[[NDArray[np.int64]], NDArray[np.floating]]

COSINE = 0.9999
CLOSER = 1e-3  # a near copy's squared distance, of the mean over all pairs, at most
MAX_IMAGES = 1_000_000  # beyond, the search takes minutes
MAX_CANDIDATES = 5_000_000  # pairs; more are no copies but a backbone that sees one image everywhere
DIRECTIONS = 6  # of 100,000 images of 256 numbers, 4 leave 228,000 candidates in 0.2 s, 6 few in 0.5 s, 12 none in 4 s
SAMPLE, BLOCK = 2048, 32_768


def near_copies(read: Read, entries_K: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the pairs of near copies among images, (P, 2) int64, in order; none among more than `MAX_IMAGES`.

    Exact: no pair is missed, and every one is looked at itself. A projection never lengthens a distance, so pairs that
    are close in full are close in the few directions in which the images differ most, where a k-d tree finds them
    (Bentley 1975). 3,000 images of D = 768 take some 35 ms on two cores, 100,000 about 1.2 s, a million half a minute.

    Args:
        read: gives the embeddings (B, D) of some of the entries, which are rising.
        entries_K: (K,) rising, of the images that have an embedding.
    """
    num_images = len(entries_K)
    none = np.empty((0, 2), dtype=np.int64)
    if not 2 <= num_images <= MAX_IMAGES:
        return none
    sample_SD = _unit(read(entries_K[np.unique(np.linspace(0, num_images - 1, SAMPLE).astype(np.int64))]))
    reach = _reach(sample_SD)
    if not reach:
        return none
    from scipy.spatial import cKDTree

    directions_DP = _directions(sample_SD)
    place_KP = np.concatenate(
        [
            (_unit(read(entries_K[start : start + BLOCK])) @ directions_DP).astype(np.float64)
            for start in range(0, num_images, BLOCK)
        ]
    )
    tree = cKDTree(place_KP)
    wide = reach + 1e-5  # what float32 may lose on the way
    some_SP = place_KP[np.linspace(0, num_images - 1, SAMPLE).astype(np.int64)]
    if (tree.query_ball_point(some_SP, wide, return_length=True).mean() - 1) * num_images / 2 > MAX_CANDIDATES:
        return none
    found_P2 = np.sort(tree.query_pairs(wide, output_type="ndarray").astype(np.int64).reshape(-1, 2), axis=1)
    found_P2 = entries_K[found_P2[np.lexsort(found_P2.T[::-1])]]
    kept = [_closer(read, found_P2[start : start + BLOCK], reach) for start in range(0, len(found_P2), BLOCK)]
    return np.concatenate([none, *kept])


def near_words(pairs: Sequence[tuple[str, str]]) -> str:
    """Say how many pairs of images (names) are near copies, and which is the first."""
    first = "{} and {}".format(*pairs[0])
    if len(pairs) == 1:
        return f"two images are near copies ({first})"
    return f"{len(pairs):,} pairs of images are near copies (for example {first})"


def _reach(sample_SD: NDArray[np.float32]) -> float:
    """Return the distance up to which two unit vectors are near copies, 0 where none can be told."""
    count = len(sample_SD)
    mean_D = sample_SD.mean(axis=0, dtype=np.float64)
    # The mean of |a - b|^2 = 2 - 2 ab over all pairs of two different ones, from the length of the mean vector.
    mean_square = 2 * (1 - float(mean_D @ mean_D)) * count / (count - 1)
    square = min(2 * (1 - COSINE), CLOSER * mean_square)
    return float(np.sqrt(square)) if square > 1e-7 else 0.0


def _directions(sample_SD: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return orthonormal directions in which the sample varies most, (D, P), by two rounds of subspace iteration."""
    centred_SD = sample_SD - sample_SD.mean(axis=0)
    width = min(DIRECTIONS, sample_SD.shape[1])
    basis_DP = np.random.default_rng(0).standard_normal((sample_SD.shape[1], width)).astype(np.float32)
    for _ in range(2):
        basis_DP = np.linalg.qr(centred_SD.T @ (centred_SD @ basis_DP) + 1e-6 * basis_DP)[0]
    return basis_DP


def _closer(read: Read, pair_P2: NDArray[np.int64], reach: float) -> NDArray[np.int64]:
    """Return those pairs of which the full vectors are within reach."""
    if not len(pair_P2):
        return pair_P2
    distinct, inverse = np.unique(pair_P2, return_inverse=True)
    vector_BD, inverse = _unit(read(distinct)), inverse.reshape(-1, 2)
    near = []
    for start in range(0, len(pair_P2), 1024):
        first, second = inverse[start : start + 1024].T
        near.append(((vector_BD[first] - vector_BD[second]).astype(np.float64) ** 2).sum(axis=1) < reach**2)
    return np.asarray(pair_P2[np.concatenate(near)])


def _unit(vector_BD: NDArray[np.floating]) -> NDArray[np.float32]:
    found = np.asarray(vector_BD, dtype=np.float32)
    return np.asarray(found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12))
