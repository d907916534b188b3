"""Where a backbone's weights lie, their fingerprint, and what open_clip knows of published ones; never a pickle.

Importing open_clip costs seconds, so what is local is resolved without it. What is known of published weights is held
against a file that is to be loaded: another preprocessing or activation gives embeddings that look right. Knows names,
tags, paths and weight formats. Must not know images, prompts or how a model is loaded.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import re
import socket
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from deltaclip.base.errors import UserError, and_more, did_you_mean, nearest
from deltaclip.base.files import sha256_file, user_cache, whole_file
from deltaclip.features.backbone.hf_tokens import require_tokens
from deltaclip.features.backbone.library import first_line, read_json
from deltaclip.features.backbone.transformers_layout import BESIDE, OF_TOKENIZER, is_transformers_folder, read_foreign

# ---- Where a backbone's weights lie, what they are, and their fingerprint; never a pickle


TINY = Path(__file__).parent / "tiny"
LOCAL_DIR, HF_HUB, TIMM = "local-dir:", "hf-hub:", "timm:"
CONFIG_NAME = "open_clip_config.json"
HUB_TIMEOUT_S = 1.5
INDEX = ".index.json"
ENDINGS = (f".safetensors{INDEX}", f".bin{INDEX}", ".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".pth.tar", ".npz")
# What training programs put beside weights; their names are made by accelerate and transformers.
NO_WEIGHTS = ("optimizer.", "scheduler.", "scaler.", "rng_state", "random_states", "training_args.", "adapter_model.")
ADAPTER = "adapter_config.json"
SHARD = re.compile(r"-(\d{3,})-of-(\d{3,})(\.[a-z]+)$")


@dataclass(frozen=True, kw_only=True)
class WeightsSource:
    """A backbone as open_clip is to be asked for it.

    `name` is how a user names it on any machine; `model` and `pretrained` are open_clip's arguments; `weights` the
    file they stand for, of several shards their index or the first; `config` the configuration of a `local-dir:` or
    `hf-hub:` model, None for a built-in one; `notes` say what was chosen among several files; `layout` is whose files
    these are.
    """

    name: str
    model: str
    pretrained: str | None
    weights: Path
    config: Path | None
    shards: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    layout: Literal["open_clip", "transformers", "timm"] = "open_clip"

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        return self.shards or (self.weights,)

    @property
    def sha256(self) -> str:
        """The fingerprint of the weights: of the file, of shards that of all theirs."""
        if not self.shards:
            return fingerprint(self.weights)
        return hashlib.sha256("".join(fingerprint(shard) for shard in self.shards).encode()).hexdigest()

    @property
    def is_bare_file(self) -> bool:
        """Whether the weights are a file for a built-in model, that says nothing of its preprocessing."""
        return self.config is None and self.pretrained == str(self.weights)

    def identity(self) -> dict[str, str | None]:
        """Return what tells these weights from others: contents, never paths."""
        return {
            "model": None if self.config else self.model,
            "weights_sha256": self.sha256,
            "config_sha256": self._config_sha256(),
            # A tag brings its own preprocessing and a bare file takes the defaults, for the same weights.
            "tag": None if self.config or self.is_bare_file else self.pretrained,
        }

    def _config_sha256(self) -> str | None:
        """Return the fingerprint of the configuration, and of all else in its folder that decides."""
        if self.config is None:
            return None
        beside: tuple[str, ...] = BESIDE if self.layout == "transformers" else ()
        if self.layout == "open_clip" and self.model.startswith(LOCAL_DIR) and _names_tokenizer(self.config):
            beside = OF_TOKENIZER
        if not beside:
            return sha256_file(self.config)
        found = [path for name in beside if (path := self.config.parent / name).is_file()]
        parts = [f"{path.name} {sha256_file(path)}" for path in (self.config, *found)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _names_tokenizer(config: Path) -> bool:
    """Tell whether a model of open_clip has its tokenizer in its own folder, where it is one of transformers'."""
    content: Any = read_json(config)
    text: Any = (content.get("model_cfg") or {}).get("text_cfg") if isinstance(content, dict) else None
    return isinstance(text, dict) and bool(text.get("hf_tokenizer_name") or text.get("hf_model_name"))


