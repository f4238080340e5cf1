"""Captions to token ids: lower-cased byte-level BPE, trained on a source's own captions or loaded from a file."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import tokenizers
from etils import epath
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from snapgen_jax.data.arrays import listed
from snapgen_jax.data.config import DataConfig
from snapgen_jax.data.errors import DataError
from snapgen_jax.data.sources import Source
from snapgen_jax.data.words import require_text
from snapgen_jax.training.files import write_whole

PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
_SPECIAL = ["<pad>", "<bos>", "<eos>"]

log = logging.getLogger(__name__)


class CaptionTokenizer(Protocol):
    """What makes arrays of captions: one tokenizer, or several."""

    @property
    def names(self) -> tuple[str, ...]:
        """The arrays that it can give."""
        ...

    def arrays(self, texts: Sequence[str], lengths: Mapping[str, int]) -> dict[str, np.ndarray]:
        """The arrays `[N, L]` of N texts, those that `lengths` names with their L."""
        ...


class Tokenizer:
    """A `tokenizers` model framed by BOS and EOS. Holds no state but its vocabulary."""

    names = ("tokens", "mask")

    def __init__(self, model: tokenizers.Tokenizer):
        self._model = model
        self._model.encode_special_tokens = True  # a caption that spells "<eos>" does not end there
        self._warned = False

    @property
    def vocab_size(self) -> int:
        """Number of ids, the special ones included: one more than the greatest, used or not below it."""
        return 1 + max(self._model.get_vocab().values(), default=-1)

    def arrays(self, texts: Sequence[str], lengths: Mapping[str, int]) -> dict[str, np.ndarray]:
        """`{"tokens", "mask"}`, as from `encode`, those that `lengths` names.

        Raises:
            DataError: the two are not of one length.
        """
        return encode_with({"tokens": self}, texts, lengths)

    def encode(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Encodes texts as `BOS tokens EOS PAD...`; a text that is too long loses its end, not its EOS.

        Args:
            texts: N captions; the empty one becomes `BOS EOS`.
            length: L, at least 2.

        Returns:
            tokens int32 `[N, L]`, and mask float32 `[N, L]`, 1 from BOS to EOS.

        Raises:
            DataError: a text holds half of a character.
        """
        tokens = np.full((len(texts), length), PAD_ID, np.int32)
        mask = np.zeros((len(texts), length), np.float32)
        for row, text in enumerate(texts):
            ids = self._model.encode(require_text(text, "the caption or prompt"), add_special_tokens=False).ids
            if len(ids) > length - 2:
                self._warn(text, len(ids), length)
                ids = ids[: length - 2]
            used = len(ids) + 2
            tokens[row, :used] = [BOS_ID, *ids, EOS_ID]
            mask[row, :used] = 1.0
        return tokens, mask

    def _warn(self, text: str, count: int, length: int) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "a caption of %d tokens is cut to the %d that the text encoder takes (further ones in silence): %r",
                count,
                length - 2,
                text,
            )

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a row of ids, special ones left out."""
        return self._model.decode([int(t) for t in tokens], skip_special_tokens=True).strip()

    def save(self, path: epath.PathLike) -> None:
        """Writes a `tokenizer.json`, whole or not at all."""
        write_whole(epath.Path(path), self.text())

    def text(self) -> str:
        """The contents of its `tokenizer.json`."""
        return self._model.to_str(pretty=True)

    @classmethod
    def load(cls, path: epath.PathLike) -> Tokenizer:
        """Reads a `tokenizer.json`. Raises `DataError` where it is missing or not one."""
        try:
            text = epath.Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{os.fspath(path)!r} is not a readable tokenizer.json: {error}") from error
        return cls.parse(text, path)

    @classmethod
    def parse(cls, text: str, path: epath.PathLike) -> Tokenizer:
        """From the contents of a `tokenizer.json`; `path` names it in errors. Raises `DataError` where it is none."""
        try:
            model = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{os.fspath(path)!r} is not a readable tokenizer.json: {error}") from error
        found = [model.token_to_id(name) for name in _SPECIAL]
        if found != [PAD_ID, BOS_ID, EOS_ID]:
            raise DataError(f"{os.fspath(path)!r}: expected {_SPECIAL} to have the ids 0, 1, 2 and found {found}")
        return cls(model)


def mask_name(tokens: str) -> str:
    """The array that masks the padding of an array of token ids: "mask" of "tokens", "x_mask" of any other "x"."""
    return "mask" if tokens == "tokens" else f"{tokens}_mask"


def encode_with(
    tokenizers: Mapping[str, Any], texts: Sequence[str], lengths: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """The token ids and masks that `lengths` names.

    Args:
        tokenizers: {array of token ids: that which encodes it}, each with `encode(texts, length)`.
        texts: N texts.
        lengths: {array of ids or mask: L}.

    Raises:
        DataError: ids and mask are not of one length.
    """
    arrays = {}
    for name, tokenizer in tokenizers.items():
        mask = mask_name(name)
        asked = {lengths[array] for array in (name, mask) if array in lengths}
        if len(asked) > 1:
            raise DataError(f"{name} and {mask} differ in length: {lengths[name]} and {lengths[mask]}")
        if asked:
            arrays[name], arrays[mask] = tokenizer.encode(texts, asked.pop())
    return {array: arrays[array] for array in lengths}


def train(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a tokenizer. The same captions in the same order give the same tokenizer.

    Every byte is a token, so that no text is unknown; `vocab_size` is an upper bound, and few words need few merges.
    """
    floor = len(_SPECIAL) + 256
    if vocab_size < floor:
        raise DataError(f"vocab_size {vocab_size} is below {floor}: a token for every byte, and three special ones")
    model = tokenizers.Tokenizer(models.BPE())
    model.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])  # type: ignore[assignment]
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    model.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=_SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(captions, trainer)
    return Tokenizer(model)


def train_tokenizer(
    source: Source, config: DataConfig, sample: int = 20_000, texts: Sequence[str] = ("caption",)
) -> Tokenizer:
    """Trains a tokenizer on `sample` examples spread evenly over a source; deterministic.

    Args:
        source: the examples.
        config: bounds the vocabulary.
        sample: how many examples; those of a small source are drawn many times.
        texts: the entries of an example that are read.

    Raises:
        DataError: the source has no such text.
    """
    declared = source.spec()
    for name in texts:
        if name not in declared or declared[name].kind != "text":
            raise DataError(
                f"a tokenizer is trained on the text {name!r}, and the source has {listed(declared)}; set data.texts, "
                "or choose another source"
            )
    indices = np.linspace(0, len(source) - 1, sample).astype(np.int64)
    examples = (source.example(int(index), np.random.default_rng((0, n)), texts) for n, index in enumerate(indices))
    return train((example[name] for example in examples for name in texts), config.vocab_size)


def build_tokenizer(config: DataConfig, source: Source, texts: Sequence[str] = ("caption",)) -> Tokenizer:
    """The tokenizer that a config names: trained on texts of the source, or loaded."""
    if config.tokenizer == "train":
        return train_tokenizer(source, config, texts=texts)
    return Tokenizer.load(named_file(config))


def named_file(config: DataConfig) -> epath.Path:
    """The `tokenizer.json` that a config names, by itself or by the run that has it."""
    path = epath.Path(config.tokenizer)
    return path / "tokenizer.json" if path.is_dir() else path
