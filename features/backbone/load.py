"""Load a backbone: model, preprocessing, tokenizer and the facts that change an embedding.

Knows open_clip. Must not know caches, manifests or heads.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import pickle
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deltaclip.base.errors import UserError
from deltaclip.features.backbone.checkpoint import (
    WeightsSource,
    fingerprint,
    is_torchscript,
    read_torchscript,
)
from deltaclip.features.backbone.published import (
    check_preprocessing,
    check_quick_gelu,
    published_tags,
    quick_gelu_note,
    uses_quick_gelu,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from deltaclip.base.device import Precision
    from deltaclip.features.data.decoding import Decode

# How open_clip says that weights do not fit: load_state_dict's RuntimeError, its own assertions on sizes, and what
# falls out of its code on a file that holds no state dict.
MISFITS = (RuntimeError, KeyError, AssertionError, AttributeError, TypeError, ValueError, StopIteration)
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
            of an architecture whose weights all need another preprocessing than such a file gets.
    """
    import open_clip
    import safetensors
    import torch

    archive = is_torchscript(source.weights)
    tags = published_tags(source) if source.is_bare_file and not archive else {}
    check_preprocessing(source, tags)
    force = quick_gelu is True or (archive and quick_gelu is None)
    with _without_word_of_random_weights(archive), warnings.catch_warnings():
        # Answered below with an error or by `facts`, not with a warning that scrolls away.
        warnings.filterwarnings("ignore", message="QuickGELU mismatch")
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(
                source.model,
                pretrained=None if archive else source.pretrained,
                precision=OPEN_CLIP_PRECISION[precision],
                device=device,
                force_quick_gelu=force,
            )
            if archive:
                model.load_state_dict(read_torchscript(source.weights))
        except safetensors.SafetensorError as error:
            raise UserError(
                f"is no safetensors file ({error})", place=source.weights, remedy="fetch it again"
            ) from error
        except EOFError as error:
            raise UserError("is empty or cut off", place=source.weights, remedy="fetch it again") from error
        except pickle.UnpicklingError as error:
            remedy = "convert it to safetensors where it comes from: a pickle can run code"
            raise UserError("holds more than tensors", place=source.weights, remedy=remedy) from error
        except MISFITS as error:
            raise _misfit(source, error) from error
    if _is_convolutional(model.visual):
        # MobileNetV2 on a CPU: about twice the rate, forward alone and with the backward pass.
        model.visual.to(memory_format=torch.channels_last)
    active = uses_quick_gelu(model)
    check_quick_gelu(source, active=active, asked=quick_gelu)
    tokenizer = open_clip.get_tokenizer(source.model)
    facts = _facts(source, model, precision, quick_gelu=active)
    if quick_gelu is None and (note := quick_gelu_note(tags)):
        facts["quick_gelu_note"] = note
    return Backbone(
        model=model.eval(),
        preprocess=preprocess,
        tokenizer=tokenizer,
        device=device,
        precision=precision,
        facts=facts,
        decode=decode,
    )


def replicate(backbone: Backbone, device: str) -> Backbone:
    """Return the same model on another device, or once more on its own."""
    return dataclasses.replace(backbone, model=copy.deepcopy(backbone.model).to(device), device=device)


@contextlib.contextmanager
def _without_word_of_random_weights(archive: bool) -> Iterator[None]:  # noqa: FBT001 - one private caller
    # An archive's weights follow after open_clip has made the model, of which it warns.
    before = logging.root.manager.disable
    if archive:
        logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _misfit(source: WeightsSource, error: Exception) -> UserError:
    text = str(error)
    if "vision_model." in text or "text_model." in text:
        remedy = "pass the same model's open_clip weights (local-dir: or hf-hub: with open_clip_config.json)"
        return UserError(
            "is in the layout of transformers, which open_clip does not read",
            place=source.weights,
            remedy=remedy,
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    detail = lines[1] if len(lines) > 1 else lines[0] if lines else "no state dict"
    remedy = "check --backbone: the architecture must be the one the weights were saved from"
    return UserError(f"does not fit {source.model} ({detail[:160]})", place=source.weights, remedy=remedy)


def _facts(source: WeightsSource, model: Any, precision: Precision, *, quick_gelu: bool) -> dict[str, Any]:
    from open_clip.transform import PreprocessCfg

    preprocessing = dict(PreprocessCfg().__dict__) | model.visual.preprocess_cfg
    text = getattr(model, "text", model)
    return {
        "backbone": source.name,
        "pretrained": source.pretrained,
        "weights_sha256": fingerprint(source.weights),
        "config_sha256": source.identity()["config_sha256"],
        "quick_gelu": quick_gelu,
        "preprocessing": {k: list(v) if isinstance(v, tuple) else v for k, v in preprocessing.items()},
        "precision": precision,
        "normalised": True,
        "dim": _embedding_dim(model),
        "context_length": int(text.context_length),
    }


def preprocessing_words(cfg: dict[str, Any]) -> str:
    """Return the preprocessing that `facts` names, in one line."""
    mean, std = (" ".join(f"{value:.4g}" for value in cfg[name]) for name in ("mean", "std"))
    sides = cfg["size"] if isinstance(cfg["size"], list) else [cfg["size"]] * 2
    size = " x ".join(str(side) for side in sides)
    return f"{size} pixels, {cfg['resize_mode']}, {cfg['interpolation']}, mean {mean}, std {std}"


def _embedding_dim(model: Any) -> int:
    import torch

    text = getattr(model, "text", model)
    parameter = next(model.parameters())
    tokens = torch.zeros(1, int(text.context_length), dtype=torch.long, device=parameter.device)
    with torch.inference_mode():
        return int(model.encode_text(tokens).shape[-1])


def _is_convolutional(tower: Any) -> bool:
    # A transformer has one convolution, which cuts the patches.
    import torch

    return sum(isinstance(module, torch.nn.Conv2d) for module in tower.modules()) > 1
