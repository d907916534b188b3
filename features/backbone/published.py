"""What open_clip knows of published weights, held against a file that is to be loaded: preprocessing and activation.

A wrong one of either gives embeddings that look right. Knows open_clip's tables. Must not know how a model is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError

if TYPE_CHECKING:
    from deltaclip.features.backbone.checkpoint import WeightsSource

PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


def published_tags(source: WeightsSource) -> dict[str, dict[str, Any]]:
    """Return what open_clip knows of the published weights of an architecture, by tag."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    model = source.model.replace("/", "-")
    return {tag: get_pretrained_cfg(model, tag) for tag in list_pretrained_tags_by_model(model)}


def check_preprocessing(source: WeightsSource, tags: dict[str, dict[str, Any]]) -> None:
    """Refuse a bare file of an architecture whose published weights, `tags`, all need what such a file does not get.

    Raises:
        UserError: names both.
    """
    # A tag brings its preprocessing, a bare file takes OpenAI's: SigLIP would be fed with another mean and a crop.
    from open_clip.transform import PreprocessCfg

    bare = PreprocessCfg().__dict__
    needed = [{key: tag[key] for key in PREPROCESSING if key in tag} for tag in tags.values()]
    if not needed or any(other != needed[0] for other in needed):
        return
    wrong = [key for key, value in needed[0].items() if value != bare[key]]
    if wrong:
        there, here = (", ".join(f"{key} {cfg[key]}" for key in wrong) for cfg in (needed[0], bare))
        raise UserError(
            f"all published weights of {source.model} need {there}; a bare file would get {here}",
            place=source.weights,
            remedy="put it beside an open_clip_config.json that says so and give --backbone local-dir:FOLDER",
        )


def quick_gelu_note(tags: dict[str, dict[str, Any]]) -> str | None:
    """Return what to tell where published weights of one architecture differ in their activation, else None."""
    quick = [tag for tag, config in tags.items() if config.get("quick_gelu")]
    plain = [tag for tag in tags if tag not in quick]
    if not quick or not plain:
        return None
    return (
        f"weights of this architecture exist with and without QuickGELU: {_some(quick)} with, {_some(plain)} without; "
        "give --quick-gelu or --no-quick-gelu"
    )


def _some(tags: list[str]) -> str:
    return ", ".join(tags[:2]) + (f" and {len(tags) - 2} more" if len(tags) > 2 else "")


def uses_quick_gelu(model: Any) -> bool:
    """Tell whether a model has open_clip's QuickGELU."""
    from open_clip.transformer import QuickGELU

    return any(isinstance(module, QuickGELU) for module in model.modules())


def check_quick_gelu(source: WeightsSource, *, active: bool, asked: bool | None) -> None:
    """Refuse an activation, `active` or not, that is not what was asked for, or what the weights were trained with.

    Raises:
        UserError: names the option or model name to give.
    """
    from open_clip.pretrained import get_pretrained_cfg

    if asked is not None:
        if asked != active:
            word = "has no" if asked else "is defined with"
            remedy = "leave the option out or give another model name"
            raise UserError(f"{source.model} {word} QuickGELU", place="--quick-gelu", remedy=remedy)
        return
    tag = get_pretrained_cfg(source.model, source.pretrained) if source.pretrained and not source.config else {}
    trained = bool(tag.get("quick_gelu", False)) if tag else None
    if trained is not None and trained != active:
        word = "with" if trained else "without"
        remedy = (
            f"give --backbone {source.model}-quickgelu"
            if trained
            else f"give --backbone {source.model.removesuffix('-quickgelu')}"
        )
        raise UserError(f"{source.pretrained} was trained {word} QuickGELU", place=source.model, remedy=remedy)
