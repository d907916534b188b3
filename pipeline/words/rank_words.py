"""A ranking of generators in words: a table of 80 columns, Markdown for a comment, JUnit XML for a build server.

Knows the plain values of a ranking alone.
"""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


WIDTH = 80
BY_SCORES = "by scores alone, a liking of the scorer for one generator counts too: rate some of each"
NAME = 22  # letters of a name of a generator that a table of 80 columns has room for
SHOWN = 5  # prompts that fell most, for a terminal
MOST_TIMES = 1000  # as many pictures are no advice
# What XML and HTML cannot hold, not even escaped.
CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def rank_summary(ranking: Mapping[str, Any]) -> str:
    """Return a ranking as text of at most 80 columns, the gate last."""
    percent = f"{100 * ranking['confidence']:g} %"
    lines = [f"{ranking['run']}: means over prompts, each prompt once, with {percent} intervals"]
    for target, found in ranking["targets"].items():
        lines += ["", *_mean_lines(target, found, ranking, percent), "", *_difference_lines(found, percent)]
    if ranking["fell"]:
        lines += ["", *_fell_lines(ranking)]
    said = [*_notes(ranking), *(["", *gate_lines(ranking)] if ranking["gate"] else [])]
    return "\n".join([*lines, *(part for line in said for part in _wrapped(line))])


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False) or [""]


def _mean_lines(target: str, found: Mapping[str, Any], ranking: Mapping[str, Any], percent: str) -> Iterator[str]:
    width = max([len(target), *(len(_cut(one["generator"])) + 2 for one in found["means"])])
    yield f"{target:{width}} {'prompts':>8} {'pictures':>9} {'mean':>7}   {percent:16} {'unlike':>7}"
    unlike = {one["name"]: one["unlike_share"] for one in ranking["generators"]}
    for one in found["means"]:
        share = unlike[one["generator"]]
        told = "-" if share is None else f"{100 * share:.1f} %"
        mean, name = one["scores"], "  " + _cut(one["generator"])
        counts = f"{mean['units']:8,} {one['rows']:9,}"
        yield f"{name:{width}} {counts} {_number(mean['value']):>7}   {_interval(mean):16} {told:>7}"
    if not any(one["people"] for one in found["means"]):
        return
    yield f"{'people, by ratings':{width}} {'rated':>8} {'saved':>9} {'mean':>7}   {percent:16} ratings alone"
    for one in found["means"]:
        if (people := one["people"]) is not None:
            alone = {"lo": people["alone_lo"], "hi": people["alone_hi"]}
            yield (
                f"{'  ' + _cut(one['generator']):{width}} {people['labels']:8,} {max(0.0, people['saved']):9,.0f} "
                f"{_number(people['value']):>7}   {_interval(people):16} {_interval(alone)}"
            )


def _difference_lines(found: Mapping[str, Any], percent: str) -> Iterator[str]:
    pairs = [_the_higher_first(pair) for pair in found["differences"]]
    names = [f"  {_cut(pair['first'], 16)} {_sign(pair)} {_cut(pair['second'], 16)}" for pair in pairs]
    width = max(len("difference"), *map(len, names))
    yield f"{'difference':{width}} {'prompts':>7} {'value':>7}  {percent:16} {_p_heading(pairs):>8}"
    for name, pair in zip(names, pairs, strict=True):
        judged, count = pair[pair["judged_by"]], f"{pair['scores']['units']:,}" if pair["paired"] else "-"
        figures = f"{count:>7} {_signed(judged['value']):>7}  {_signed_interval(judged):16} {_p_words(pair):>8}"
        yield f"{name:{width}} {figures}{' *' if pair['judged_by'] == 'people' else ''}"
    for words in _difference_notes(pairs):
        yield from _wrapped(words)


