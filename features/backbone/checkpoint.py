"""Where a backbone's weights lie, what they are, and their fingerprint; never a pickle.

Knows names, tags, paths and weight formats. Importing open_clip costs seconds, so what is local is resolved
without it. Must not know images or prompts.
"""

from __future__ import annotations

import contextlib
import json
import socket
import urllib.request
import warnings
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from deltaclip.base.errors import UserError, did_you_mean, nearest
from deltaclip.base.files import sha256_file, user_cache, whole_file

if TYPE_CHECKING:
    import torch

TINY = Path(__file__).parent / "tiny"
LOCAL_DIR, HF_HUB = "local-dir:", "hf-hub:"
CONFIG_NAME = "open_clip_config.json"
HUB_TIMEOUT_S = 1.5


@dataclass(frozen=True, kw_only=True)
class WeightsSource:
    """A backbone as open_clip is to be asked for it.

    `name` is how a user names it on any machine; `model` and `pretrained` are open_clip's arguments; `weights` the
    file they stand for; `config` the configuration of a `local-dir:` or `hf-hub:` model, None for a built-in one.
    """

    name: str
    model: str
    pretrained: str | None
    weights: Path
    config: Path | None

    @property
    def is_bare_file(self) -> bool:
        """Whether the weights are a file for a built-in model, that says nothing of its preprocessing."""
        return self.config is None and self.pretrained == str(self.weights)

    def identity(self) -> dict[str, str | None]:
        """Return what tells these weights from others: contents, never paths."""
        return {
            "model": None if self.config else self.model,
            "weights_sha256": fingerprint(self.weights),
            "config_sha256": sha256_file(self.config) if self.config else None,
            # A tag brings its own preprocessing and a bare file takes the defaults, for the same weights.
            "tag": None if self.config or self.is_bare_file else self.pretrained,
        }


def find_weights(backbone: str, pretrained: str | None) -> WeightsSource:
    """Resolve what the user named.

    Args:
        backbone: `tiny`, a model name of open_clip, `local-dir:PATH` or `hf-hub:ORG/NAME`.
        pretrained: for a model name: a tag of open_clip or a checkpoint file.

    Raises:
        UserError: unknown name or tag (with the nearest), missing file, no weights named, no network.
    """
    if backbone == "tiny":
        if pretrained:
            remedy = "leave --pretrained out: tiny is bundled with its weights"
            raise UserError(f"{pretrained!r} would be ignored", place="--pretrained", remedy=remedy)
        return replace(_in_folder(f"{LOCAL_DIR}{TINY}"), name=backbone)
    if backbone.startswith((LOCAL_DIR, HF_HUB)):
        if pretrained:
            remedy = f"leave --pretrained out: {backbone.partition(':')[0]}: names the weights already"
            raise UserError(f"{pretrained!r} would be ignored", place="--pretrained", remedy=remedy)
        return _in_folder(backbone) if backbone.startswith(LOCAL_DIR) else _on_hub(backbone)
    if pretrained and Path(pretrained).is_file():
        _check_model_name(backbone)
        path = Path(pretrained).resolve()
        return WeightsSource(name=backbone, model=backbone, pretrained=str(path), weights=path, config=None)
    return _by_tag(backbone, pretrained)


def _in_folder(backbone: str) -> WeightsSource:
    folder = Path(backbone.removeprefix(LOCAL_DIR))
    config = folder / CONFIG_NAME
    if not folder.is_dir():
        raise UserError("no such folder", place=folder, remedy=f"give {LOCAL_DIR}PATH of a folder with {CONFIG_NAME}")
    if not config.is_file():
        raise UserError(f"has no {CONFIG_NAME}", place=folder, remedy="write one with model_cfg and preprocess_cfg")
    try:
        has_model = "model_cfg" in json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"broken JSON ({error})", place=config, remedy="correct it") from error
    if not has_model:
        raise UserError("has no 'model_cfg'", place=config, remedy="see open_clip's local-dir: layout")
    weights = _weights_in(folder)
    if weights is None:
        raise UserError("has no weights", place=folder, remedy="put open_clip_model.safetensors into it")
    model = f"{LOCAL_DIR}{folder.resolve()}"
    return WeightsSource(name=model, model=model, pretrained=None, weights=weights, config=config)


def _weights_in(folder: Path) -> Path | None:
    # The order of open_clip's own search (factory._find_checkpoint_in_dir), so that we fingerprint what it loads.
    preferred = ["open_clip_model.safetensors"]
    preferred += [f"open_clip_pytorch_model{suffix}" for suffix in (".safetensors", ".bin", ".pth")]
    preferred += ["model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth"]
    for name in preferred:
        if (folder / name).is_file():
            return folder / name
    others = [path for suffix in (".safetensors", ".bin", ".pth") for path in sorted(folder.glob(f"*{suffix}"))]
    return others[0] if others else None


