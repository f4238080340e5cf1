"""Prompts without images: a text file with one a line, for a method that makes its own images."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from etils import epath

from snapgen_jax.data.arrays import TEXT, ArraySpec, Example
from snapgen_jax.data.config import SourceConfig, Split
from snapgen_jax.data.errors import DataError
from snapgen_jax.data.sources import hold_out, holds_out


class PromptFile:
    """The lines of a file that are not empty."""

    def __init__(self, path: str, lines: Sequence[tuple[int, str]], held_out: bool = True):
        """Takes `(number of the line, its text)` of each."""
        self._path, self._lines, self.held_out = path, lines, held_out

    def __len__(self) -> int:
        return len(self._lines)

    def spec(self) -> dict[str, ArraySpec]:
        """A caption, and nothing else."""
        return {"caption": TEXT}

    def example(self, index: int, rng: np.random.Generator, names: Collection[str] | None = None) -> Example:
        """The prompt, as the caption."""
        del rng, names
        return {"caption": self._lines[index][1]}

    def name(self, index: int) -> str:
        """ "prompts.txt, line 7"."""
        return f"{self._path}, line {self._lines[index][0]}"

    def sizes(self) -> None:
        """None: a prompt goes to any bucket."""

    def buckets(self) -> None:
        """None."""


def build(config: SourceConfig, split: Split) -> PromptFile:
    """The prompts of a config: of `path`; for validation those of `validation_path`, if it is set, or else
    `validation_share` of them.

    Raises:
        DataError: the file is not named, is not there, or is no UTF-8 text with a prompt.
    """
    apart = split == "validation" and bool(config.validation_path)
    key, path = ("data.validation_path", config.validation_path) if apart else ("data.path", config.path)
    if not path:
        raise DataError("the data source 'prompts' needs data.path, a text file with one prompt a line")
    try:
        text = epath.Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{key}: {path!r} is no readable text file: {error}") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise DataError(f"{key}: {path!r} has no prompt; write one a line")
    if apart or (split == "train" and config.validation_path):
        return PromptFile(path, lines)
    chosen = hold_out(len(lines), split, config.validation_share)
    held_out = split == "train" or holds_out(len(lines), config.validation_share)
    return PromptFile(path, [lines[i] for i in chosen], held_out)