def _difference_notes(pairs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Say what the signs mean, and how differences were paired."""
    many = f" of {len(pairs)} differences together (Holm)" if len(pairs) > 1 else ""
    yield f"> better beyond chance{many}, ? cannot be told"
    if any(pair["judged_by"] == "people" for pair in pairs):
        yield "* by ratings, whatever the scorer's bias; the others by scores"
    paired, apart = ([pair for pair in pairs if pair["paired"] is told] for told in (True, False))
    only = [count for pair in paired for count in (pair["only_first"], pair["only_second"])]
    if paired:
        most = max(only)
        left = f"; those that one side alone has are left out, up to {most:,} of a generator" if most else ""
        yield f"paired on the prompts that both have{left}"
    for pair in apart:
        names = f"{_cut(pair['first'], 16)} and {_cut(pair['second'], 16)}"
        yield f"{names}: not paired, no prompts in common"


def _the_higher_first(pair: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a pair the other way round where the difference that decides is below 0."""
    value = pair[pair["judged_by"]]["value"]
    if value is None or value >= 0:
        return pair
    turned = {name: _turned(pair[name]) for name in ("scores", "people")}
    swapped = {"first": pair["second"], "second": pair["first"]}
    return {**pair, **turned, **swapped, "only_first": pair["only_second"], "only_second": pair["only_first"]}


def _turned(figures: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if figures is None:
        return None
    ends = {"value": figures["value"], "lo": figures["hi"], "hi": figures["lo"]}
    return {**figures, **{name: None if end is None else -end for name, end in ends.items()}}


def _sign(pair: Mapping[str, Any]) -> str:
    return ">" if pair["better"] else "?"


def _p_heading(pairs: Sequence[Mapping[str, Any]]) -> str:
    return "p (Holm)" if len(pairs) > 1 else "p"


def _p_words(pair: Mapping[str, Any]) -> str:
    p_value = pair["p_holm"]
    return "-" if p_value is None else "<.001" if p_value < 0.001 else _number(p_value)


def _fell_lines(ranking: Mapping[str, Any]) -> Iterator[str]:
    for target in ranking["targets"]:
        rows = [row for row in ranking["fell"] if row["target"] == target]
        if not rows:
            continue
        yield f"{target}: fell most below {_cut(rows[0]['reference'])}"
        for row in rows[:SHOWN]:
            prompt = _one_line(row["prompt"]) or _one_line(row["image"])
            yield f"  -{row['drop']:.3f}  {_cut(row['generator'], 16)}: {_cut(prompt, 48)}"


def _notes(ranking: Mapping[str, Any]) -> list[str]:
    lines = []
    for one in ranking["generators"]:
        name = one["name"]
        if one["learned"]:
            lines.append(f"{name}: {one['learned']:,} pictures that the run was trained on are left out")
        if one["failed"]:
            lines.append(f"{name}: {one['failed']:,} pictures could not be read, the first: {one['failed_first']}")
        if one["truncated_prompts"]:
            lines.append(f"{name}: {one['truncated_prompts']:,} prompts were cut at the context length")
        lines += [f"{name}: {words}" for words in (*one["together"], *one["notes"])]
    for target, found in ranking["targets"].items():
        lines += [
            f"{target} of {one['generator']}: its rated pictures score unlike the others, so they may be no random "
            "part: then no interval of people's mean holds"
            for one in found["means"]
            if one["odd"]
        ]
        lines += [
            f"{target} of {one['generator']}: {one['labels']:,} rated pictures are too few for people's mean"
            for one in found["means"]
            if one["labels"] and not one["people"]
        ]
    if any(pair["judged_by"] == "scores" for found in ranking["targets"].values() for pair in found["differences"]):
        lines.append(BY_SCORES)
    return [*([""] if lines else []), *lines, *ranking["notes"]]


def gate_lines(ranking: Mapping[str, Any]) -> list[str]:
    """Say of each generator and target whether it drops too far, and what the build should do."""
    gate = ranking["gate"]
    lines = [check_words(check, gate) for check in gate["checks"]]
    ends = {
        "passed": "gate: passed, exit code 0",
        "dropped": "gate: a drop is larger than allowed, exit code 3",
        "unclear": "gate: the data cannot tell, exit code " + ("3 (--strict)" if ranking["strict"] else "0"),
    }
    return [*lines, ends[gate["verdict"]]]


def check_words(check: Mapping[str, Any], gate: Mapping[str, Any]) -> str:
    """Say whether a generator drops too far in a target."""
    by = ", by ratings" if check["judged_by"] == "people" else ""
    allowed = f"{gate['max_drop']:g}"
    what = f"{check['generator']} against {gate['baseline']} in {check['target']}"
    if check["lo"] is None:
        return f"{what}: the data cannot tell, there are too few prompts"
    drop = f"drop {_signed(check['drop'])} ({_signed_interval(check)}{by})"
    if check["verdict"] == "dropped":
        return f"{what}: {drop}, surely more than {allowed}"
    if check["verdict"] == "passed":
        return f"{what}: {drop}, surely at most {allowed}"
    times, noun = check["times_more"], "ratings" if check["judged_by"] == "people" else "prompts"
    more = f"; about {max(2, round(times)):,} times as many {noun} would" if times and times < MOST_TIMES else ""
    return f"{what}: {drop}, the data cannot tell whether it is more than {allowed}{more}"


# ---- Markdown


def rank_markdown(ranking: Mapping[str, Any]) -> str:
    """Return a ranking as Markdown, the decision first."""
    percent = f"{100 * ranking['confidence']:g} %"
    lines = ["# Which generator is better", ""]
    if ranking["gate"]:
        lines += [*(f"* {_escaped(line)}" for line in gate_lines(ranking)), ""]
    unlike = {one["name"]: one["unlike_share"] for one in ranking["generators"]}
    for target, found in ranking["targets"].items():
        lines += [f"## {_escaped(target)}", ""]
        rows = [
            [
                one["generator"],
                f"{one['scores']['units']:,}",
                f"{one['rows']:,}",
                f"{_number(one['scores']['value'])} ({_interval(one['scores'])})",
                _people_cell(one["people"]),
                "" if unlike[one["generator"]] is None else f"{100 * unlike[one['generator']]:.1f} %",
            ]
            for one in found["means"]
        ]
        heads = ["generator", "prompts", "pictures", f"mean score ({percent})", "people's mean, of ratings", "unlike"]
        lines += [*_table(heads, rows), ""]
        pairs = [_the_higher_first(pair) for pair in found["differences"]]
        rows = [
            [
                f"{pair['first']} {_sign(pair)} {pair['second']}",
                f"{pair['scores']['units']:,}" if pair["paired"] else "-",
                f"{_signed(pair[pair['judged_by']]['value'])} ({_signed_interval(pair[pair['judged_by']])})",
                _p_words(pair),
                "ratings" if pair["judged_by"] == "people" else "scores",
            ]
            for pair in pairs
        ]
        heads = ["difference", "prompts", f"value ({percent})", _p_heading(pairs), "by"]
        lines += [*_table(heads, rows), "", *(f"* {_escaped(words)}" for words in _difference_notes(pairs)), ""]
    if ranking["fell"]:
        rows = [
            [row["target"], f"−{row['drop']:.3f}", row["generator"], _one_line(row["prompt"]), _one_line(row["image"])]
            for row in ranking["fell"]
        ]
        lines += ["## Fell most", "", *_table(["target", "drop", "generator", "prompt", "image"], rows), ""]
    lines += [f"* {_escaped(line)}" for line in _notes(ranking) if line]
    return "\n".join(lines).rstrip() + "\n"


def _people_cell(people: Mapping[str, Any] | None) -> str:
    if people is None:
        return ""
    saved = f", saves {people['saved']:,.0f}" if people["saved"] >= 1 else ""
    return f"{_number(people['value'])} ({_interval(people)}; {people['labels']:,} rated{saved})"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_cells(heads), _cells(["---"] * len(heads)), *map(_cells, rows)]


def _cells(words: Sequence[str]) -> str:
    return f"| {' | '.join(word if word == '---' else _escaped(word) for word in words)} |"


def _escaped(words: str) -> str:
    """Return words in which nothing is markup: they hold names and prompts of others."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", _one_line(words))


# ---- JUnit XML


def rank_junit(ranking: Mapping[str, Any]) -> str:
    """Return the gate as JUnit XML: a test for each generator and target.

    A drop is a failure; what the data cannot tell is skipped with its sentence, and a failure under `--strict`.
    """
    gate, suites = ranking["gate"], ET.Element("testsuites")
    failing = {"dropped", *(["unclear"] if ranking["strict"] else [])}
    verdicts = [check["verdict"] for check in gate["checks"]]
    counts = {
        "tests": len(verdicts),
        "failures": sum(verdict in failing for verdict in verdicts),
        "errors": 0,
        "skipped": sum(verdict == "unclear" and verdict not in failing for verdict in verdicts),
    }
    suite = ET.SubElement(
        suites, "testsuite", {"name": "deltaclip rank", **{name: str(value) for name, value in counts.items()}}
    )
    for check in gate["checks"]:
        name = f"{check['generator']} is at most {gate['max_drop']:g} below {gate['baseline']}"
        names = {"classname": f"rank.{check['target']}", "name": name, "time": "0"}
        case = ET.SubElement(suite, "testcase", {key: CONTROLS.sub("?", word) for key, word in names.items()})
        words = CONTROLS.sub("?", check_words(check, gate))
        if check["verdict"] in failing:
            ET.SubElement(case, "failure", {"message": words, "type": check["verdict"]}).text = words
        elif check["verdict"] == "unclear":
            ET.SubElement(case, "skipped", {"message": words})
        else:
            ET.SubElement(case, "system-out").text = words
    ET.indent(suites)
    return ET.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


# ---- Figures


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _interval(bounds: Mapping[str, Any]) -> str:
    return "-" if bounds["lo"] is None else f"{bounds['lo']:.3f} to {bounds['hi']:.3f}"


def _signed_interval(bounds: Mapping[str, Any]) -> str:
    return "-" if bounds["lo"] is None else f"{bounds['lo']:+.3f} to {bounds['hi']:+.3f}"


def _cut(words: str, most: int = NAME) -> str:
    words = _one_line(words)
    return words if len(words) <= most else f"{words[: most - 3]}..."


def _one_line(words: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in words)