def find_weights(backbone: str, pretrained: str | None) -> WeightsSource:
    """Resolve what the user named.

    Args:
        backbone: `tiny`, a model name of open_clip, `local-dir:PATH`, `hf-hub:ORG/NAME` or `timm:NAME`.
        pretrained: for a model name: a tag of open_clip or a checkpoint file; for `timm:NAME` a file or its folder.

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
    if backbone.startswith(TIMM):
        return _of_timm(backbone, pretrained)
    if pretrained and Path(pretrained).is_file():
        _check_model_name(backbone)
        path = Path(pretrained).resolve()
        shards = _shards_of(path)
        return WeightsSource(
            name=backbone, model=backbone, pretrained=str(path), weights=path, config=None, shards=shards
        )
    if pretrained and Path(pretrained).is_dir():
        _check_model_name(backbone)
        folder = Path(pretrained)
        is_model = (folder / CONFIG_NAME).is_file() or is_transformers_folder(folder)
        remedy = "give --backbone local-dir:FOLDER" if is_model else "name a file in it"
        raise UserError(f"{pretrained!r} is a folder", place="--pretrained", remedy=remedy)
    return _by_tag(backbone, pretrained)


def _of_timm(backbone: str, pretrained: str | None) -> WeightsSource:
    """Return an image tower of timm's with the weights of a file, or of a folder that has some."""
    if not pretrained:
        remedy = "give the file of its weights (model.safetensors of the model's repository)"
        raise UserError(f"{backbone} without weights would be random", place="--pretrained", remedy=remedy)
    path = Path(pretrained).resolve()
    weights, notes = _weights_in(path) if path.is_dir() else (path, ())
    if weights is None or not weights.is_file():
        what = "has no weights" if path.is_dir() else "no such file"
        raise UserError(what, place=path, remedy=f"give the file of the weights of {backbone}")
    config, architecture = weights.parent / "config.json", timm_architecture(weights.parent)
    if architecture != backbone.removeprefix(TIMM).partition(".")[0]:
        if architecture is not None and path.is_dir():
            raise UserError(f"is of {architecture}", place=config, remedy=f"give --backbone {TIMM}{architecture}")
        architecture = None  # of another model, beside a file that was named by itself
    return WeightsSource(
        name=backbone,
        model=backbone,
        pretrained=str(weights),
        weights=weights,
        config=config if architecture else None,
        shards=_shards_of(weights),
        notes=notes,
        layout="timm",
    )


def timm_architecture(folder: Path) -> str | None:
    """Return of which model of timm's the configuration in a folder is, None where it has none of timm's."""
    content = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    named = content.get("architecture") if isinstance(content, dict) else None
    return named if isinstance(named, str) else None


def _in_folder(backbone: str) -> WeightsSource:
    folder = Path(backbone.removeprefix(LOCAL_DIR))
    config = folder / CONFIG_NAME
    if not folder.is_dir():
        raise UserError("no such folder", place=folder, remedy=f"give {LOCAL_DIR}PATH of a folder with {CONFIG_NAME}")
    layout: Literal["open_clip", "transformers"] = "open_clip"
    usual = "open_clip_model.safetensors"
    if not config.is_file() and is_transformers_folder(folder):
        layout, config, usual = "transformers", folder / "config.json", "model.safetensors"
    if not config.is_file():
        remedy = "write one with model_cfg and preprocess_cfg"
        if (folder / "config.json").is_file():  # neither transformers' nor nothing: timm's
            name = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))["architecture"]
            raise UserError(
                "is a model of timm's", place=folder, remedy=f"give --backbone {TIMM}{name} --pretrained {folder}"
            )
        raise UserError(f"has no {CONFIG_NAME}, and no config.json of transformers", place=folder, remedy=remedy)
    content = read_json(config)
    if layout == "open_clip" and (not isinstance(content, dict) or "model_cfg" not in content):
        raise UserError("has no 'model_cfg'", place=config, remedy="see open_clip's local-dir: layout")
    weights, notes = _weights_in(folder)
    if weights is None:
        raise UserError("has no weights", place=folder, remedy=f"put {usual} into it")
    if layout == "transformers":  # what is wrong is said before a library is loaded
        read_foreign(config)
        require_tokens(folder)
    model, shards = f"{LOCAL_DIR}{folder.resolve()}", _shards_of(weights)
    return WeightsSource(
        name=model,
        model=model,
        pretrained=None,
        weights=weights,
        config=config,
        shards=shards,
        notes=notes,
        layout=layout,
    )


def _weights_in(folder: Path) -> tuple[Path | None, tuple[str, ...]]:
    """Return the weights of a folder, and what to say where it has several."""
    # The order of open_clip's own search (factory._find_checkpoint_in_dir), then what it does not read.
    preferred = ["open_clip_model.safetensors"]
    preferred += [f"open_clip_pytorch_model{suffix}" for suffix in (".safetensors", ".bin", ".pth")]
    preferred += ["model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth"]
    found = [path for name in preferred for path in (folder / name, folder / f"{name}{INDEX}") if path.is_file()]
    if not found:
        there = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
        there = [path for path in there if not path.name.lower().startswith(NO_WEIGHTS)]
        found = [path for ending in ENDINGS for path in there if path.name.lower().endswith(ending)]
    if not found:
        return None, ()
    if (folder / ADAPTER).is_file():  # transformers would add them to what it reads
        message = "holds low-rank additions of peft, which would be left out"
        remedy = "merge them (merge_and_unload) and save the whole model, or take the file away"
        raise UserError(message, place=folder / ADAPTER, remedy=remedy)
    of_first = {found[0], *_shards_of(found[0])}
    others = [path.name for path in found[1:] if path not in of_first]
    if not others:
        return found[0], ()
    return found[0], (f"weights read from {found[0].name}, not from {and_more(others)} beside it",)


