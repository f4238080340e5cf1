"""From what a run says of its tokenizers (`TokenizerSpec`) to tokenizers.

A run's own `tokenizer.json` has `tokenizer_source.json` beside it: what it was made of, and its digest. The weights of
a run know the ids of this one tokenizer, so a later start compares what it would be made of now.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from snapgen_jax.data.config import DataConfig
from snapgen_jax.data.errors import DataError, UnreadableExampleError
from snapgen_jax.data.pretrained_tokenizers import Encodes, OneText, PretrainedTokenizers, StandInTokenizer
from snapgen_jax.data.shapes_demands import DemandTokenizer
from snapgen_jax.data.sources import Source
from snapgen_jax.data.tokenizer import CaptionTokenizer, Tokenizer, build_tokenizer, named_file
from snapgen_jax.inputs.interfaces import TokenizerSpec
from snapgen_jax.training.files import write_whole

Specs = Mapping[str, TokenizerSpec]
SOURCE_FILE = "tokenizer_source.json"
_CAPTIONS_COMPARED = 256


@dataclasses.dataclass(frozen=True)
class OwnTokenizer:
    """The contents of a run's `tokenizer.json`.

    Attributes:
        text: the contents.
        source: what it was made of, as JSON; None where that is not on record.
        kept: it stands in the workdir already.
    """

    text: str
    source: Mapping[str, Any] | None
    kept: bool

    def save(self, path: epath.PathLike) -> None:
        """Writes `tokenizer.json`, and `tokenizer_source.json` beside it; nothing if it is kept."""
        if self.kept:
            return
        path = epath.Path(path)
        write_whole(path, self.text)
        write_whole(path.parent / SOURCE_FILE, _record(self.text, self.source))


def load_tokenizers(specs: Specs, own: epath.PathLike | OwnTokenizer | None) -> CaptionTokenizer | None:
    """The tokenizers of a run.

    Args:
        specs: {array of token ids: its tokenizer}.
        own: the run's own `tokenizer.json`, which serves all specs of the kind "trained"; None where there is none.

    Returns:
        What gives the arrays of `specs` and their masks; None for no specs.

    Raises:
        DataError: a file or folder is missing or is no tokenizer, a tokenizer has more ids than its text encoder, or
            `tokenizer.json` was altered after the run began.
    """
    trained = _trained(specs)
    made: dict[str, Encodes] = {
        name: StandInTokenizer(spec.vocab_size) if spec.kind == "stand_in" else DemandTokenizer()
        for name, spec in specs.items()
        if spec.kind in ("stand_in", "demands")
    }
    folders = {name: spec.folder for name, spec in specs.items() if spec.kind == "pretrained"}
    vocab_sizes = {name: spec.vocab_size for name, spec in specs.items()}
    made.update(PretrainedTokenizers.load(folders, vocab_sizes).each)
    if trained:
        if own is None:
            raise DataError(f"{', '.join(trained)} needs the tokenizer.json of a run, and no run is given")
        tokenizer = Tokenizer.parse(own.text, "tokenizer.json") if isinstance(own, OwnTokenizer) else _read(own)[0]
        _check_room(trained, tokenizer)
        if list(specs) == ["tokens"]:
            return tokenizer
        made.update(dict.fromkeys(trained, tokenizer))
    each = {name: OneText(made[name], spec.text) if spec.text else made[name] for name, spec in specs.items()}
    return PretrainedTokenizers(each) if specs else None


def check_texts(specs: Specs, texts: Mapping[str, str], source: Source) -> None:
    """Reads the first captions by what reads words of the shapes world alone, before anything is computed from them.

    Args:
        specs: {array of token ids: its tokenizer}.
        texts: {array of token ids: the text of the source that it is made of}, "caption" by default.
        source: the examples.

    Raises:
        DataError: the shapes world has no such caption; names the example.
    """
    rng, tokenizer = np.random.default_rng(0), DemandTokenizer()
    for name, spec in specs.items():
        if spec.kind != "demands" or spec.text or name in source.spec():
            continue
        text = texts.get(name, "caption")
        for index in range(min(len(source), _CAPTIONS_COMPARED)):
            try:
                caption = source.example(index, rng, (text,))[text]
            except UnreadableExampleError:  # counted in training
                continue
            try:
                tokenizer.encode([caption], spec.length)
            except DataError as error:
                raise DataError(f"{source.name(index)}: {error}") from error


def make_tokenizer(
    specs: Specs,
    config: DataConfig,
    source: Source,
    path: epath.PathLike,
    init_from: epath.PathLike = "",
    has_weights: bool = False,
) -> OwnTokenizer | None:
    """The `tokenizer.json` of a run: the one that it has, or a new one; None if it needs none. Writes nothing.

    A new one is that of the run that the specs name, since a text encoder keeps its tokenizer; else that of
    `init_from`, if that run has one; else the one that `config.tokenizer` says, by default trained on the texts of the
    source.

    One that was made of something else than the config says now is refused where weights were trained with it, and
    made anew where none were. Captions that changed in their place are announced: every text has ids.

    Args:
        specs: {array of token ids: its tokenizer}.
        config: the data config.
        source: the training examples.
        path: the file.
        init_from: the earlier run that this one starts from.
        has_weights: the run has checkpoints.

    Raises:
        DataError: the specs name several runs, or one that has no tokenizer; the source has no such text; the
            tokenizer has more ids than the text encoder; or the run's own one was made of something else, or altered.
    """
    own = _trained(specs)
    path = epath.Path(path)
    if not own:
        return None
    file = _file(own, config, init_from)
    texts = tuple(dict.fromkeys(config.texts.get(name, "caption") for name, spec in own.items() if not spec.like))
    if path.exists():
        tokenizer, kept = _read(path)
        if kept.source is None:
            _check_room(own, tokenizer)
            return kept
        if _may_stay(kept.source, file, config, source, texts, path, has_weights):
            _check_room(own, tokenizer)
            return kept
    if file and not file.exists():
        raise DataError(
            f"{str(file)!r} is not a readable tokenizer.json: there is no such file. A run that starts from another "
            "has its tokenizer: name a trained run that reads texts, or by data.tokenizer a file"
        )
    tokenizer = Tokenizer.load(file) if file else build_tokenizer(config, source, texts)
    _check_room(own, tokenizer)
    made = OwnTokenizer(tokenizer.text(), _source(file, config, source, texts), kept=False)
    was = path.parent / SOURCE_FILE
    if has_weights and not path.exists() and was.exists() and _parsed(was)["tokenizer"] != _digest(made.text):
        raise DataError(
            f"{path} is gone, and the config makes another tokenizer than the one that the weights of this run know; "
            "restore the file, or start in a new workdir"
        )
    return made


def _file(own: Specs, config: DataConfig, init_from: epath.PathLike) -> epath.Path | None:
    """The `tokenizer.json` that a new one is a copy of; None if it is to be trained."""
    workdir = next(iter(own.values())).workdir
    earlier = epath.Path(init_from) / "tokenizer.json"
    if workdir:
        return epath.Path(workdir) / "tokenizer.json"
    if init_from and earlier.exists():
        return earlier
    return None if config.tokenizer == "train" else named_file(config)


def _source(file: epath.Path | None, config: DataConfig, source: Source, texts: tuple[str, ...]) -> dict[str, Any]:
    """What a tokenizer is made of, as JSON."""
    if file is not None:
        return {"file": str(file), "sha256": _digest(file.read_text()) if file.exists() else ""}
    fields = ("source", "path", "name", "train_split", "caption_feature", "class_names", "vocab_size")
    said = {f"data.{name}": getattr(config, name) for name in fields}
    if config.mixture:
        said["data.mixture"] = [dataclasses.asdict(domain) for domain in config.mixture]
    rendered = config.source in ("shapes", "shapes_changes")
    shapes = dataclasses.asdict(config.shapes) if rendered else {}
    made_of = {**said, **{f"data.shapes.{name}": value for name, value in shapes.items()}, "texts": texts}
    return json.loads(json.dumps({**made_of, "examples": len(source), "captions": _captions(source, texts)}))


def _captions(source: Source, texts: tuple[str, ...]) -> str:
    """A digest of texts of examples that are spread evenly over a source."""
    digest, declared = hashlib.sha256(), source.spec()
    texts = tuple(name for name in texts if name in declared)
    for n, index in enumerate(np.linspace(0, len(source) - 1, min(len(source), _CAPTIONS_COMPARED)).astype(np.int64)):
        example = source.example(int(index), np.random.default_rng((0, n)), texts)
        digest.update("".join(f"{len(example[name])} {example[name]}" for name in texts).encode(errors="replace"))
    return digest.hexdigest()[:32]


def _may_stay(
    was: Mapping[str, Any],
    file: epath.Path | None,
    config: DataConfig,
    source: Source,
    texts: tuple[str, ...],
    path: epath.Path,
    has_weights: bool,
) -> bool:
    """Whether a tokenizer that was made of `was` serves; False if it is to be made anew.

    Raises:
        DataError: it does not serve, and weights were trained with it.
    """
    if file is None and "file" in was and config.tokenizer == "train" and not epath.Path(was["file"]).exists():
        return True  # the run that it is from is gone, as it may be
    now = _source(file, config, source, texts)
    if "file" in was and "file" in now:
        if now["sha256"] in ("", was["sha256"]):
            return True
    elif "file" not in was and "file" not in now:
        if all(now[name] == was.get(name) for name in ("captions", "texts", "data.vocab_size")):
            return True
        if {name for name in now.keys() | was.keys() if now.get(name) != was.get(name)} <= {"captions", "examples"}:
            if has_weights:
                print(f"the captions have changed since {path} was made; it is kept: the weights know its ids")
            return has_weights
    changed = [
        f"{name} was {was.get(name)!r}, is now {now.get(name)!r}"
        for name in sorted(now.keys() | was.keys())
        if now.get(name) != was.get(name)
    ]
    what = "; ".join(changed)
    if has_weights:
        raise DataError(
            f"{path} was made of something else than the config says ({what}), and the weights of this run know its "
            "ids. Restore the config, or start in a new workdir (init_from=THIS_WORKDIR keeps weights and tokenizer)"
        )
    print(f"{path} is made anew ({what}); nothing was trained with the old one")
    return False


def _read(path: epath.PathLike) -> tuple[Tokenizer, OwnTokenizer]:
    """The tokenizer of a run, compared with its digest where that is on record."""
    path = epath.Path(path)
    tokenizer = Tokenizer.load(path)
    text, beside = path.read_text(), path.parent / SOURCE_FILE
    if not beside.exists():  # of an earlier version, or put there by hand
        return tokenizer, OwnTokenizer(text, None, kept=True)
    record = _parsed(beside)
    if record["tokenizer"] != _digest(text):
        raise DataError(
            f"{path} is not the tokenizer that {beside.name} describes: one of the two was altered. Restore it; a run "
            f"without checkpoints may have both deleted, and data.tokenizer=FILE gives it another"
        )
    return tokenizer, OwnTokenizer(text, record["source"], kept=True)


def _parsed(path: epath.Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
        return {"tokenizer": str(record["tokenizer"]), "source": dict(record["source"])}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is damaged ({error!r}): expected what `snapgen` wrote beside tokenizer.json. Restore it from a "
            "copy; or delete it, and tokenizer.json is taken as it is"
        ) from error


def _record(text: str, source: Mapping[str, Any] | None) -> str:
    return json.dumps({"tokenizer": _digest(text), "source": source}, indent=2) + "\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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
