"""A backbone loaded and saved: model, preprocessing, tokenizer and the facts that change an embedding.

Saved is a whole model in a folder, as open_clip loads it by name and path or as `local-dir:`. Knows open_clip. Must not
know caches, manifests or heads.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from deltaclip.base.device import arithmetic
from deltaclip.base.errors import UserError
from deltaclip.base.transfers import overlaps
from deltaclip.features.backbone.configuration import (
    activation_note,
    check_activation,
    check_fields,
    check_preprocess,
    check_sizes,
    model_config,
    of_hub,
    size_note,
)
from deltaclip.features.backbone.first_run import load_tokenizer, require_transformers, run_image, run_once, tokens_note
from deltaclip.features.backbone.fitting import moving_positions, put_weights, text_positions
from deltaclip.features.backbone.library import library_call, read_json
from deltaclip.features.backbone.pixels import transform_of
from deltaclip.features.backbone.tensors import StoredTensors, read_tensors
from deltaclip.features.backbone.transformers_layout import (
    ForeignModel,
    open_clip_folder,
    read_foreign,
    save_foreign,
    to_open_clip,
)
from deltaclip.features.backbone.weights import (
    CONFIG_NAME,
    HF_HUB,
    LOCAL_DIR,
    check_preprocessing,
    check_quick_gelu,
    find_weights,
    published_tags,
    quick_gelu_note,
    uses_quick_gelu,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch

    from deltaclip.base.device import Precision
    from deltaclip.features.backbone.weights import WeightsSource
    from deltaclip.features.data.decoding import Decode


# ---- Load a backbone: model, preprocessing, tokenizer and the facts that change an embedding


# Facts of two backbones that must be equal where their embeddings are to lie in one cache.
SAME = ("dim", "context_length", "quick_gelu", "preprocessing")
BIG_VISION = ".npz"  # arrays of the program that trained SigLIP
# open_clip's names for "every tensor in this format". Its own bf16 mode keeps norms in fp32 and leaves torch's
# fused attention path, and a plain .bfloat16() breaks its LayerNormFp32.
OPEN_CLIP_PRECISION = {"fp32": "fp32", "bf16": "pure_bf16", "fp16": "pure_fp16"}


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """A loaded model, ready to encode.

    `preprocess` maps a PIL image to float32 (3, H, W); `facts` says all that changes an embedding, as JSON values;
    `decode` is how files become pixels.
    """

    model: torch.nn.Module
    preprocess: Callable[[Any], torch.Tensor]
    tokenizer: Callable[..., torch.Tensor]
    device: str
    precision: Precision
    facts: dict[str, Any]
    decode: Decode = "exact"
    _packed: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def encoder(self) -> Any:
        """The model as embeddings are computed with it, without gradients, of its weights as they are now.

        On a CPU in bfloat16 a twin with packed weights, made when it is first asked for and when weights have changed
        (an assignment to `.data` is not seen); otherwise the model itself.
        """
        if not (self.device.startswith("cpu") and self.precision == "bf16"):
            return self.model
        from deltaclip.features.backbone.packed import packed_twin

        weights = [(parameter.data_ptr(), parameter._version) for parameter in self.model.parameters()]
        if self._packed.get("weights") != weights:
            self._packed.update(weights=weights, encoder=packed_twin(self.model))
        return self._packed["encoder"]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what can be made again, and can be neither copied nor pickled."""
        return self.__dict__ | {"_packed": {}}

    @property
    def has_text(self) -> bool:
        """Whether there is a text tower: without one, text embeddings are 0 and only scores of the image can be had."""
        return bool(self.facts.get("text_tower", True))

    @property
    def dim(self) -> int:
        """Width D of both embeddings."""
        return int(self.facts["dim"])

    @property
    def context_length(self) -> int:
        """Tokens that a prompt may have, begin and end marks included."""
        return int(self.facts["context_length"])


def request_facts(
    source: WeightsSource, precision: Precision, *, quick_gelu: bool | None, decode: Decode = "exact"
) -> dict[str, Any]:
    """Return what decides an embedding and is known without loading the model: equal requests, equal embeddings.

    Caches from before there was another way to decode say nothing of it; so do those that were decoded exactly.
    """
    found = {**source.identity(), "precision": precision, "quick_gelu_asked": quick_gelu}
    return found if decode == "exact" else found | {"decode": decode}


