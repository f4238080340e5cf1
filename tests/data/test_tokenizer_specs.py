"""A run says which tokenizers it needs: its own file is made once, and published ones are read from their folders."""

import dataclasses
import pathlib

import numpy as np
import pytest

from snapgen_jax.data.config import DataConfig
from snapgen_jax.data.errors import DataError
from snapgen_jax.data.pretrained_tokenizers import PretrainedTokenizer
from snapgen_jax.data.sources import build_source
from snapgen_jax.data.tokenizer import Tokenizer, train
from snapgen_jax.data.tokenizer_specs import load_tokenizers, make_tokenizer
from snapgen_jax.inputs.interfaces import TokenizerSpec
from tests.data.moving_dots import MovingDots
from tests.tiny_tokenizers import write_clip, write_t5

TRAINED = TokenizerSpec("trained", 16, 4096)
DIGITS = DataConfig(source="digits", vocab_size=300)


@pytest.fixture
def published(tmp_path: pathlib.Path) -> dict[str, TokenizerSpec]:
    folders = {"clip": write_clip(tmp_path / "clip"), "t5": write_t5(tmp_path / "t5")}
    return {name: TokenizerSpec("pretrained", 9, 50_000, folder=str(folder)) for name, folder in folders.items()}


@pytest.fixture
def earlier(tmp_path: pathlib.Path) -> pathlib.Path:
    """A run with a tokenizer of 259 ids."""
    (tmp_path / "earlier").mkdir()
    train(["a"], 259).save(tmp_path / "earlier" / "tokenizer.json")
    return tmp_path / "earlier"


def _made(path: pathlib.Path, specs, config=DIGITS, source=None, init_from="") -> Tokenizer:
    make_tokenizer(specs, config, source or build_source(config), path / "tokenizer.json", init_from)
    return Tokenizer.load(path / "tokenizer.json")


def test_a_run_that_reads_no_text_needs_no_tokenizer(tmp_path) -> None:
    assert load_tokenizers({}, None) is None
    make_tokenizer({}, DIGITS, build_source(DIGITS), tmp_path / "tokenizer.json")
    assert not (tmp_path / "tokenizer.json").exists()


def test_published_tokenizers_are_read_and_none_is_made(tmp_path, published) -> None:
    make_tokenizer(published, DIGITS, build_source(DIGITS), tmp_path / "tokenizer.json")
    assert not (tmp_path / "tokenizer.json").exists()
    tokenizers = load_tokenizers(published, None)
    assert tokenizers is not None and set(tokenizers.names) == {"clip", "clip_mask", "t5", "t5_mask"}
    arrays = tokenizers.arrays(["a red circle"], {"clip": 9, "t5": 7, "t5_mask": 7})
    assert {name: array.shape for name, array in arrays.items()} == {"clip": (1, 9), "t5": (1, 7), "t5_mask": (1, 7)}
    reference, _ = PretrainedTokenizer.load(published["t5"].folder).encode(["a red circle"], 7)
    np.testing.assert_array_equal(arrays["t5"], reference)


def test_a_new_tokenizer_is_trained_on_the_captions_of_the_source_and_kept(tmp_path) -> None:
    made = _made(tmp_path / "run", {"tokens": TRAINED})
    assert made.vocab_size == 300
    assert made.encode(["zero zero"], 20)[1].sum() < 2 + len("zero zero"), (
        "words of the source have tokens of their own"
    )
    assert _made(tmp_path / "run", {"tokens": TRAINED}, DataConfig()).vocab_size == 300, "a resumed run keeps its own"
    loaded = load_tokenizers({"tokens": TRAINED}, tmp_path / "run" / "tokenizer.json")
    assert isinstance(loaded, Tokenizer) and loaded.decode(made.encode(["a five"], 8)[0][0]) == "a five"


def test_it_is_trained_on_the_text_that_the_config_names(tmp_path) -> None:
    config = DataConfig(vocab_size=280, texts={"tokens": "instruction"})
    made = _made(tmp_path, {"tokens": TRAINED}, config, MovingDots(words="zzzz zzzz zzzz"))
    _, mask = made.encode(["move the dot", "zzzz"], 20)
    assert mask.sum(axis=1).tolist() == [2 + 3, 2 + 5]
    with pytest.raises(DataError, match="trained on the text 'title', and the source has image"):
        config = dataclasses.replace(config, texts={"tokens": "title"})
        _made(tmp_path / "other", {"tokens": TRAINED}, config, MovingDots())


def test_a_text_encoder_keeps_the_tokenizer_of_its_run(tmp_path, earlier) -> None:
    spec = dataclasses.replace(TRAINED, workdir=str(earlier))
    assert _made(tmp_path / "a", {"tokens": spec}).vocab_size == 259
    assert _made(tmp_path / "b", {"tokens": TRAINED}, init_from=str(earlier)).vocab_size == 259
    other = tmp_path / "other"
    other.mkdir()
    assert _made(tmp_path / "c", {"tokens": TRAINED}, init_from=str(other)).vocab_size == 300, "that run read no text"
    assert _made(tmp_path / "d", {"tokens": spec}, init_from=str(other)).vocab_size == 259
    with pytest.raises(DataError, match=r"other/tokenizer\.json' is not a readable tokenizer\.json"):
        _made(tmp_path / "e", {"tokens": dataclasses.replace(TRAINED, workdir=str(other))})
    assert not (tmp_path / "e").exists()


def test_a_trained_and_a_published_tokenizer_serve_one_run(tmp_path, published, earlier) -> None:
    specs = {"tokens": TRAINED, "t5": published["t5"], "teacher": TRAINED}
    tokenizers = load_tokenizers(specs, earlier / "tokenizer.json")
    assert tokenizers is not None
    assert tokenizers.names == ("tokens", "mask", "t5", "t5_mask", "teacher", "teacher_mask")
    arrays = tokenizers.arrays(["ab"], {"tokens": 6, "mask": 6, "t5": 5, "teacher": 9})
    own, mask = Tokenizer.load(earlier / "tokenizer.json").encode(["ab"], 9)
    np.testing.assert_array_equal(arrays["teacher"], own)
    np.testing.assert_array_equal(arrays["mask"], mask[:, :6])
    assert arrays["t5"].shape == (1, 5)


def test_specs_that_no_tokenizer_fits_are_refused(tmp_path, published, earlier) -> None:
    small = dataclasses.replace(TRAINED, vocab_size=258)
    says = "the tokenizer has 259 ids and the text encoder takes 258; set data.vocab_size to at most text.vocab_size"
    with pytest.raises(DataError, match=says):
        load_tokenizers({"tokens": small}, earlier / "tokenizer.json")
    with pytest.raises(DataError, match=says):
        _made(tmp_path / "new", {"tokens": dataclasses.replace(small, workdir=str(earlier))})
    assert not (tmp_path / "new").exists(), "a tokenizer that does not fit is not kept"
    with pytest.raises(DataError, match=r"takes 10; set inputs\.t5_tokenizer to its own"):
        load_tokenizers({"t5": dataclasses.replace(published["t5"], vocab_size=10)}, None)
    with pytest.raises(DataError, match=r"tokens needs the tokenizer\.json of a run"):
        load_tokenizers({"tokens": TRAINED}, None)
    with pytest.raises(
        DataError, match=r"one tokenizer\.json, and 2 are asked for: a new one for tokens and x for teacher"
    ):
        load_tokenizers({"tokens": TRAINED, "teacher": dataclasses.replace(TRAINED, workdir="x")}, earlier / "t.json")
