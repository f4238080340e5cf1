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
    made = make_tokenizer(specs, config, source or build_source(config), path / "tokenizer.json", init_from)
    assert made is not None
    made.save(path / "tokenizer.json")
    return Tokenizer.load(path / "tokenizer.json")


def test_a_run_that_reads_no_text_needs_no_tokenizer(tmp_path) -> None:
    assert load_tokenizers({}, None) is None
    assert make_tokenizer({}, DIGITS, build_source(DIGITS), tmp_path / "tokenizer.json") is None


def test_published_tokenizers_are_read_and_none_is_made(tmp_path, published) -> None:
    assert make_tokenizer(published, DIGITS, build_source(DIGITS), tmp_path / "tokenizer.json") is None
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
    assert _made(tmp_path / "run", {"tokens": TRAINED}).vocab_size == 300, "a resumed run keeps its own"
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


def test_one_text_may_stand_in_place_of_every_caption(earlier) -> None:
    specs = {"tokens": TRAINED, "wish": dataclasses.replace(TRAINED, like="tokens", text="ab")}
    tokenizers = load_tokenizers(specs, earlier / "tokenizer.json")
    assert tokenizers is not None
    arrays = tokenizers.arrays(["ab", "ba"], {"tokens": 6, "wish": 6})
    np.testing.assert_array_equal(arrays["wish"], arrays["tokens"][[0, 0]])
    assert (arrays["tokens"][0] != arrays["tokens"][1]).any()


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


def _again(path, has_weights, specs=None, config=DIGITS, source=None, init_from=""):
    """What a later start finds: the run's own tokenizer if it is kept."""
    specs = specs or {"tokens": TRAINED}
    return make_tokenizer(
        specs, config, source or build_source(config), path / "tokenizer.json", init_from, has_weights
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vocab_size": 310}, "data.vocab_size was 300, is now 310"),
        ({"source": "shapes"}, "data.source was 'digits', is now 'shapes'"),
        ({"tokenizer": "FILE"}, "file was None, is now"),
    ],
)
def test_a_tokenizer_that_weights_know_is_not_used_for_what_it_was_not_made_of(
    tmp_path, earlier, changes, says, capsys
) -> None:
    _made(tmp_path / "run", {"tokens": TRAINED})
    if "tokenizer" in changes:
        changes = {"tokenizer": str(earlier / "tokenizer.json")}
    config = dataclasses.replace(DIGITS, **changes)
    with pytest.raises(DataError, match=says):
        _again(tmp_path / "run", True, config=config)
    new = _again(tmp_path / "run", False, config=config)
    assert new is not None and not new.kept and says in capsys.readouterr().out, "where nothing was trained, made anew"


def test_other_captions_are_announced_where_they_lay_and_refused_elsewhere(tmp_path, capsys) -> None:
    config = DataConfig(source="folder", path="a", vocab_size=280)
    specs, dots = {"tokens": TRAINED}, MovingDots(words="one two")
    made = _made(tmp_path, specs, config, dots)
    moved = dataclasses.replace(config, path="b")
    kept = _again(tmp_path, True, specs, moved, dots)
    assert kept is not None and kept.kept and not capsys.readouterr().out, "the same captions elsewhere are the same"
    kept = _again(tmp_path, True, specs, config, MovingDots(words="three four"))
    assert kept is not None and kept.kept and "the captions have changed since" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"data\.path was 'a', is now 'b'"):
        _again(tmp_path, True, specs, moved, MovingDots(words="three four"))
    assert Tokenizer.load(tmp_path / "tokenizer.json").text() == made.text()


def test_the_tokenizer_of_another_run_is_compared_as_long_as_that_run_is_there(tmp_path, earlier) -> None:
    run, named = tmp_path / "run", str(earlier)
    _made(run, {"tokens": TRAINED}, init_from=named)
    kept = _again(run, True, init_from=named)
    assert kept is not None and kept.kept
    train(["b b b b"], 260).save(earlier / "tokenizer.json")
    with pytest.raises(DataError, match="sha256 was"):
        _again(run, True, init_from=named)
    (earlier / "tokenizer.json").unlink()
    kept = _again(run, True, init_from=named)
    assert kept is not None and kept.kept, "it may be deleted"


def test_an_altered_or_lost_tokenizer_is_noticed(tmp_path) -> None:
    path = tmp_path / "tokenizer.json"
    _made(tmp_path, {"tokens": TRAINED})
    text = path.read_text()
    train(["other words"], 280).save(path)
    for read in (lambda: _again(tmp_path, True), lambda: load_tokenizers({"tokens": TRAINED}, path)):
        with pytest.raises(DataError, match=r"is not the tokenizer that tokenizer_source\.json describes"):
            read()
    path.unlink()
    again = _again(tmp_path, True)
    assert again is not None and not again.kept and again.text == text, "the same is made of the same"
    with pytest.raises(DataError, match="is gone, and the config makes another"):
        _again(tmp_path, True, config=dataclasses.replace(DIGITS, vocab_size=310))
    path.write_text(text)
    (tmp_path / "tokenizer_source.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        _again(tmp_path, True)
    (tmp_path / "tokenizer_source.json").unlink()
    kept = _again(tmp_path, True)
    assert kept is not None and kept.kept, "one of an earlier version is taken as it is"


def test_ids_beyond_the_embedding_are_refused_though_they_are_few(tmp_path) -> None:
    made = train(["a"], 259)
    text = made.text().replace('": 258', '": 5000')
    assert text != made.text()
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match="the tokenizer has 5001 ids and the text encoder takes 4096"):
        load_tokenizers({"tokens": TRAINED}, tmp_path / "tokenizer.json")
