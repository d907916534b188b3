"""The tokenizer that lies in a transformers folder, with the ids that transformers gives.

`tokenizer.json` is read by the small library `tokenizers`; where it lacks, transformers makes one of the other files.
Knows both. Must not know models.
"""

from __future__ import annotations

import importlib.util
import re
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from deltaclip.base.errors import UserError
from deltaclip.features.backbone.library import library_call, read_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

FAST = "tokenizer.json"
OTHERS = (("vocab.json", "merges.txt"), ("spiece.model",))
REMEDY = "install it with: pip install 'deltaclip[hf]'"
# Classes of transformers that change a text before their file is asked: SigLIP was trained on words alone.
CANONICAL, LOWER = "SiglipTokenizer", "Siglip2Tokenizer"
LEFT = ("Siglip2Tokenizer", "GemmaTokenizer", "GemmaTokenizerFast")  # which pad there unless told
PUNCTUATION = str.maketrans("", "", string.punctuation)


def require_tokens(folder: Path) -> None:
    """Refuse a folder whose tokenizer is missing or needs a library that is not there.

    Raises:
        UserError: names the file or the library.
    """
    others = [names[0] for names in OTHERS if all((folder / name).is_file() for name in names)]
    if (folder / FAST).is_file() and not _needs_pieces(folder):
        library = "tokenizers"
    elif others:
        library = "sentencepiece" if others[0] == "spiece.model" else "transformers"
    else:
        remedy = f"put {FAST} of the same model into it"
        raise UserError(f"has no tokenizer ({FAST})", place=folder, remedy=remedy)
    needed = [library] if library == "tokenizers" else ["transformers", library]
    for name in needed:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"its tokenizer needs {name}, which is not installed", place=folder, remedy=REMEDY)


def _needs_pieces(folder: Path) -> bool:
    """Tell a tokenizer that transformers reads from `spiece.model` although `tokenizer.json` is there."""
    return (folder / "spiece.model").is_file() and _settings(folder).get("tokenizer_class") == CANONICAL


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    content = read_json(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def folder_tokenizer(
    folder: Path, *, context_length: int, text: Mapping[str, Any], kind: str
) -> FolderTokenizer | SlowTokenizer:
    """Return the tokenizer of a folder.

    Args:
        folder: with `tokenizer.json` or what transformers makes one of.
        context_length: tokens that a text has unless another number is asked for.
        text: `text_config` of the model.
        kind: `model_type` of the model: by it, transformers has a tokenizer of SigLIP 2 whatever its files say.

    Raises:
        UserError: a file cannot be read.
    """
    if not (folder / FAST).is_file() or _needs_pieces(folder):
        from transformers import AutoTokenizer

        with library_call(folder, "its tokenizer cannot be read", f"put a {FAST} into it"):
            slow = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        return SlowTokenizer(slow, context_length)
    from tokenizers import Tokenizer

    with library_call(folder / FAST, "cannot be read", "fetch it again"):
        # A broken file is a bare Exception of the library's; read as JSON first, what is left are ValueErrors.
        read_json(folder / FAST)
        fast = _fast(Tokenizer, folder / FAST)
        settings = _settings(folder)
        named = settings.get("pad_token") or (fast.padding or {}).get("pad_token")
        named = named.get("content") if isinstance(named, dict) else named
        known = None if named is None else fast.token_to_id(str(named))
    padding = known if known is not None else text.get("pad_token_id", 1)
    if not isinstance(padding, int):
        raise UserError("names no token that fills short texts", place=folder / FAST, remedy="give pad_token in it")
    kind = LOWER if kind == "siglip2" else str(settings.get("tokenizer_class", ""))
    usual = (fast.padding or {}).get("direction", "left" if kind in LEFT else "right")
    fast.no_padding()
    fast.no_truncation()
    return FolderTokenizer(
        tokenizer=fast,
        context_length=context_length,
        pad_id=padding,
        pads_left=settings.get("padding_side", usual) == "left",
        cuts_left=settings.get("truncation_side", "right") == "left",
        changes="canonical" if kind == CANONICAL else "lower" if kind == LOWER else "",
        keeps_case=settings.get("do_lower_case", True) is False,
    )


def _fast(kind: Any, path: Path) -> Any:
    try:
        return kind.from_file(str(path))
    except BaseException as error:
        if type(error) is not Exception:  # what the library raises for whatever is wrong in a file
            raise
        raise ValueError(str(error)) from error


@dataclass(frozen=True, kw_only=True)
class FolderTokenizer:
    """`tokenizer` with the padding and the cut that transformers would have; may be called from several threads."""

    tokenizer: Any
    context_length: int
    pad_id: int
    pads_left: bool
    cuts_left: bool
    changes: Literal["", "lower", "canonical"]
    keeps_case: bool = False

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return int(self.tokenizer.get_vocab_size())

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> torch.Tensor:
        """Return token ids (B, L) int64; what is longer is cut, the marks at its ends stay."""
        return self.with_cut(texts, context_length)[0]

    def with_cut(
        self, texts: str | list[str], context_length: int | None = None
    ) -> tuple[torch.Tensor, NDArray[np.bool_]]:
        """Return the token ids, and which texts were cut, (B,) bool."""
        import torch

        texts, length = [texts] if isinstance(texts, str) else list(texts), context_length or self.context_length
        room = max(0, length - self.tokenizer.num_special_tokens_to_add(is_pair=False))
        found = torch.full((len(texts), length), self.pad_id, dtype=torch.int64)
        encodings = self.tokenizer.encode_batch([self._changed(text) for text in texts], add_special_tokens=False)
        cut_B = np.array([len(encoding.ids) > room for encoding in encodings], dtype=bool)
        for row, encoding, is_cut in zip(found, encodings, cut_B, strict=True):
            if is_cut:
                encoding.truncate(room, direction="left" if self.cuts_left else "right")
            ids = torch.tensor(self.tokenizer.post_process(encoding).ids[:length], dtype=torch.int64)
            if self.pads_left:
                row[length - len(ids) :] = ids
            else:
                row[: len(ids)] = ids
        return found, cut_B

    def _changed(self, text: str) -> str:
        if self.changes and not self.keeps_case:
            text = text.lower()
        if self.changes == "canonical":
            text = re.sub(r"\s+", " ", text.translate(PUNCTUATION)).strip()
        return text


@dataclass(frozen=True)
class SlowTokenizer:
    """A tokenizer of transformers' own, called as open_clip's are."""

    tokenizer: Any
    context_length: int

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self.tokenizer)

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> torch.Tensor:
        """Return token ids (B, L) int64; what is longer is cut."""
        import torch

        texts, length = [texts] if isinstance(texts, str) else list(texts), context_length or self.context_length
        found = self.tokenizer(texts, padding="max_length", truncation=True, max_length=length)
        return torch.tensor(found["input_ids"], dtype=torch.int64)
