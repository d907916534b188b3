"""Small models of CLIP, SigLIP and SigLIP 2 with random weights and a tokenizer, saved by transformers itself."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pathlib import Path

SIDE, TEXT_LENGTH, NUM_WORDS = 48, 16, 2000
IMAGE = {
    "hidden_size": 64,
    "intermediate_size": 152,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 16,
}
TEXT = {"intermediate_size": 120, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS = ("clip, quick gelu", "clip, gelu", "clip, old eos", "siglip", "siglip2", "siglip2, flat patches")
WORDS = ["a photo of a red cat", "an astronaut riding a horse, oil on canvas", "two dogs", "Blue house -- at night!"]


def save_folder(folder: Path, kind: str, *, seed: int = 0, max_shard_size: str = "5GB"):
    """Save a model with processor and tokenizer; return it, in evaluation mode."""
    import transformers

    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    if kind.startswith("clip"):
        model = transformers.CLIPModel(clip_config(kind))
        clip_tokenizer(folder)
        processor = transformers.CLIPImageProcessor(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        )
    else:
        model = siglip_model(kind)
        siglip_tokenizer(folder, kind)
        processor = transformers.SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.eval().save_pretrained(folder, max_shard_size=max_shard_size)
    processor.save_pretrained(folder)
    return model


def clip_config(kind: str):
    import transformers

    act = "quick_gelu" if "quick" in kind or "old" in kind else "gelu"
    text = TEXT | {
        "hidden_size": 32,
        "vocab_size": NUM_WORDS,
        "max_position_embeddings": TEXT_LENGTH,
        "hidden_act": act,
    }
    text |= {"bos_token_id": NUM_WORDS - 2, "eos_token_id": 2 if "old" in kind else NUM_WORDS - 1, "pad_token_id": 1}
    return transformers.CLIPConfig(
        text_config=text, vision_config=IMAGE | {"image_size": SIDE, "hidden_act": act}, projection_dim=24
    )


def siglip_model(kind: str):
    import transformers

    text = TEXT | {"hidden_size": 64, "vocab_size": 600, "max_position_embeddings": 64}
    text |= {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0 if "2" in kind else 1}
    image = IMAGE | {"num_attention_heads": 2}
    if kind == "siglip2, flat patches":
        config = transformers.Siglip2Config(text_config=text, vision_config=image | {"num_patches": (SIDE // 16) ** 2})
        return transformers.Siglip2Model(config)
    config = transformers.SiglipConfig(text_config=text, vision_config=image | {"image_size": SIDE})
    return transformers.SiglipModel(config)


def clip_tokenizer(folder: Path) -> None:
    """Save CLIP's own tokenizer with the first of its words; its last token has the highest number, as there."""
    import transformers

    encoder, merges = words_of_clip()
    ends = ("<|startoftext|>", "<|endoftext|>")
    names = {"bos_token": ends[0], "eos_token": ends[1], "unk_token": ends[1], "pad_token": ends[1]}
    vocab = {token: number for token, number in encoder.items() if number < NUM_WORDS - 2}
    vocab |= {ends[0]: NUM_WORDS - 2, ends[1]: NUM_WORDS - 1}
    merges = [pair for pair in merges if "".join(pair) in vocab]
    made = transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH, **names)
    made.save_pretrained(folder)


@functools.cache
def words_of_clip():
    """Return the numbers of tokens, and pairs to merge, that open_clip brings."""
    import open_clip

    own = open_clip.SimpleTokenizer()
    return own.encoder, list(own.bpe_ranks)


def siglip_tokenizer(folder: Path, kind: str) -> None:
    """Save a tokenizer of SigLIP's form, trained on a few words: of sentences' pieces, or of SigLIP 2's."""
    import transformers

    if kind == "siglip":
        import sentencepiece

        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(WORDS * 20),
            model_prefix=str(folder / "spiece"),
            vocab_size=70,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
        transformers.SiglipTokenizer(str(folder / "spiece.model"), model_max_length=64).save_pretrained(folder)
        return
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    made = Tokenizer(models.BPE(unk_token=special[-1], fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False))
    made.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    names = {f"{name[1:-1]}_token": name for name in special}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, **names).save_pretrained(folder)
