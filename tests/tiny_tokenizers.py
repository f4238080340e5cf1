"""Tokenizers of the published kinds, trained on the spot on a handful of captions and written in their layouts."""

import json
import pathlib

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer, GemmaTokenizer, T5Tokenizer

CAPTIONS = ["a photo of a red circle", "two blue squares left of a green star", "a ring above a cross"] * 5


def write_clip(folder: pathlib.Path, pad_token: str = "<|endoftext|>") -> pathlib.Path:
    """`vocab.json`, `merges.txt` and a config, as in `tokenizer` and `tokenizer_2` of Stable Diffusion 3.5."""
    like = CLIPTokenizer().backend_tokenizer
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = like.normalizer, like.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator(
        CAPTIONS,
        trainers.BpeTrainer(initial_alphabet=alphabet, end_of_word_suffix="</w>", vocab_size=320, show_progress=False),
    )
    model = json.loads(trained.to_str())["model"]
    # As published: "!" has the id 0, and the two special tokens are the last.
    words = sorted(model["vocab"], key=lambda word: (word != "!", model["vocab"][word]))
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad_token, **special}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_t5(folder: pathlib.Path) -> pathlib.Path:
    """A Unigram tokenizer as in `tokenizer_3` of Stable Diffusion 3.5."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = T5Tokenizer(extra_ids=0).backend_tokenizer.pre_tokenizer
    special = ["<pad>", "</s>", "<unk>"]
    trained.train_from_iterator(
        CAPTIONS,
        trainers.UnigramTrainer(vocab_size=48, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    vocab = [tuple(entry) for entry in json.loads(trained.to_str())["model"]["vocab"]]
    T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512).save_pretrained(folder)
    return folder


def write_gemma(folder: pathlib.Path) -> pathlib.Path:
    """A BPE tokenizer with byte fallback that begins a text and pads on the left, as in `google/gemma-2-2b`."""
    like = GemmaTokenizer().backend_tokenizer
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    trained.normalizer, trained.pre_tokenizer = like.normalizer, like.pre_tokenizer
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(
        CAPTIONS, trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    tokenizer = GemmaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    tokenizer.save_pretrained(folder)
    return folder
