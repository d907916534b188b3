"""The model card of a shared folder, in the Hub's format: what it predicts, how well, for what, and what it tells.

Knows what `share` keeps of a run. Every figure stands beside its floor and with its interval.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from deltaclip.pipeline.words.result_words import KIND_WORDS, verdict_lines

if TYPE_CHECKING:
    from collections.abc import Mapping

EXAMPLE = '''"""Score a picture for its prompt: python example.py [PICTURE PROMPT [BACKBONE]]; needs deltaclip."""

import sys
from pathlib import Path

import numpy as np
from deltaclip import Scorer

picture, prompt, backbone = (*sys.argv[1:], *[None] * 3)[:3]
if picture is None:  # something to look at: a slope from black to red
    picture = np.zeros((128, 128, 3), dtype=np.uint8)
    picture[..., 0] = np.arange(128) * 2

scorer = Scorer.load(Path(__file__).parent, backbone=backbone)
found = scorer.score(picture, prompt or "a red slope")
for target in scorer.labels:
    print(target, f"{found.scores.of(target)[0]:.3f}")
'''
SEES = {"image": "of the picture alone", "pair": "of picture and prompt"}
NOT_NAMED = "not named"


class Held(NamedTuple):
    """What a folder tells of single rows of the training: how many have a vector in it, and of what kind."""

    kernel_rows: int
    likeness_rows: int
    prompts: bool
    sources: bool
    tuned: bool

    def sentences(self) -> list[str]:
        """Say it, one line each; what is not held is said too."""
        lines = []
        if self.kernel_rows:
            lines += [
                f"kernels hold the vectors of {self.kernel_rows:,} training rows and a weight of each: where these are "
                "all rows, their ratings can be computed back from the two by who tries the few strengths of a ridge",
                "train with `--base calibrated` to give away no vector of a row in the heads",
            ]
        if self.likeness_rows:
            lines.append(
                f"likeness holds projections of the vectors of {self.likeness_rows:,} training rows: who has a picture "
                "can test whether it, or one much like it, was among them"
            )
        if self.prompts:
            lines.append("that holds for prompts too: no text can be read, but a guess of one can be tested")
        if self.sources:
            lines.append("generators are known by hashes of their names: a guess can be tested")
        if self.tuned:
            lines.append("weights that were tuned may remember pictures and prompts, as those of any network")
        return lines or ["nothing is held of single rows but what weights that learned from them may remember"]


def model_card(
    name: str,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    *,
    held: Held,
    license_name: str | None,
    data: str | None,
) -> str:
    """Return the card as Markdown with YAML in front.

    Args:
        name: of the model.
        config: as `share` writes it.
        metrics: as `share` writes them.
        held: of single rows.
        license_name: as the Hub spells it; None says that none was given.
        data: what the training data is called; None leaves it without a name.
    """
    rows, labels = metrics["split"]["rows"], list(config["labels"])
    seen = {target["name"]: SEES[target["sees"]] for target in config["targets"]}
    backbone = config["backbone"]
    what = f"`{backbone['backbone']}`" + (f" (`{backbone['pretrained']}`)" if backbone["pretrained"] else "")
    ranges = config["cache"]["dataset"]["label_ranges"]
    leak = " **It leaks**: prompts or pictures stand on two sides, so figures flatter." if _leaks(metrics) else ""
    sections = [
        f"# {name}",
        "Scores AI-generated images, 0 to 1, as people would rate them: "
        + "; ".join(f"**{label}** {seen[label]}" for label in labels)
        + f". Heads of deltaclip on the embeddings of {what}"
        + (", part of which was tuned." if held.tuned else ", which is frozen."),
        "## Use",
        '    pip install deltaclip\n    python example.py picture.png "a red fox in snow"\n'
        '    deltaclip predict THIS_FOLDER picture.png --prompt "a red fox in snow"',
        _needs(config),
        "## Trained on",
        f"Rated pictures{f': {data}' if data else ', of a data set that was not named'}. "
        f"{_count(rows['train'])} rows to learn from, "
        f"{_count(rows['val'])} to choose by, {_count(rows['test'])} to test on. Split: "
        f"{KIND_WORDS[metrics['split']['kind']]}, seed {', '.join(map(str, metrics['split']['seeds']))}.{leak}"
        + "".join(f" Ratings of {label}: {words}." for label, words in ranges.items()),
        "## How well",
        _table(metrics, labels),
        "On test rows that no choice looked at. *No image* is the best of what can be said without any pixel (means of "
        "prompt or generator, their words); *cosine* is that of the two embeddings.",
        "\n".join(f"    {line}".rstrip() for line in verdict_lines(dict(metrics))[1:]),
        "## One score",
        _coverage(metrics, labels),
        "## Limits",
        "* It ranks pictures like those of its training. Rows that are unlike them are flagged; their scores and "
        "intervals are a guess.\n* It says what raters of that data would say, with their taste and their blind spots: "
        "it is no measure of truth, of safety or of worth, and not fit to judge people.\n* Ten generators compare "
        "better by means over many prompts (`deltaclip rank`) than by single scores.",
        "## What this folder tells of the training data",
        "No prompts, ratings, names of files or generators, or paths are written in it. But:",
        "\n".join(f"* {line}" for line in held.sentences()),
        "## Licence",
        f"`{license_name}`." if license_name else "None was given: ask whoever shared it.",
    ]
    return "\n".join(["---", *_front(name, metrics, labels, license_name=license_name, data=data), "---", ""]) + (
        "\n\n".join(section for section in sections if section) + "\n"
    )


def _needs(config: Mapping[str, Any]) -> str:
    """Say which backbones are needed, by fingerprint."""
    lines = ["The backbone is known by its weights, and refused where they are others:", ""]
    for each in [config["backbone"], *(one["backbone"] for one in config["beside"])]:
        bundled = "comes with deltaclip" if each["backbone"] == "tiny" else f"SHA-256 `{each['weights_sha256']}`"
        tag = f" `{each['pretrained']}`" if each["pretrained"] else ""
        lines.append(f"* `{each['backbone']}`{tag}, {each['precision']}, width {each['dim']}: {bundled}")
    return "\n".join(lines)


def _front(
    name: str, metrics: Mapping[str, Any], labels: list[str], *, license_name: str | None, data: str | None
) -> list[str]:
    """Return the lines of YAML; texts are quoted as JSON, which is YAML."""
    lines = [f"license: {license_name}"] if license_name else []
    lines += ["library_name: deltaclip", "tags:"]
    tags = ("deltaclip", "image-quality-assessment", "text-to-image-evaluation", "clip")
    lines += [f"- {tag}" for tag in tags]
    lines += ["metrics:", "- spearmanr", "- pearsonr", "model-index:", f"- name: {json.dumps(name)}", "  results:"]
    for label in labels:
        figures = metrics["test"].get(label)
        if not figures or _mean(figures["srocc"]) is None:
            continue
        lines += [
            "  - task:",
            "      type: image-quality-assessment",
            f"      name: {json.dumps(label)}",
            "    dataset:",
            "      type: image-ratings",
            f"      name: {json.dumps(data or NOT_NAMED)}",
            "      split: test",
            "    metrics:",
        ]
        for kind, figure, words in (("spearmanr", "srocc", "SROCC"), ("pearsonr", "plcc", "PLCC")):
            lines += [f"    - type: {kind}", f"      value: {_mean(figures[figure]):.4f}", f"      name: {words}"]
    return lines


def _table(metrics: Mapping[str, Any], labels: list[str]) -> str:
    """Return the figures as a table, every score with its floors below it."""
    lines = ["| target | | SROCC | 95 % | PLCC | RMSE |", "| --- | --- | --- | --- | --- | --- |"]
    floors = metrics["floors"]
    for label in labels:
        kinds = [(f"**{label}**", "this model", metrics["test"])]
        kinds += [("", words, floors[kind]) for kind, words in (("no_image", "no image"), ("cosine", "cosine"))]
        for first, words, found in kinds:
            if not (figures := found.get(label)):
                continue
            cells = [_shown(figures.get(name)) for name in ("srocc", "plcc", "rmse")]
            ends = figures.get("srocc_ci")
            within = " to ".join(map(_shown, ends)) if isinstance(ends, list) else ""
            lines.append(f"| {first} | {words} | {cells[0]} | {within} | {cells[1]} | {cells[2]} |")
    return "\n".join(lines)


def _coverage(metrics: Mapping[str, Any], labels: list[str]) -> str:
    found = metrics.get("intervals", {})
    lines = [
        f"* {label}: intervals asked to hold {_shown(found[label]['asked'])} of the ratings held "
        f"{_shown(found[label]['coverage'])} of those of the test rows, at a mean width of "
        f"{_shown(found[label]['width'])}"
        for label in labels
        if found.get(label)
    ]
    return "\n".join(lines) or "It has no intervals."


def _leaks(metrics: Mapping[str, Any]) -> bool:
    return bool(metrics["split"]["leaks_groups"])


def _mean(value: Any) -> float | None:
    """Return a figure; of repeats their mean."""
    found = value["mean"] if isinstance(value, dict) else value
    return None if found is None else float(found)


def _shown(value: Any) -> str:
    found = _mean(value)
    if found is None:
        return "-"
    spread = value["sd"] if isinstance(value, dict) else None
    return f"{found:.3f}" + (f" ± {spread:.3f}" if spread is not None else "")


def _count(value: Any) -> str:
    return f"{_mean(value) or 0:,.0f}"