def _shards_of(weights: Path) -> tuple[Path, ...]:
    """Return all files of a checkpoint of which `weights` is the index or one shard; none where it is whole.

    Raises:
        UserError: names the first shard that is missing.
    """
    if weights.name.endswith(INDEX):
        content = read_json(weights)
        places = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise UserError("has no 'weight_map'", place=weights, remedy="give the index of shards, or one file")
        names = sorted(set(places.values()))
    elif match := SHARD.search(weights.name):
        first, count, digits = weights.name[: match.start()], int(match[2]), len(match[1])
        names = [f"{first}-{number:0{digits}}-of-{match[2]}{match[3]}" for number in range(1, count + 1)]
    else:
        return ()
    for name in names:
        if Path(name).name != name:
            raise UserError(f"names {name!r}, which is not beside it", place=weights, remedy="correct its weight_map")
        if not (weights.parent / name).is_file():
            message = f"shard {name} is missing, one of {len(names)}"
            raise UserError(message, place=weights.parent, remedy="fetch it from where the others come")
    return tuple(weights.parent / name for name in names)


def _on_hub(backbone: str) -> WeightsSource:
    stay_offline_without_hub()
    from open_clip.pretrained import download_pretrained_from_hf

    repo = backbone.removeprefix(HF_HUB)
    try:
        config = Path(download_pretrained_from_hf(repo, filename=CONFIG_NAME))
        weights = Path(download_pretrained_from_hf(repo))
    except hub_errors() as error:
        if (folder := _transformers_on_hub(repo)) is not None:
            return replace(_in_folder(f"{LOCAL_DIR}{folder}"), name=backbone)
        files = f"{CONFIG_NAME} and open_clip_model.safetensors of {repo}"
        raise _not_fetched(error, backbone, files, "--backbone local-dir:FOLDER") from error
    return WeightsSource(name=backbone, model=backbone, pretrained=None, weights=weights, config=config)


def _transformers_on_hub(repo: str) -> Path | None:
    """Return the folder of a model of transformers on the hub, or in the hub's cache; None where there is none."""
    from huggingface_hub import snapshot_download

    safe = ["model*.safetensors", f"model.safetensors{INDEX}"]
    unsafe = ["pytorch_model*.bin", f"pytorch_model.bin{INDEX}"]
    with contextlib.suppress(*hub_errors()):
        folder = Path(snapshot_download(repo, allow_patterns=["config.json", *BESIDE]))
        if not is_transformers_folder(folder):
            return None
        for patterns in (safe, unsafe):
            snapshot_download(repo, allow_patterns=patterns)
            if _weights_in(folder)[0] is not None:
                return folder
    return None


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
    stay_offline_without_hub()
    try:
        weights = Path(download_pretrained(config))
    except hub_errors() as error:
        files = config.get("hf_hub") or config.get("url")
        raise _not_fetched(error, f"{model} ({tag})", f"{files}", "--pretrained FILE") from error
    return WeightsSource(name=model, model=model, pretrained=tag, weights=weights, config=None)


def stay_offline_without_hub() -> None:
    """Tell the hub's client to use its cache alone where nobody answers at the hub's address."""
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


def hub_errors() -> tuple[type[Exception], ...]:
    """Return what the hub's client raises."""
    # The client's own errors, those of the library that connects (its HTTP error derives from them), a ValueError for a
    # malformed name; open_clip's RuntimeError for a file that is not what was published.
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    return (OSError, ValueError, RuntimeError, EntryNotFoundError, *HfHubHTTPError.__bases__)


OF_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def _not_fetched(error: Exception, what: str, files: str, option: str) -> UserError:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if isinstance(error, OSError) and error.errno in OF_DISK:
        raise error
    remedy = f"fetch {files} on a machine with a network and pass {option}"
    if isinstance(error, GatedRepoError):
        message, remedy = "the hub wants its licence accepted first", "accept it on its page, then give HF_TOKEN"
    elif isinstance(error, RepositoryNotFoundError):
        message, remedy = "the hub knows no such model, or it is private", "check the name, or give HF_TOKEN"
    elif isinstance(error, HFValidationError):
        message, remedy = f"is no name of the hub ({first_line(error)})", f"give {HF_HUB}ORG/NAME"
    elif isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        message, remedy = f"the hub has no {files} there", "give a model of open_clip, or local-dir: of its files"
    else:
        message = "the weights are not on this machine and could not be downloaded"
    return UserError(message, place=what, remedy=remedy)


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
        if Path(model).is_dir():
            hint = f"give a folder as {LOCAL_DIR}{model}"
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


# ---- What open_clip knows of published weights, held against a file that is to be loaded


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
