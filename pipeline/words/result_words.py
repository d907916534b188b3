"""What came out, in words: metrics with every result beside its floors, comparisons, a sweep's heat maps.

Knows rows of plain values alone.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


# ---- Metrics as lines for a person: every result beside its floors


COLUMNS = ("srocc", "krocc", "plcc", "plcc_mapped", "rmse", "main")
HEADINGS = ("SROCC", "KROCC", "PLCC", "mapped", "RMSE", "main")
KIND_WORDS = {
    "grouped": "grouped by prompt",
    "random": "random",
    "column": "from the split column",
    "all": "none, the run did not train on this cache",
}
COMPARED_OVER = {
    "rows": "differences from the first run: SROCC, paired bootstrap over prompts",
    "splits": "differences from the first run: SROCC, mean over splits (seeds {seeds}), t-interval over splits, "
    "widened because they share training rows",
    "weights": "differences from the first run: SROCC, mean over initial weights (seeds {seeds}) on one split, "
    "t-interval over weights",
}


def metrics_table(metrics: dict[str, Any]) -> str:
    """Return the test metrics with intervals, floors and sources as aligned text."""
    split = metrics["split"]
    rows = split["rows"]
    test, train, val = (_count(rows[side]) for side in ("test", "train", "val"))
    counts = f"{test} test rows" + (f" ({train} train, {val} validation)" if rows["train"] else "")
    leak = "; LEAKS: some prompts or images are on two sides, so these figures flatter" if split["leaks_groups"] else ""
    lines = [f"split: {KIND_WORDS[split['kind']]}, {counts}{leak}", ""]
    if split.get("note"):
        lines[1:1] = [f"       {split['note']}"]
    repeats = len(split["seeds"])
    if repeats > 1:
        lines.append(f"mean ± SD of {repeats} repeats, split seeds {split['seeds'][0]} to {split['seeds'][-1]}")
    width = 15 if repeats > 1 else 8
    ends = "" if repeats > 1 else "   SROCC 95 %"
    if metrics["test"] or "pairs" not in metrics:
        lines.append(f"{'':14}{'':24}" + "".join(f"{word:>{width}}" for word in HEADINGS) + ends)
    for label, figures in metrics["test"].items():
        lines.append(_row(label, "trained heads", figures, width=width))
        for floor, words in (("no_image", "floor: no image"), ("cosine", "floor: zero-shot cosine")):
            if label in metrics["floors"][floor]:
                lines.append(_row("", words, metrics["floors"][floor][label], width=width))
    if means := floor_means(metrics["floors"]["no_image"]):
        lines.append(f"no image: {means}, chosen on training rows")
    lines += _source_lines(metrics["per_source"])
    lines += pair_lines(metrics)
    lines += _trust_lines(metrics)
    lines += [f"note ({label}): {f['note']}" for label, f in metrics["test"].items() if f.get("note")]
    return "\n".join(lines)


def pair_lines(metrics: dict[str, Any]) -> list[str]:
    """Say of each target how many test pairs are ordered as people did, beside chance and the cosine."""
    pairs = metrics.get("pairs", {})
    lines = []
    for label, found in pairs.get("test", {}).items():
        cosine = f", cosine {_number(found['cosine']['share'], 0)}" if "cosine" in found else ""
        bounds = found["share_ci"]
        shown = f" ({_interval(*bounds)})" if all(isinstance(bound, float) for bound in bounds) else ""
        ties = f", {_count(found['ties'])} ties of people left out" if _mean(found["ties"]) else ""
        count = f"{_count(found['n'])} test pairs{ties}"
        lines.append(f"{label:14}{_number(found['share'], 0)}{shown} of {count}; chance .5{cosine}")
    if lines:
        lines = ["", "pairs ordered rightly, 95 % interval over prompts", *lines]
    if _mean(pairs.get("across")):
        lines.append(f"{_count(pairs['across'])} pairs have images on two sides of the split and are left out")
    return lines


def floor_means(floors: dict[str, Any]) -> str:
    """Say what the no-image floors predict from, targets of one kind together; '' of an earlier release."""
    labels_of: dict[str, list[str]] = {}
    for label, found in floors.items():
        if means := found.get("means"):
            labels_of.setdefault(means, []).append(label)
    return "; ".join(means if len(labels_of) == 1 else f"{', '.join(of)}: {means}" for means, of in labels_of.items())


def comparison_basis(comparison: dict[str, Any]) -> str:
    """Return which rows a comparison of runs rests on, and what its intervals vary over."""
    rows = comparison["rows"]
    counts = f"{rows[0]:,}" if len(set(rows)) == 1 else f"{min(rows):,} to {max(rows):,}"
    over = COMPARED_OVER[comparison["over"]].format(seeds=_seed_words(comparison["seeds"]))
    return f"{counts} rows that are test in all runs; {over}"


def comparison_table(comparison: dict[str, Any]) -> str:
    """Return the comparison of runs: what it rests on, then the runs, each but the first with its difference."""
    over = comparison["over"]
    width = max(*map(len, comparison["labels"]), *(len(run) + 2 for run in comparison["runs"])) + 2
    figure = 8 if over == "rows" else 15
    interval = f"{'SROCC 95 %':>20}" if over == "rows" else ""
    head = f"{'SROCC':>{figure}}{interval}{'PLCC':>{figure}}{'difference':>13}{'95 %':>20}{'p':>8}"
    lines = [comparison_basis(comparison), ""]
    for label, entries in comparison["labels"].items():
        lines.append(f"{label:{width}}{head}")
        for run, entry in zip(comparison["runs"], entries, strict=True):
            bounds = f"{_interval(*entry['srocc_ci']):>20}" if over == "rows" else ""
            figures = f"{_number(entry['srocc'], figure)}{bounds}{_number(entry['plcc'], figure)}"
            lines.append(f"{'  ' + run:{width}}{figures}{_difference(entry['difference'])}".rstrip())
    return "\n".join([*lines, *(f"warning: {line}" for line in comparison["warnings"])])


def _difference(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    value = found.get("difference", found.get("mean"))
    shown = "-" if value is None else f"{value:+.3f}"
    return f"{shown:>13}{_interval(found['lo'], found['hi']):>20}{_number(found['p_value'], 8)}"


def _interval(lo: float | None, hi: float | None) -> str:
    return "-" if lo is None or hi is None else f"{lo:.3f} to {hi:.3f}"


def _seed_words(seeds: list[int]) -> str:
    return ", ".join(map(str, seeds))


def _row(label: str, what: str, figures: dict[str, Any], *, width: int) -> str:
    lo, hi = figures.get("srocc_ci", (None, None))
    # Of repeats the SD says more than a mean of intervals.
    shown = f"   {_number(lo, 0)} to {_number(hi, 0)}" if isinstance(lo, float) and isinstance(hi, float) else ""
    return f"{label:14}{what:24}" + "".join(_number(figures[name], width) for name in COLUMNS) + shown


def _source_lines(per_source: dict[str, Any]) -> list[str]:
    sources = sorted({source for found in per_source.values() for source in found})
    if not sources:
        return []
    width = max(len("SROCC per source"), *map(len, sources)) + 2
    lines = ["", f"{'SROCC per source':{width}}{'rows':>6}" + "".join(f"{label:>14}" for label in per_source)]
    for source in sources:
        found = [figures.get(source, {"srocc": None, "n": 0}) for figures in per_source.values()]
        count = max((figures["n"] for figures in found), key=_mean)
        lines.append(f"{source:{width}}{_count(count):>6}" + "".join(_number(fig["srocc"], 14) for fig in found))
    return lines


def _trust_lines(metrics: dict[str, Any]) -> list[str]:
    """Return how many test rows lie in their intervals, and how many are unlike the training; nothing of old runs."""
    found = {label: each for label, each in metrics.get("intervals", {}).items() if _known(each["coverage"])}
    lines = []
    if found:
        asked = _mean(next(iter(found.values()))["asked"])
        parts = [
            f"{label} {_number(each['coverage'], 0)} (width {_number(each['width'], 0)})"
            for label, each in found.items()
        ]
        lines = [f"intervals at {asked:g} hold, of the test rows' labels: {', '.join(parts)}"]
    share = metrics.get("unlike", {}).get("test")
    if _known(share):
        lines.append(f"unlike the training: {_number(share, 0)} of the test rows (0.01 is usual)")
    return ["", *lines] if lines else []


def _known(value: Any) -> bool:
    return (value["mean"] if isinstance(value, dict) else value) is not None


def _mean(value: Any) -> float:
    return float((value["mean"] if isinstance(value, dict) else value) or 0)


def _count(value: Any) -> str:
    return f"{_mean(value):,.0f}"


def _number(value: Any, width: int) -> str:
    """Return a figure, or mean ± SD of a figure over repeats."""
    if isinstance(value, dict):
        sd = "" if value["sd"] is None else f" ± {value['sd']:.3f}"
        return f"{_number(value['mean'], 0) + sd:>{width}}"
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.3f}"


# ---- The verdict: what a head is worth beside its floor, and at most one thing to do


# A correction of the scores that is not kept leaves the base.
STATES = {"base alone": "no correction was kept: on validation rows the base alone was as good"}
# On AGIQA-3K with an identity base, scales of .05, .1 and .2 reach .68, .68, .69 for quality and .47, .50, .58 for
# consistency. A smaller scale or more epochs, which such figures once asked for too, helped nowhere.
BOUNDED = "a larger --scale {label}=...: many corrections press against it"


SAME = 5e-4  # a line through the cosine, clamped to [0, 1], ranks as it does but for rows at the ends


def with_sentence(verdict: dict[str, Any], label: str, split: dict[str, Any]) -> dict[str, Any]:
    """Return a verdict with its sentence, and in `advice` what to do, '' for nothing.

    Args:
        verdict: the JSON of a `Margin`, `over` what it is, with `cosine` as a further one or None, and what is known of
            the training: `state` of the correction, `lacks_views` of the cache.
        label: the target.
        split: as in `metrics.json`.
    """
    parts = [_against(verdict, "the no-image floor") if verdict["over"] == "no_image" else _over_chance(verdict)]
    if verdict["cosine"]:
        parts.append(_against(verdict["cosine"], "the zero-shot cosine"))
    if state := STATES.get(verdict["state"]):
        parts.append(state)
    leaks = "LEAKS, so this flatters: " if split["leaks_groups"] else ""
    return verdict | {"sentence": leaks + "; ".join(parts), "advice": _advice(verdict, label)}


def verdict_lines(metrics: dict[str, Any]) -> list[str]:
    """Return the verdict on each target, and what to do; none of metrics of an earlier release."""
    verdicts = metrics.get("verdict", {})
    width = max(map(len, verdicts), default=0) + 2
    lines = []
    for label, one in verdicts.items():
        first, *more = one["sentence"].split("; ")
        lines += [f"{label:{width}}{first}", *(f"{'':{width}}{part}" for part in more)]
        lines += [f"{'':{width}}to do: {one['advice']}"] if one["advice"] else []
    head = "verdict: difference of SROCC on test rows, 95 % interval"
    return ["", head, *lines] if lines else []


def _against(margin: dict[str, Any], other: str) -> str:
    if margin["outcome"] == "unjudged":
        return f"too few test rows or groups to compare with {other}"
    if max(abs(margin[name]) for name in ("difference", "lo", "hi")) < SAME:
        return f"ranks as {other} does"
    words = {"clear": f"clear of {other} by", "unclear": f"cannot be told from {other}:", "below": f"below {other} by"}
    return f"{words[margin['outcome']]} {_margin_words(margin)}"


def _over_chance(verdict: dict[str, Any]) -> str:
    why = "no source and no prompt tells rows apart" if verdict["has_floor"] else "no row here was trained on"
    if verdict["outcome"] == "unjudged":
        return "too few test rows or groups to judge"
    words = {"clear": "clear of chance by", "unclear": "cannot be told from chance:", "below": "below chance by"}
    return f"{words[verdict['outcome']]} {_margin_words(verdict)}; there is no no-image floor, {why}"


def _margin_words(margin: dict[str, Any]) -> str:
    """Return a difference of SROCC as `+.11 (.08 to .14)`, with a third digit where two would hide the interval."""
    numbers = [margin[name] for name in ("difference", "lo", "hi")]
    digits = 2 if numbers[2] - numbers[1] >= 0.04 else 3
    # No zero before the point, as figures of this size are written; a rounded 0 has no sign.
    shown = [f"{value:.{digits}f}".replace("0.", ".", 1) for value in numbers]
    first, lo, hi = (word.removeprefix("-") if not float(word) else word for word in shown)
    sign = "+" if numbers[0] > 0 and float(first) else ""
    over = f" over {margin['repeats']} splits" if margin.get("repeats", 1) > 1 else ""
    return f"{sign}{first} ({lo} to {hi}{over})"


def _advice(verdict: dict[str, Any], label: str) -> str:
    """Return the one thing to do that was shown to help, '' for none."""
    if verdict["lacks_views"]:
        more = ", and stages where the tower has blocks" if "stages" in verdict["lacks_views"] else ""
        return f"the same `deltaclip extract` again with --views statistics{more}: bases then see more of a picture"
    return BOUNDED.format(label=label) if verdict["state"] == "bounded" else ""


# ---- The table of an ablation


def variants_table(
    split: Mapping[str, Any],
    compared: Mapping[str, Mapping[str, Any]],
    words: Mapping[str, str],
    *,
    against: str,
    interval: str,
) -> list[str]:
    """Return a table per label for a person, and what its columns are.

    Args:
        split: of all repeats, as in `metrics.json`.
        compared: what `compare_variants` returns.
        words: of each variant what it is; its own name where it is a candidate for the bases.
        against: the variant that differences are taken against.
        interval: what it comes from, and p with it.
    """
    seeds = split["seeds"]
    train, val, test = (_count(split["rows"][side]) for side in ("train", "val", "test"))
    leak = "; LEAKS: some prompts or images are on two sides, so these figures flatter" if split["leaks_groups"] else ""
    counts = f"{test} test rows ({train} train, {val} validation)"
    repeats = f"seeds {seeds[0]} to {seeds[-1]}, mean ± SD" if len(seeds) > 1 else f"seed {seeds[0]}"
    lines = [f"split: {KIND_WORDS[split['kind']]}, {counts}, {repeats}{leak}"]
    if split.get("note"):
        lines.append(f"       {split['note']}")
    shown_names = {name: "candidate" if words[name] == name else name for name in compared}
    names = max(map(len, shown_names.values())) + 2
    wide = max(map(len, words.values())) + 2
    for label in next(iter(compared.values())):
        heading = f"{'test SROCC':>13}{f'- {against}':>{max(12, len(against) + 4)}}{'95 %':>20}{'p':>8}"
        lines += ["", f"{label:{names + wide}}{heading}"]
        for name, found in compared.items():
            if label not in found:
                continue  # a candidate for bases of other targets
            shown = _number(found[label]["test"]["srocc"], 13)
            end = _variant_difference(found[label]["difference"], width=max(12, len(against) + 4))
            lines.append(f"{shown_names[name]:{names}}{words[name]:{wide}}{shown}{end}".rstrip())
    lines += ["", f"95 % and p: {interval}", "            two-sided, one comparison at a time"]
    return lines


def subset_notes(compared: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line for each variant that was fitted on a part of the training rows."""
    found = []
    for name, labels in compared.items():
        for label, one in labels.items():
            parts = [about for about in one["about"] if about.get("rows", 0) < about.get("of_rows", 0)]
            if parts:
                rows, of = parts[0]["rows"], parts[0]["of_rows"]
                found.append(f"note: {name} ({label}) was fitted on {rows:,} of {of:,} training rows, drawn at random")
    return found


