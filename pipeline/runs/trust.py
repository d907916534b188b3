"""How far to trust a single score: its interval, and whether the row is like those that the run was trained on.

Both are fitted when a run is made, from what left-out fits or the validation rows say, and lie beside its heads as
`trust.safetensors`: numbers and keys, no prompt, label, path or name of a source. Knows rows, scores and that file.
Must not know heads or backbones; never looks at a test row but to judge it.

Shapes: N rows of a cache, M rows that are fitted to, B rows of a block, W width of a view, D width of embeddings.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from deltaclip.base.errors import UserError
from deltaclip.base.kinds import refuse_other
from deltaclip.features.data.views import CENTER
from deltaclip.pipeline.model.kernel import chosen_rows
from deltaclip.pipeline.rows.cached_rows import row_keys
from deltaclip.pipeline.rows.split_rows import joined_groups
from deltaclip.pipeline.runs.prediction_table import FLAGGED, Scores, TrustColumns
from deltaclip.pipeline.scoring.conformal import Curve, Intervals, Reach, Sources, fit_intervals
from deltaclip.pipeline.scoring.likeness import Likeness, Part, fit_likeness
from deltaclip.pipeline.scoring.set_likeness import Metric, SetLikeness, Usual, fit_set_likeness

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from deltaclip.pipeline.rows.cached_rows import CacheRows
    from deltaclip.pipeline.rows.task import Task
    from deltaclip.pipeline.scoring.groups import KeyArray

    Vectors = Mapping[str, NDArray[np.floating]]


FILE = "trust.safetensors"
VERSION = 1
COVERAGE = 0.9  # of intervals, where nobody asks for another
PROMPT = "prompt"  # the part that is no view of the image
# Rows that likeness is fitted to and that are judged at a time: whole groups, 60 MB of embeddings at D = 768.
MAX_ROWS, BLOCK = 10_000, 16_384
# With fewer validation rows the change that a correction brings to errors is not measured but taken to be none.
MIN_CHANGE_ROWS = 30
UNUSUAL = 0.05  # a share that one flag in a hundred rows hardly ever makes


# ---- What a run says of a score


@dataclass(frozen=True, kw_only=True)
class Trust:
    """Intervals by target, and what rows are like, and sets of rows where the training knew sources.

    `missing` says of a target without intervals why it has none.
    """

    intervals: Mapping[str, Intervals]
    likeness: Likeness | None
    set_likeness: SetLikeness | None = None
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[str, ...]:
        """Views of the image whose vectors are needed, and PROMPT."""
        return () if self.likeness is None else tuple(self.likeness.parts)

    @property
    def views(self) -> tuple[str, ...]:
        """Views of the image beside `center` that are needed."""
        return tuple(name for name in self.parts if name not in (CENTER, PROMPT))

    def judge(
        self,
        scores: Mapping[str, NDArray[np.float32]],
        vectors: Vectors,
        *,
        coverage: float = COVERAGE,
        source_N: KeyArray | None = None,
    ) -> TrustColumns:
        """Return intervals of scores and which part of a row is unlike those that the run was trained on.

        Args:
            scores: by target, (N,); NaN where there is none.
            vectors: by part, (N, W); the prompt's 0 in rows without one, or missing for all.
            coverage: share of labels that is to lie inside.
            source_N: keys of the sources where they are known.
        """
        num_rows = len(next(iter(vectors.values())))
        coordinates = {
            name: part.coordinates(_known(vectors[name], name))
            for name, part in (self.likeness.parts.items() if self.likeness else ())
            if name in vectors
        }
        flag_N = np.full(num_rows, -1, dtype=np.int8)
        if self.likeness is not None and coordinates:
            ratio_N, part_N = self.likeness.judge(coordinates)
            flag_N = np.where(ratio_N > 1, part_N, -1).astype(np.int8)
        looks_NC, low, high = _looks(self.likeness, coordinates, num_rows), {}, {}
        for target, score_N in scores.items():
            low[target], high[target] = (np.full(num_rows, np.nan, np.float32) for _ in range(2))
            if target in self.intervals:
                low[target], high[target] = self.intervals[target].bounds(
                    score_N, looks_NC, coverage=coverage, source_N=source_N
                )
        rank_N = np.full(num_rows, np.nan, dtype=np.float32)
        # What is put in place of a part that all rows lack would say that they are like the training.
        if self.set_likeness is not None and coordinates.keys() >= {CENTER, *self.views}:
            rank_N = self.set_likeness.rank(looks_NC)
        return TrustColumns(low, high, flag_N, self.parts, rank_N)

    def excess(self, columns: TrustColumns, images_N: NDArray[Any]) -> float | None:
        """Return how far images together lie beyond the sources of the training, more than 1 where they are unlike.

        `images_N` are their names: an image that is there twice counts once. None where sources were not known, or the
        images are too few.
        """
        return None if self.set_likeness is None else self.set_likeness.usual.excess(columns.rank_N, images_N)

    def notes(self, coverage: float) -> list[str]:
        """Say of which targets there are no intervals, or none at this coverage, and whether rows can be told apart."""
        lines = [f"no intervals of {target}: {why}" for target, why in self.missing.items()]
        few = {target: found for target, found in self.intervals.items() if found.most < coverage}
        for target, found in few.items():
            groups = "group" if found.num_groups == 1 else "groups"
            lines.append(
                f"the intervals of {target} are all of 0 to 1: {found.num_groups:,} {groups} to learn from allow a "
                f"coverage of at most {found.most:.3f}"
            )
        if self.likeness is None:
            lines.append("what is unlike the training is not told: it had too few groups")
        return lines


def unlike_words(columns: TrustColumns, num_scored: int, what: str) -> str:
    """Say how many of the scored rows, `what` they are called, are unlike those of the training, and by which part."""
    return flagged_words(columns.flags, num_scored, what)


def flagged_words(flags: Iterable[str], num_scored: int, what: str) -> str:
    """Say the same from the column `flag` of a table."""
    flagged = [flag.removeprefix(FLAGGED) for flag in flags if flag]
    if not flagged:
        return f"none of {num_scored:,} {what} is unlike those that the run was trained on"
    parts = [(count, name) for name, count in Counter(flagged).items()]
    by = ", ".join(f"{count:,} by {name}" for count, name in sorted(parts, reverse=True))
    verb = "is" if len(flagged) == 1 else "are"
    doubt = ": their scores and intervals are a guess" if len(flagged) > UNUSUAL * num_scored else ""
    return f"{len(flagged):,} of {num_scored:,} {what} {verb} unlike those that the run was trained on ({by}){doubt}"


def together_words(excess: float | None, what: str) -> list[str]:
    """Say that a set of rows, `what` they are called, is of no source of the training; nothing where it may be."""
    if excess is None or excess <= 1:
        return []
    return [
        f"together the {what} are unlike every source that the run was trained on, as those of a new generator are: "
        "intervals do not hold; rate some of them"
    ]


def _known(vector_NW: NDArray[np.floating], name: str) -> NDArray[np.floating]:
    """Return vectors with NaN for those that are none: prompts that are 0."""
    if name != PROMPT:
        return vector_NW
    return np.where(np.any(vector_NW, axis=1, keepdims=True), vector_NW, np.nan)


def _looks(
    likeness: Likeness | None, coordinates: Mapping[str, NDArray[np.float32]], num_rows: int
) -> NDArray[np.float32]:
    """Return the coordinates of what the image looks like, from which its source is guessed, (N, C).

    Those of a part that rows lack are 0, what a row in the middle has.
    """
    found = [
        coordinates.get(name, np.zeros((num_rows, part.landmark_LC.shape[1]), dtype=np.float32))
        for name, part in (likeness.parts.items() if likeness else ())
        if name != PROMPT
    ]
    return np.concatenate(found, axis=1) if found else np.zeros((num_rows, 0), dtype=np.float32)


# ---- Fitted when a run is made


class Honest(NamedTuple):
    """Scores (N,) that were not learned from the labels beside them, NaN elsewhere; those to come err `ratio` as much.

    `origin` says in a word where they come from.
    """

    score_N: NDArray[np.float32]
    ratio: float
    origin: str


def fit_trust(
    task: Task[Any], honest: Mapping[str, Honest], *, views: Sequence[str] = (), embedded: CacheRows | None = None
) -> Trust:
    """Fit intervals and likeness of a run.

    Args:
        task: what was learned.
        honest: by trained target.
        views: of the image beside `center`; the rows have them.
        embedded: the rows with the embeddings of a tuned backbone.
    """
    rows = embedded or task.rows
    group_N = joined_groups(task.rows)
    chosen = np.sort(np.concatenate([task.split.train, task.split.val]))
    every_M = torch.ones(len(chosen), dtype=torch.bool)
    chosen = chosen[chosen_rows(every_M, group_N[chosen], np.random.default_rng(0), most=MAX_ROWS)]
    sees_prompts = any(target.sees == "pair" and target.name in task.trained for target in task.rows.targets)
    vectors = _vectors(rows, chosen, views=views, prompts=sees_prompts)
    vectors = {name: _known(vector_MW, name) for name, vector_MW in vectors.items()}
    # An embedding's entries are of one kind, those of a further view are not.
    likeness = fit_likeness(
        vectors, group_N[chosen], each={name: name.rpartition(":")[2] not in (CENTER, PROMPT) for name in vectors}
    )
    coordinates = {name: part.coordinates(vectors[name]) for name, part in (likeness.parts.items() if likeness else ())}
    looks_MC, sources = _looks(likeness, coordinates, len(chosen)), task.rows.rows.text["source"]
    source_M = row_keys(sources)[chosen] if sources.some() else None
    intervals, missing = dict[str, Intervals](), dict[str, str]()
    for target, found in honest.items():
        fitted = fit_intervals(
            found.score_N[chosen],
            task.rows.label(target)[chosen],
            group_N[chosen],
            looks_MC,
            source_N=source_M,
            ratio=found.ratio,
        )
        if fitted is None:
            missing[target] = "no validation row has a label"
        else:
            intervals[target] = fitted
    sets = fit_set_likeness(looks_MC, group_N[chosen], source_M) if source_M is not None and likeness else None
    return Trust(intervals=intervals, likeness=likeness, missing=missing, set_likeness=sets)


def honest_scores(
    task: Task[Any], scores: Scores, *, left_out: Mapping[str, NDArray[np.float32]], kept: Mapping[str, int]
) -> dict[str, Honest]:
    """Return by trained target the scores to calibrate on.

    Where a base was fitted in closed form, what it says of training and validation rows without their group. A
    correction on top has learned from the training rows, so its own errors there are too small: the base's stand for
    them, changed by as much as the correction changes the error of the validation rows. Else the validation rows.

    Args:
        task: what was learned.
        scores: of all rows.
        left_out: by target, (N,), what the base says of fitted rows without their group.
        kept: the epoch that is kept by target; 0 is the base alone.
    """
    found, val = dict[str, Honest](), task.split.val
    for target in task.trained:
        score_N = scores.of(target)
        if target not in left_out:
            honest_N = np.full(len(score_N), np.nan, dtype=np.float32)
            honest_N[val] = score_N[val]
            found[target] = Honest(honest_N, 1.0, "validation")
            continue
        base_N, label_N = np.clip(left_out[target], 0, 1).astype(np.float32), task.rows.label(target)
        known = val[np.isfinite(label_N[val])]
        before = float(np.abs(label_N[known] - base_N[known]).sum())
        changes = kept.get(target, 0) > 0 and len(known) >= MIN_CHANGE_ROWS and before > 0
        ratio = float(np.abs(label_N[known] - score_N[known]).sum()) / before if changes else 1.0
        found[target] = Honest(base_N, ratio, "left-out")
    return found


def trusted(
    trust: Trust,
    rows: CacheRows,
    scores: Scores,
    *,
    coverage: float = COVERAGE,
    embedded: CacheRows | None = None,
) -> Scores:
    """Return the scores of all rows of a cache with their intervals and flags; vectors are read a block at a time.

    The rows have the views that were fitted to.
    """
    sources, parts = rows.rows.text["source"], list[TrustColumns]()
    key_N = row_keys(sources) if sources.some() else None
    everything = np.arange(len(rows.rows))
    for chosen, vectors in _blocks(embedded or rows, everything, views=trust.views, prompts=PROMPT in trust.parts):
        parts.append(
            trust.judge(
                {target: scores.of(target)[chosen] for target in scores.targets},
                vectors,
                coverage=coverage,
                source_N=None if key_N is None else key_N[chosen],
            )
        )
    return Scores(scores.targets, TrustColumns.joined(parts))


def _vectors(rows: CacheRows, chosen: NDArray[np.int64], *, views: Sequence[str], prompts: bool) -> Vectors:
    blocks = [vectors for _, vectors in _blocks(rows, chosen, views=views, prompts=prompts)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _blocks(
    rows: CacheRows, chosen: NDArray[np.int64], *, views: Sequence[str], prompts: bool
) -> Iterator[tuple[NDArray[np.int64], Vectors]]:
    """Yield some rows with their vectors by part, BLOCK rows at a time."""
    inputs = rows.inputs()
    names = [CENTER, *(view for view in views if view in inputs), *([PROMPT] if prompts else [])]
    for start in range(0, len(chosen), BLOCK):
        own = chosen[start : start + BLOCK]
        yield own, {name: inputs[name][torch.from_numpy(own)].float().cpu().numpy() for name in names}


# ---- On disk


def save_trust(path: Path, trust: Trust) -> None:
    """Write a trust file."""
    from safetensors.numpy import save_file

    arrays = dict[str, Any]()
    about: dict[str, Any] = {"version": VERSION, "missing": dict(trust.missing), "intervals": {}, "likeness": None}
    if trust.likeness is not None:
        about["likeness"] = {"limit": trust.likeness.limit, "num_groups": trust.likeness.num_groups, "parts": {}}
        for name, part in trust.likeness.parts.items():
            about["likeness"]["parts"][name] = {"rest": part.rest, "usual": part.usual}
            arrays |= {f"part.{name}.{each}": getattr(part, each) for each in PART_ARRAYS}
    if trust.set_likeness is not None:
        own = trust.set_likeness
        arrays |= {f"set.{name}": array for name, array in (own.metric._asdict() | own.usual._asdict()).items()}
        arrays["set.left_out_Q"] = own.left_out_Q
    for target, found in trust.intervals.items():
        about["intervals"][target] = {"num_groups": found.num_groups, "error": {}}
        for kind, reach in (("guessed", found.guessed), ("told", found.told)):
            if reach is not None:
                about["intervals"][target]["error"][kind] = reach.error
                arrays |= {f"{target}.{kind}.{name}": array for name, array in _reach_arrays(reach).items()}
        if found.sources is not None:
            arrays |= {f"{target}.sources.{name}": array for name, array in vars(found.sources).items()}
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(arrays, path, metadata={"deltaclip": json.dumps(about)})


PART_ARRAYS = ("shift_W", "scale_W", "basis_WC", "landmark_LC")


def _reach_arrays(reach: Reach) -> dict[str, NDArray[np.float64]]:
    return {"shift_F": reach.shift_F, "weight_F": reach.weight_F, **reach.curve._asdict()}


def load_trust(path: Path) -> Trust | None:
    """Read a trust file; None where there is none, as in a run of an earlier release.

    Raises:
        UserError: damaged, or of a later release.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            about = json.loads((file.metadata() or {})["deltaclip"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        if about["version"] > VERSION:
            raise UserError("was written by a later release", place=path, remedy="update deltaclip, or train again")
        return Trust(
            intervals={target: _read_intervals(target, each, arrays) for target, each in about["intervals"].items()},
            likeness=_read_likeness(about["likeness"], arrays),
            missing=about["missing"],
            set_likeness=_read_set_likeness(arrays),
        )
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        refuse_other(path, {"safetensors"}, what="safetensors file")
        raise UserError(f"cannot be read ({error})", place=path, remedy="train again") from error


def _read_likeness(about: dict[str, Any] | None, arrays: Mapping[str, Any]) -> Likeness | None:
    if about is None:
        return None
    parts = {
        name: Part(**{each: arrays[f"part.{name}.{each}"] for each in PART_ARRAYS}, **numbers)
        for name, numbers in about["parts"].items()
    }
    return Likeness(parts, about["limit"], about["num_groups"])


def _read_set_likeness(arrays: Mapping[str, Any]) -> SetLikeness | None:
    if "set.left_out_Q" not in arrays:
        return None
    metric = Metric(*(arrays[f"set.{name}"] for name in Metric._fields))
    usual = Usual(*(arrays[f"set.{name}"] for name in Usual._fields))
    return SetLikeness(metric, arrays["set.left_out_Q"], usual)


def _read_intervals(target: str, about: dict[str, Any], arrays: Mapping[str, Any]) -> Intervals:
    def reach(kind: str) -> Reach | None:
        if kind not in about["error"]:
            return None
        own = {name: arrays[f"{target}.{kind}.{name}"] for name in ("shift_F", "weight_F", *Curve._fields)}
        curve = Curve(*(own[name] for name in Curve._fields))
        return Reach(about["error"][kind], own["shift_F"], own["weight_F"], curve)

    own = f"{target}.sources."
    sources = {name.removeprefix(own): array for name, array in arrays.items() if name.startswith(own)}
    guessed = reach("guessed")
    if guessed is None:
        raise ValueError(f"{target} has no intervals")
    return Intervals(guessed, reach("told"), Sources(**sources) if sources else None, about["num_groups"])