def load_backbone(
    source: WeightsSource,
    *,
    device: str,
    precision: Precision,
    quick_gelu: bool | None = None,
    decode: Decode = "exact",
) -> Backbone:
    """Load a model through open_clip, in evaluation mode.

    Args:
        source: resolved by `find_weights`.
        device: a torch device.
        precision: format of all weights and activations.
        quick_gelu: force the activation on or refuse it; None takes the model's own, and OpenAI's archive as trained.
        decode: how image files become pixels.

    Raises:
        UserError: the weights do not fit the model, are a pickle, need the other activation, or are a bare file
            of an architecture whose weights all need another preprocessing than such a file gets; a library cannot
            make or run the model; the tokenizer is not there or is another model's.
    """
    import torch

    if source.layout == "timm":
        return _load_image_tower(source, _Asked(device, precision, quick_gelu), decode)
    foreign = read_foreign(source.config) if source.config and source.layout == "transformers" else None
    with _unheard():
        tags = published_tags(source) if source.is_bare_file else {}
        if foreign:
            cfg, assumed = foreign.model_cfg, list(foreign.notes)
            check_activation(cfg, source, asked=quick_gelu)
        else:
            cfg, assumed = model_config(source), check_preprocess(source)
            check_fields(cfg, source)
        weights = read_tensors(source.files) if source.weights.suffix != BIG_VISION else None
        if weights is None or not weights.is_openai:
            check_preprocessing(source, tags)
        require_transformers(source, cfg)
        if weights is not None:
            check_sizes(cfg, weights, source)
        asked = _Asked(device, precision, quick_gelu)
        made = _make(source, cfg, weights, asked) if foreign is None else _make_foreign(source, foreign, weights, asked)
        tokenizer = load_tokenizer(source, cfg, made.model)
        context_length, dim = run_once(made.model, tokenizer, source)
    active = uses_quick_gelu(made.model)
    check_quick_gelu(source, active=active, asked=quick_gelu)
    if weights is not None and weights.is_openai:
        tags = {}  # OpenAI's own archive: nothing is open
    open_choice = quick_gelu_note(tags) if quick_gelu is None else None
    notes = [*source.notes, *(weights.notes if weights else ()), *made.notes, *assumed]
    notes += [open_choice] if open_choice else []
    notes += tokens_note(made.model, tokenizer)
    notes += activation_note(cfg, source, quick_gelu=active, asked=quick_gelu)
    notes += size_note(source, cfg, made.model.visual.preprocess_cfg["size"])
    if _is_convolutional(made.model.visual):
        # MobileNetV2 on a CPU: about twice the rate, forward alone and with the backward pass.
        made.model.visual.to(memory_format=torch.channels_last)
    facts = {
        "backbone": source.name,
        "pretrained": source.pretrained,
        "weights_sha256": source.sha256,
        "config_sha256": source.identity()["config_sha256"],
        "quick_gelu": active,
        "preprocessing": _preprocessing(made.model),
        "precision": precision,
        "normalised": True,
        "dim": dim,
        "context_length": context_length,
        "notes": notes,
    }
    if computes := arithmetic(device):
        facts["arithmetic"] = computes
    return Backbone(
        model=made.model,
        preprocess=made.preprocess,
        tokenizer=tokenizer,
        device=device,
        precision=precision,
        facts=facts,
        decode=decode,
    )


def _load_image_tower(source: WeightsSource, asked: _Asked, decode: Decode) -> Backbone:
    """Load a tower of timm's, without a text tower."""
    import torch

    from deltaclip.features.backbone.image_only import NoTokens, image_preprocessing, make_image_model

    if asked.quick_gelu is not None:
        raise UserError("is of open_clip's models", place="--quick-gelu", remedy="leave the option out")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[asked.precision]
    with _unheard():
        weights = read_tensors(source.files)
        model, notes = make_image_model(source, weights, device=asked.device, dtype=dtype)
        with library_call(source.config or source.name, "its preprocessing cannot be made", "correct pretrained_cfg"):
            preprocessing, preprocess, words = image_preprocessing(model.visual.trunk, source)
        model.visual.preprocess_cfg = preprocessing
        dim = run_image(model, source)
    if _is_convolutional(model.visual):
        model.visual.to(memory_format=torch.channels_last)
    facts = {
        "backbone": source.name,
        "pretrained": source.pretrained,
        "weights_sha256": source.sha256,
        "config_sha256": source.identity()["config_sha256"],
        "quick_gelu": False,
        "text_tower": False,
        "preprocessing": _preprocessing(model),
        "precision": asked.precision,
        "normalised": True,
        "dim": dim,
        "context_length": NoTokens.context_length,
        "notes": [*source.notes, *weights.notes, *notes, words],
    }
    return Backbone(
        model=model,
        preprocess=preprocess,
        tokenizer=NoTokens(),
        device=asked.device,
        precision=asked.precision,
        facts=facts,
        decode=decode,
    )