def _on_hub(backbone: str) -> WeightsSource:
    _stay_offline_without_hub()
    from open_clip.pretrained import download_pretrained_from_hf

    repo = backbone.removeprefix(HF_HUB)
    try:
        config = Path(download_pretrained_from_hf(repo, filename=CONFIG_NAME))
        weights = Path(download_pretrained_from_hf(repo))
    except (OSError, ValueError) as error:  # hub errors are OSErrors, a malformed name a ValueError
        files = f"{CONFIG_NAME} and open_clip_model.safetensors of {repo}"
        raise _not_fetched(backbone, files, "--backbone local-dir:FOLDER") from error
    return WeightsSource(name=backbone, model=backbone, pretrained=None, weights=weights, config=config)


def _by_tag(model: str, tag: str | None) -> WeightsSource:
    _check_model_name(model)
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model

    tags = list_pretrained_tags_by_model(model)
    if tag is None:
        known = f"a tag ({', '.join(tags)}) or a checkpoint file" if tags else "a checkpoint file"
        raise UserError(f"{model} without weights would be random", place="--pretrained", remedy=f"give {known}")
    config = get_pretrained_cfg(model, tag)
    if not config:
        close = nearest(tag, tags)
        hint = f"did you mean {close!r}?" if close else f"tags of {model}: {', '.join(tags) or 'none'}"
        raise UserError(f"{tag!r} is neither a file nor a tag of {model}", place="--pretrained", remedy=hint)
    _stay_offline_without_hub()
    try:
        weights = Path(download_pretrained(config))
    except (OSError, ValueError, RuntimeError) as error:
        files = config.get("hf_hub") or config.get("url")
        raise _not_fetched(f"{model} ({tag})", f"{files}", "--pretrained FILE") from error
    return WeightsSource(name=model, model=model, pretrained=tag, weights=weights, config=None)


def _stay_offline_without_hub() -> None:
    # Where nobody answers at the hub's address, its client would retry for 20 s a file and log each try; told to
    # stay offline it answers at once, from its cache where the file lies there. Behind a proxy only that can tell.
    import huggingface_hub.constants as hub

    hub_url = urlsplit(hub.ENDPOINT)
    if hub_url.scheme in urllib.request.getproxies():
        return
    port = hub_url.port or (443 if hub_url.scheme == "https" else 80)
    try:
        socket.create_connection((hub_url.hostname or "", port), timeout=HUB_TIMEOUT_S).close()
    except OSError:
        hub.HF_HUB_OFFLINE = True


def _not_fetched(what: str, files: str, option: str) -> UserError:
    remedy = f"fetch {files} on a machine with a network and pass {option}"
    return UserError("the weights are not on this machine and could not be downloaded", place=what, remedy=remedy)


def _check_model_name(model: str) -> None:
    # The configuration files are read from the package's folder: open_clip itself takes seconds to import.
    import importlib.util

    spec = importlib.util.find_spec("open_clip")
    assert spec is not None, "open_clip is a dependency"
    assert spec.origin is not None, "open_clip is an ordinary package"
    names = [path.stem for path in (Path(spec.origin).parent / "model_configs").glob("*.json")]
    if model.replace("/", "-") not in names:
        known = [*names, "tiny"]
        hint = did_you_mean(model, known) if nearest(model, known) else "see open_clip.list_models()"
        raise UserError(f"unknown model {model!r}", place="--backbone", remedy=hint)


def fingerprint(weights: Path) -> str:
    """Return the SHA-256 of a weights file, remembered by path, size and times so that 5 GB are hashed once."""
    stat = weights.stat()
    key = f"{weights.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}|{stat.st_ino}"
    memo_path = user_cache() / "fingerprints.json"
    try:
        memo = json.loads(memo_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent, or another version's: hash again
        memo = {}
    if key not in memo:
        memo[key] = sha256_file(weights)
        # Where the user's cache folder cannot be written to, every run hashes anew.
        with contextlib.suppress(OSError), whole_file(memo_path) as temporary:
            temporary.write_text(json.dumps(memo, indent=1), encoding="utf-8")
    return str(memo[key])


def is_torchscript(weights: Path) -> bool:
    """Tell OpenAI's published format, a TorchScript archive, from an ordinary `torch.save` file."""
    if weights.suffix == ".safetensors" or not zipfile.is_zipfile(weights):
        return False
    with zipfile.ZipFile(weights) as archive:
        return any(name.endswith("constants.pkl") for name in archive.namelist())


def read_torchscript(weights: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of an OpenAI archive; open_clip 3.3's loader refuses it under `weights_only=True`.

    Returns:
        state dict, float16 or float32, without the three numbers that are no weights.
    """
    import torch

    with warnings.catch_warnings():
        # Torch announces the end of TorchScript; the published archives are what they are.
        warnings.filterwarnings("ignore", message=".*torch.jit.load", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*torch.jit.load", category=DeprecationWarning)
        state: dict[str, Any] = dict(torch.jit.load(str(weights), map_location="cpu").state_dict())
    for key in ("input_resolution", "context_length", "vocab_size"):
        state.pop(key, None)
    return state
