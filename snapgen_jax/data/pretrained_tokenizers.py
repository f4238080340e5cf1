"""The tokenizers that published text encoders were trained with, read from a local folder by `transformers`.

The folder is that of the Hugging Face layout: `tokenizer`, `tokenizer_2` and `tokenizer_3` of Stable Diffusion 3.5, or
the repository of Gemma 2 itself. It decides the special tokens and the padding; code that it may carry is never run.

| encoder | length | begins, ends | padding |
|---|---|---|---|
| CLIP-L | 77 | `<|startoftext|>`, `<|endoftext|>` | `<|endoftext|>` |
| CLIP-bigG | 77 | the same | `!`, id 0, in Stable Diffusion's folder |
| T5 | 256 | ends with `</s>` | `<pad>`, id 0 |
| Gemma 2 | 256 | begins with `<bos>` | `<pad>`, id 0, on the right |
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np

from snapgen_jax.data.errors import DataError
from snapgen_jax.data.tokenizer import encode_with, mask_name
from snapgen_jax.data.words import require_text

log = logging.getLogger(__name__)
_WARNINGS = 10


class Encodes(Protocol):
    """What makes token ids of texts."""

    def encode(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 and mask float32 `[N, length]` of N texts."""
        ...


class PretrainedTokenizer:
    """Text to the token ids of a published encoder. Holds no state but how often it has warned."""

    def __init__(self, model: Any):
        """`model`: a tokenizer of `transformers`."""
        self._model = model
        self._warnings = 0

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Reads a tokenizer's folder.

        Raises:
            DataError: the folder is missing, or holds no tokenizer that can be read without running its code.
        """
        if not pathlib.Path(folder).is_dir():
            raise DataError(f"{os.fspath(folder)!r} is not a folder; give the local folder of a published tokenizer")
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install torch
        from transformers import AutoTokenizer

        try:
            # Our encoders take padding on the right; Gemma's folder says left, which is for generation.
            model = AutoTokenizer.from_pretrained(
                os.fspath(folder), local_files_only=True, trust_remote_code=False, padding_side="right"
            )
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise DataError(
                f"{os.fspath(folder)!r} holds no readable tokenizer ({error}); expected tokenizer.json, or vocab.json "
                "and merges.txt, with tokenizer_config.json"
            ) from error
        if model.pad_token_id is None:
            raise DataError(f"the tokenizer in {os.fspath(folder)!r} has no padding token; add one to its config")
        return cls(model)

    @property
    def vocab_size(self) -> int:
        """Number of ids, the special ones included."""
        return len(self._model)

    @property
    def pad_id(self) -> int:
        """The id that fills a text up to the asked length."""
        return self._model.pad_token_id

    def save(self, path: pathlib.Path) -> None:
        """Writes it as one file of the `tokenizers` library, which holds its padding token but pads and cuts nothing
        by itself."""
        model = type(self._model.backend_tokenizer).from_str(self._model.backend_tokenizer.to_str())
        model.no_truncation()
        model.enable_padding(pad_id=self.pad_id, pad_token=self._model.pad_token)
        model.save(str(path))

    def encode(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Encodes texts as the reference pipelines do: special tokens added, cut and padded to one length.

        A text that is cut keeps its special tokens; what is lost is named in a warning, for the first ten such texts.

        Args:
            texts: N texts; the empty one becomes the special tokens alone.
            length: L.

        Returns:
            tokens int32 `[N, L]`, and mask float32 `[N, L]`, 1 for the text with its special tokens and 0 for padding.

        Raises:
            DataError: a text holds half of a character.
        """
        texts = [require_text(text, "the caption or prompt") for text in texts]
        encoded = self._model(texts, padding="max_length", max_length=length, truncation=True, return_tensors="np")
        self._warn_about_cuts(texts, length)
        return encoded["input_ids"].astype(np.int32), encoded["attention_mask"].astype(np.float32)

    def _warn_about_cuts(self, texts: list[str], length: int) -> None:
        if self._warnings >= _WARNINGS:
            return
        room = length - self._model.num_special_tokens_to_add()
        for ids in self._model(texts, add_special_tokens=False)["input_ids"]:
            if len(ids) > room and self._warnings < _WARNINGS:
                self._warnings += 1
                further = " (further ones are cut in silence)" if self._warnings == _WARNINGS else ""
                log.warning(
                    "a text of %d tokens is cut to the %d that fit beside the special tokens%s; this part is lost: %r",
                    len(ids),
                    room,
                    further,
                    self._model.decode(ids[room:]),
                )


class StandInTokenizer:
    """Words to ids that mean nothing, always the same, for a text encoder that was drawn at random.

    Attributes:
        vocab_size: number of ids; 0 is padding and the largest ends a text.
        pad_id: fills a text up to the asked length.
    """

    pad_id = 0

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """As `PretrainedTokenizer.encode`."""
        tokens, mask = np.zeros((len(texts), length), np.int32), np.zeros((len(texts), length), np.float32)
        for row, text in enumerate(texts):
            words = require_text(text, "the caption or prompt").split()[: length - 1]
            ids = [1 + zlib.crc32(word.encode()) % (self.vocab_size - 2) for word in words] + [self.vocab_size - 1]
            tokens[row, : len(ids)], mask[row, : len(ids)] = ids, 1.0
        return tokens, mask


@dataclasses.dataclass(frozen=True)
class OneText:
    """Encodes one text in place of every other."""

    tokenizer: Encodes
    text: str

    def encode(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 and mask float32 `[N, length]` of the one text, for N texts."""
        return self.tokenizer.encode([self.text] * len(texts), length)


class PretrainedTokenizers:
    """One caption for several encoders, each with its own tokenizer.

    Attributes:
        each: {array of token ids: that which encodes it}.
        names: the arrays that they give, ids and masks.
    """

    def __init__(self, tokenizers: Mapping[str, Encodes]):
        """`tokenizers`: {array of token ids: that which encodes it}; a run's own may be among them."""
        self.each = dict(tokenizers)
        self.names = tuple(name for tokens in tokenizers for name in (tokens, mask_name(tokens)))

    @classmethod
    def load(cls, folders: Mapping[str, str], vocab_sizes: Mapping[str, int]) -> Self:
        """Reads the tokenizers' folders.

        Args:
            folders: {array of token ids: folder}.
            vocab_sizes: {array of token ids: how many its encoder knows}.

        Raises:
            DataError: a folder is not named, is no tokenizer's, or is that of another encoder.
        """
        tokenizers = {}
        for name, folder in folders.items():
            if not folder:
                raise DataError(
                    f"the text encoder {name} has no tokenizer: set inputs.{name}_tokenizer to the local folder that "
                    "was published with it"
                )
            tokenizers[name] = PretrainedTokenizer.load(folder)
            if tokenizers[name].vocab_size > vocab_sizes[name]:
                raise DataError(
                    f"the tokenizer in {folder!r} has {tokenizers[name].vocab_size} ids and the text encoder {name} "
                    f"takes {vocab_sizes[name]}; set inputs.{name}_tokenizer to its own"
                )
        return cls(tokenizers)

    def arrays(self, texts: Sequence[str], lengths: Mapping[str, int]) -> dict[str, np.ndarray]:
        """Token ids int32 and masks float32 `[N, L]`, those that `lengths` names; the mask of "x" is "x_mask".

        Raises:
            DataError: ids and mask are not of one length.
        """
        return encode_with(self.each, texts, lengths)