@dataclass(frozen=True)
class _Made:
    model: Any
    preprocess: Callable[[Any], torch.Tensor]
    notes: list[str]


class _Asked(NamedTuple):
    device: str
    precision: Precision
    quick_gelu: bool | None


def _created(
    source: WeightsSource, name: str, asked: _Asked, *, quick_gelu: bool, positions: int | None
) -> tuple[Any, Callable[[Any], torch.Tensor]]:
    """Return the model that open_clip makes of a name, with any weights, and its preprocessing."""
    import open_clip

    remedy = "correct its configuration"
    if source.config is not None and source.layout == "open_clip" and (parts := of_hub(source)):
        remedy = f"{remedy}, or fetch {parts[0]} that it names on a machine with a network: hf download {parts[0]}"
    with library_call(source.config or "--backbone", f"{source.name} cannot be made", remedy):
        model, _, preprocess = open_clip.create_model_and_transforms(
            name,
            pretrained=None if source.is_bare_file else source.pretrained,
            load_weights=False,  # ours, later: open_clip resizes and renames without a word
            pretrained_text=False,
            precision=OPEN_CLIP_PRECISION[asked.precision],
            device=asked.device,
            force_quick_gelu=quick_gelu,
            force_context_length=positions,
        )
    return model, preprocess


def _make_foreign(source: WeightsSource, foreign: ForeignModel, weights: StoredTensors | None, asked: _Asked) -> _Made:
    """Make the model of a transformers folder, of open_clip's modules."""
    import torch

    assert weights is not None, "a transformers folder has no arrays of big_vision"
    with open_clip_folder(foreign) as name:
        model, _ = _created(source, name, asked, quick_gelu=False, positions=None)
    for module in model.visual.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = foreign.eps
    fits = f"does not fit {source.config}"
    with library_call(source.weights, fits, "give the weights that were saved with config.json"):
        tensors, notes = to_open_clip(weights, foreign, model.state_dict(), source)
        notes += put_weights(model, tensors, source, resample=False)
    model.visual.preprocess_cfg = foreign.preprocessing
    return _Made(model.eval(), transform_of(foreign.preprocessing), notes)


def _make(source: WeightsSource, cfg: dict[str, Any], weights: StoredTensors | None, asked: _Asked) -> _Made:
    """Make the model as its configuration says and put the weights into it."""
    is_openai = weights is not None and weights.is_openai
    positions, notes = _text_positions(cfg, weights)
    is_quick = asked.quick_gelu is True or (is_openai and asked.quick_gelu is None)
    model, preprocess = _created(source, source.model, asked, quick_gelu=is_quick, positions=positions)
    with library_call(source.weights, f"does not fit {source.model}", "give weights of this architecture"):
        if weights is None:
            from open_clip.convert import load_big_vision_weights

            load_big_vision_weights(model, str(source.weights))
            notes.append("converted from big_vision's arrays")
        else:
            is_size_set = source.config is not None and "image_size" in cfg["vision_cfg"]
            notes += put_weights(model, weights, source, resample=is_size_set)
            notes += moving_positions(model, source, resample=is_size_set or source.config is None)
    return _Made(model.eval(), preprocess, notes)


def _text_positions(cfg: dict[str, Any], weights: StoredTensors | None) -> tuple[int | None, list[str]]:
    """Return for how many tokens the weights were trained, and words, where the configuration has another number."""
    text = cfg["text_cfg"]
    there = text_positions(weights) if weights is not None and not text.get("hf_model_name") else None
    if there is None:
        return None, []
    there -= bool(text.get("embed_cls"))  # a place of its own
    here = text.get("context_length", 77)
    if there == here:
        return None, []
    return there, [f"text positions: {there} as trained, not the {here} of the configuration"]


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    # What open_clip warns of is answered with an error or by `facts`: of weights that follow, of an activation.
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")
            yield
    finally:
        logging.disable(before)


def loading_notes(facts: dict[str, Any]) -> list[str]:
    """Return what was assumed, chosen or mended when a backbone was loaded, one phrase each."""
    older = [facts["quick_gelu_note"]] if "quick_gelu_note" in facts else []
    return [*facts.get("notes", []), *older]


def check_same(there: dict[str, Any], backbone: Backbone, *, place: Path | str, remedy: str) -> None:
    """Refuse a backbone that is loaded otherwise than when the facts `there` were written, by an earlier version.

    Raises:
        UserError: names the first difference.
    """
    for name in SAME:
        if name in there and there[name] != backbone.facts.get(name, there[name]):
            now = backbone.facts[name]
            message = f"was made with {name} {there[name]}, the same weights are now loaded with {now}"
            raise UserError(message, place=place, remedy=remedy)


