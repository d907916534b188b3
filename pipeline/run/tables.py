"""Metrics as lines for a person: every result beside its floors. Spec section 5."""

from __future__ import annotations

from typing import Any

COLUMNS = ("srocc", "krocc", "plcc", "plcc_mapped", "rmse", "main")
HEADINGS = ("SROCC", "KROCC", "PLCC", "mapped", "RMSE", "main")
KIND_WORDS = {
    "grouped": "grouped by prompt",
    "random": "random",
    "column": "from the split column",
    "all": "none, the run did not train on this cache",
}


def metrics_table(metrics: dict[str, Any]) -> str:
    """Return the test metrics with intervals, floors, sources and advice as aligned text."""
    split = metrics["split"]
    rows = split["rows"]
    counts = f"{rows['test']:,} test rows" + (
        f" ({rows['train']:,} train, {rows['val']:,} validation)" if rows["train"] else ""
    )
    leak = "; LEAKS: some prompts are on two sides, so these figures flatter" if split["leaks_groups"] else ""
    lines = [f"split: {KIND_WORDS[split['kind']]}, {counts}{leak}", ""]
    if split.get("note"):
        lines[1:1] = [f"       {split['note']}"]
    lines.append(f"{'':14}{'':24}" + "".join(f"{word:>8}" for word in HEADINGS) + "   SROCC 95 %")
    for label, figures in metrics["test"].items():
        lines.append(_row(label, "trained heads", figures))
        for floor, words in (("no_image", "floor: no image"), ("cosine", "floor: zero-shot cosine")):
            if label in metrics["floors"][floor]:
                lines.append(_row("", words, metrics["floors"][floor][label]))
    lines += _source_lines(metrics["per_source"])
    lines += [f"note ({label}): {f['note']}" for label, f in metrics["test"].items() if f.get("note")]
    advice = [entry for entry in metrics["diagnostics"] if entry["advice"]]
    lines += [f"advice ({entry['name']}): {entry['advice']}" for entry in advice]
    return "\n".join(lines)


def _row(label: str, what: str, figures: dict[str, Any]) -> str:
    interval = figures.get("srocc_ci")
    shown = f"   {_number(interval[0]).strip()} to {_number(interval[1]).strip()}" if interval and any(interval) else ""
    return f"{label:14}{what:24}" + "".join(_number(figures[name]) for name in COLUMNS) + shown


def _source_lines(per_source: dict[str, Any]) -> list[str]:
    sources = sorted({source for found in per_source.values() for source in found})
    if not sources:
        return []
    width = max(len("SROCC per source"), *map(len, sources)) + 2
    lines = ["", f"{'SROCC per source':{width}}{'rows':>6}" + "".join(f"{label:>14}" for label in per_source)]
    for source in sources:
        found = [figures.get(source, {"srocc": None, "n": 0}) for figures in per_source.values()]
        count = max(figures["n"] for figures in found)
        lines.append(f"{source:{width}}{count:>6}" + "".join(_number(figures["srocc"], 14) for figures in found))
    return lines


def _number(value: float | None, width: int = 8) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.3f}"
