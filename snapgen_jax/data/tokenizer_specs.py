"""From what a run says of its tokenizers (`TokenizerSpec`) to tokenizers."""

from __future__ import annotations

from collections.abc import Mapping

from etils import epath

from snapgen_jax.data.config import DataConfig
from snapgen_jax.data.errors import DataError
from snapgen_jax.data.pretrained_tokenizers import PretrainedTokenizer, PretrainedTokenizers
from snapgen_jax.data.sources import Source
from snapgen_jax.data.tokenizer import CaptionTokenizer, Tokenizer, build_tokenizer
from snapgen_jax.inputs.interfaces import TokenizerSpec

Specs = Mapping[str, TokenizerSpec]


def load_tokenizers(specs: Specs, path: epath.PathLike | None) -> CaptionTokenizer | None:
    """The tokenizers of a run.

    Args:
        specs: {array of token ids: its tokenizer}.
        path: the run's own `tokenizer.json`, which serves all specs of the kind "trained"; None where there is none.

    Returns:
        What gives the arrays of `specs` and their masks; None for no specs.

    Raises:
        DataError: a file or folder is missing or is no tokenizer, or a tokenizer has more ids than its text encoder.
    """
    own = _trained(specs)
    folders = {name: spec.folder for name, spec in specs.items() if name not in own}
    vocab_sizes = {name: spec.vocab_size for name, spec in specs.items()}
    published = PretrainedTokenizers.load(folders, vocab_sizes) if folders else None
    if not own:
        return published
    if path is None:
        raise DataError(f"{', '.join(own)} needs the tokenizer.json of a run, and no run is given")
    tokenizer = Tokenizer.load(path)
    _check_room(own, tokenizer)
    if list(specs) == ["tokens"]:
        return tokenizer
    made: dict[str, Tokenizer | PretrainedTokenizer] = {} if published is None else dict(published.each)
    return PretrainedTokenizers({name: made.get(name, tokenizer) for name in specs})


def make_tokenizer(
    specs: Specs, config: DataConfig, source: Source, path: epath.PathLike, init_from: epath.PathLike = ""
) -> None:
    """Writes the `tokenizer.json` of a run, if it needs one and has none. One process does this for all.

    It is that of the run that the specs name, since a text encoder keeps its tokenizer; else that of `init_from`, if
    that run has one; else the one that `config.tokenizer` says, by default trained on the texts of the source.

    Args:
        specs: {array of token ids: its tokenizer}.
        config: the data config.
        source: the training examples.
        path: the file.
        init_from: the earlier run that this one starts from.

    Raises:
        DataError: the specs name several runs, or one that has no tokenizer; the source has no such text; or the
            tokenizer has more ids than the text encoder.
    """
    own = _trained(specs)
    path = epath.Path(path)
    if not own or path.exists():
        return
    workdir = next(iter(own.values())).workdir
    earlier = epath.Path(init_from) / "tokenizer.json"
    if workdir:
        tokenizer = Tokenizer.load(epath.Path(workdir) / "tokenizer.json")
    elif init_from and earlier.exists():
        tokenizer = Tokenizer.load(earlier)
    else:
        texts = tuple(dict.fromkeys(config.texts.get(name, "caption") for name in own))
        tokenizer = build_tokenizer(config, source, texts)
    _check_room(own, tokenizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(path)


def _trained(specs: Specs) -> dict[str, TokenizerSpec]:
    """The specs that the run's own `tokenizer.json` serves."""
    own = {name: spec for name, spec in specs.items() if spec.kind == "trained"}
    if len(workdirs := {spec.workdir for spec in own.values()}) > 1:
        named = " and ".join(f"{spec.workdir or 'a new one'} for {name}" for name, spec in own.items())
        raise DataError(
            f"a run has one tokenizer.json, and {len(workdirs)} are asked for: {named}; use text encoders that were "
            "trained with one tokenizer"
        )
    return own


def _check_room(own: Specs, tokenizer: Tokenizer) -> None:
    for spec in own.values():
        if tokenizer.vocab_size > spec.vocab_size:
            raise DataError(
                f"the tokenizer has {tokenizer.vocab_size} ids and the text encoder takes {spec.vocab_size}; "
                "set data.vocab_size to at most text.vocab_size"
            )