def replicate(backbone: Backbone, device: str) -> Backbone:
    """Return the same model on another device, or once more on its own, whole when this returns."""
    import torch

    copied = copy.deepcopy(backbone.model).to(device)
    for each in filter(overlaps, (backbone.device, device)):
        torch.cuda.synchronize(each)  # lanes compute on streams of their own, which wait for no copy
    return dataclasses.replace(backbone, model=copied, device=device)


def _preprocessing(model: Any) -> dict[str, Any]:
    from open_clip.transform import PreprocessCfg

    cfg = dict(PreprocessCfg().__dict__) | model.visual.preprocess_cfg
    return {name: list(value) if isinstance(value, tuple) else value for name, value in cfg.items()}


def preprocessing_words(cfg: dict[str, Any]) -> str:
    """Return the preprocessing that `facts` names, in one line."""
    mean, std = (" ".join(f"{value:.4g}" for value in cfg[name]) for name in ("mean", "std"))
    sides = cfg["size"] if isinstance(cfg["size"], list) else [cfg["size"]] * 2
    size = " x ".join(str(side) for side in sides)
    before = f" (cut out of {cfg['resize_to']})" if "resize_to" in cfg else ""
    return f"{size} pixels{before}, {cfg['resize_mode']}, {cfg['interpolation']}, mean {mean}, std {std}"


def _is_convolutional(tower: Any) -> bool:
    # A transformer has one convolution, which cuts the patches.
    import torch

    return sum(isinstance(module, torch.nn.Conv2d) for module in tower.modules()) > 1


# ---- A whole model in a folder, as open_clip loads it by name and path or as `local-dir:`


WEIGHTS_NAME = "open_clip_model.safetensors"


def save_model(backbone: Backbone, folder: Path) -> None:
    """Write weights and configuration of a loaded model into a new folder.

    `open_clip.create_model("local-dir:FOLDER")` loads it with its activation and preprocessing, and for a built-in
    architecture `open_clip.create_model(NAME, pretrained="FOLDER/open_clip_model.safetensors")` too. A model that came
    as a transformers folder is written as one.
    """
    from safetensors.torch import save_file

    folder.mkdir()
    if (source := _folder_of(backbone)) is not None and source.layout == "transformers":
        save_foreign(backbone.model.state_dict(), source, folder)
        return
    # Clones: two names may share their memory, which safetensors refuses to write.
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in backbone.model.state_dict().items()}
    if not backbone.has_text:  # as timm's weights are saved, for `--backbone timm:NAME --pretrained FOLDER`
        prefix = "visual.trunk."
        save_file({name.removeprefix(prefix): tensor for name, tensor in state.items()}, folder / "model.safetensors")
        config: Any = getattr(backbone.model.visual, "config", None)
        if config is not None:
            (folder / "config.json").write_text(
                json.dumps(config | {"num_classes": 0}, indent=2) + "\n", encoding="utf-8"
            )
        return
    save_file(state, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(_configuration(backbone), indent=2) + "\n", encoding="utf-8")
    save_tokenizer = getattr(backbone.tokenizer, "save_pretrained", None)
    if save_tokenizer is not None:  # of transformers: looked for in the folder of the model
        save_tokenizer(str(folder))


def _folder_of(backbone: Backbone) -> WeightsSource | None:
    """Return the folder that a model came from, None for a built-in architecture."""
    name = str(backbone.facts["backbone"])
    return find_weights(name, None) if name == "tiny" or name.startswith((LOCAL_DIR, HF_HUB)) else None


def _configuration(backbone: Backbone) -> dict[str, Any]:
    """Return a configuration that leaves nothing open: with all that was chosen or mended when the model was loaded."""
    import open_clip

    name, facts = str(backbone.facts["backbone"]), backbone.facts
    content: Any = {}
    if (source := _folder_of(backbone)) is not None:
        assert source.config is not None, "a model of a folder has a configuration"
        content = read_json(source.config)
        model_cfg = content["model_cfg"]
    else:
        model_cfg = dict(open_clip.get_model_config(name.replace("/", "-")) or {})
    if facts["quick_gelu"] or model_cfg.get("quick_gelu"):
        model_cfg["quick_gelu"] = bool(facts["quick_gelu"])
    text: Any = getattr(backbone.model, "text", backbone.model)
    if hasattr(text, "positional_embedding") and text.context_length != model_cfg["text_cfg"].get("context_length", 77):
        model_cfg["text_cfg"]["context_length"] = int(text.context_length)
    return {**content, "model_cfg": model_cfg, "preprocess_cfg": facts["preprocessing"]}