def _variant_difference(difference: Mapping[str, Any] | None, *, width: int) -> str:
    if difference is None:
        return ""
    lo, hi = difference["ci"]
    bounds = "-" if lo is None or hi is None else f"{lo:+.3f} to {hi:+.3f}"
    mean = "-" if difference["mean"] is None else f"{difference['mean']:+.3f}"
    return f"{mean:>{width}}{bounds:>20}{_number(difference['p_value'], 8)}"


# ---- Validation scores of a sweep as a table and as heat maps, numbers and text


SHOWN_SETTINGS = 10
SHOWN_MAPS = 3
MAX_CELLS = 12  # along one side, in the terminal; the file has all


def heatmaps(table: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return one map per pair of listed names: the mean validation score over all else that varied.

    Each is `{"x", "y", "x_values", "y_values", "val_score"}`, rows of `val_score` along y; None where no setting is.
    Pairs come with the one first whose cells differ most: it says most.
    """
    values = {name: {row[name] for row in table} for name in names if name != "seed"}
    # Draws from ranges meet in no cell twice: a map of them would be empty but for one setting a row.
    pairs = [(x, y) for x, y in itertools.combinations(values, 2) if len(values[x]) * len(values[y]) <= 4 * len(table)]
    maps = [_heatmap(table, x, y) for x, y in pairs]
    return sorted(maps, key=lambda one: -_range(one))


def _heatmap(table: Sequence[dict[str, Any]], x: str, y: str) -> dict[str, Any]:
    cells = defaultdict(list)
    for row in table:
        cells[row[x], row[y]].append(row["val_score"])
    x_values, y_values = (sorted({row[name] for row in table}) for name in (x, y))
    scores = [[float(np.mean(cells[a, b])) if cells[a, b] else None for a in x_values] for b in y_values]
    return {"x": x, "y": y, "x_values": x_values, "y_values": y_values, "val_score": scores}


def _range(one: dict[str, Any]) -> float:
    known = [score for line in one["val_score"] for score in line if score is not None]
    return float(max(known) - min(known))


def table_lines(table: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Return the best settings as aligned text."""
    columns = [*names, *(name for name in table[0] if name.startswith("val_"))]
    if table[0]["num_seeds"] == 1:
        columns.remove("val_score_mean")
    shown = [[_word(row[name]) for name in columns] for row in table[:SHOWN_SETTINGS]]
    widths = [max(map(len, column)) for column in zip(columns, *shown, strict=True)]
    words = [columns, *shown]
    lines = ["  ".join(f"{word:>{width}}" for word, width in zip(line, widths, strict=True)) for line in words]
    more = len(table) - len(shown)
    return [*lines, *([f"... and {more:,} more in sweep.csv"] if more else [])]


def winner_lines(best: dict[str, Any], edges: dict[str, str], over_default: dict[str, dict[str, Any]]) -> list[str]:
    """Return where the winner of a sweep lies at the edge of what was tried, and how far it is ahead of the default."""
    further = {"smallest": "smaller", "largest": "larger"}
    lines = [
        f"the winner is at the edge of the grid: {name} {_word(best[name])} is the {end} tried; try {further[end]} ones"
        for name, end in edges.items()
    ]
    for label, margin in over_default.items():
        lines.append(f"the winner against the default setting on test rows ({label}): {_against_default(margin)}")
    return [*lines, ""] if lines else []


def _against_default(margin: dict[str, Any]) -> str:
    if margin["outcome"] == "unjudged":
        return "too few test rows or groups to compare"
    words = {"clear": "better by", "unclear": "cannot be told apart,", "below": "worse by"}
    return f"{words[margin['outcome']]} {_margin_words(margin)}"


def heatmap_lines(maps: Sequence[dict[str, Any]]) -> list[str]:
    """Return the maps that say most as text, those that fit a terminal."""
    lines = []
    fitting = [one for one in maps if max(len(one["x_values"]), len(one["y_values"])) <= MAX_CELLS]
    for one in fitting[:SHOWN_MAPS]:
        x_words, y_words = ([_word(value) for value in one[f"{axis}_values"]] for axis in "xy")
        side, width = max(map(len, [*y_words, one["y"]])), max(map(len, [*x_words, "0.000"]))
        lines += ["", f"validation score, {one['y']} down, {one['x']} across"]
        lines.append(f"{'':{side}}  " + "  ".join(f"{word:>{width}}" for word in x_words))
        for word, scores in zip(y_words, one["val_score"], strict=True):
            cells = ["-" if score is None else f"{score:.3f}" for score in scores]
            lines.append(f"{word:>{side}}  " + "  ".join(f"{cell:>{width}}" for cell in cells))
    return lines


def _word(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- Which bases were chosen


def choice_lines(calibration: Mapping[str, Any] | None) -> list[str]:
    """Return a line a target on the base that was chosen, with its figure on left-out rows and the best of the rest."""
    lines, of_pairs = [], (calibration or {}).get("pairs", {})
    for target, choice in ((calibration or {}).get("choice") or {}).items():
        if target in of_pairs:
            lines += _pair_choice_lines(target, of_pairs[target])
            continue
        if choice is None:
            lines.append(f"base          {target}: labels in fewer than two groups: nothing to choose by")
            continue
        figures, shares = choice["left_out"], choice["shares"]
        chosen = " + ".join(name if len(shares) == 1 else f"{share:.2f} {name}" for name, share in shares.items())
        of_chosen = figures["mixture" if len(shares) > 1 else next(iter(shares))]
        rest = {name: found for name, found in figures.items() if name not in shares and name != "mixture"}
        line = f"base          {target}: {chosen}; left-out {_left_out(of_chosen, choice['by'])}"
        if rest:
            sign = -1 if choice["by"] == "rmse" else 1
            second = max(rest, key=lambda name: sign * (rest[name][choice["by"]] or 0.0))
            line += f"; best of {len(rest)} others: {second}, {_left_out(rest[second], choice['by'])}"
        lines.append(line)
    return lines


def _pair_choice_lines(target: str, found: Mapping[str, Any]) -> list[str]:
    shares = found["shares"]
    chosen = " + ".join(name if len(shares) == 1 else f"{share:.2f} {name}" for name, share in shares.items())
    seen = f"{found['pairs']:,} pairs" + (f" and {found['ratings']:,} ratings" if found["ratings"] else "")
    how = f"the likelihood of left-out ones, of {len(found['loss'])} candidates" if found["loss"] else "ratings"
    lines = [f"base          {target}: {chosen}, fitted to {seen}; chosen by {how}"]
    if not found["ratings"]:
        lines.append(f"scale         {target}: pairs alone give no origin and no unit: {found['unit']}")
    return lines


def _left_out(figures: Mapping[str, float | None], by: str) -> str:
    return f"{by.upper()} -" if figures[by] is None else f"{by.upper()} {figures[by]:.3f}"
