"""An example is named arrays and texts: batches hold those that the specs name, as the source declares them."""

import dataclasses
import itertools
import logging

import jax
import numpy as np
import pytest

from snapgen_jax.data.config import DataConfig
from snapgen_jax.data.errors import DataError
from snapgen_jax.data.pipeline import Batch, Pipeline
from snapgen_jax.data.pretrained_tokenizers import PretrainedTokenizers
from snapgen_jax.data.tokenizer import Tokenizer, train
from snapgen_jax.data.words import speaks_of_sides
from tests.data.conftest import specs
from tests.data.moving_dots import MovingDots, batch_specs

RANDOM = DataConfig(crop="random", flip="random", max_unreadable_share=0.9)
B = 8
SPECS = batch_specs(B)
STATE = {"state": jax.ShapeDtypeStruct((B, 5), np.float16)}


@pytest.fixture(scope="module")
def letters() -> Tokenizer:
    return train(["a"], 259)


def _take(source: MovingDots, wanted, count: int = 6, config: DataConfig = RANDOM, tokenizer=None) -> list[Batch]:
    batches = Pipeline(config, {"a": wanted}, tokenizer, source=source).batches()
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def _centre(mask: np.ndarray) -> np.ndarray | None:
    """(x, y) of the middle of what is set in `[h, w]`, from -1 to 1; None where it touches the edge or nothing is."""
    rows, columns = np.nonzero(mask)
    if not len(rows) or {0, mask.shape[0] - 1} & {*rows, *columns}:
        return None
    return np.array([2 * (columns.mean() + 0.5) / mask.shape[1] - 1, 2 * (rows.mean() + 0.5) / mask.shape[0] - 1])


def _mirrored(source: MovingDots, batch: Batch) -> np.ndarray:
    """Which examples of a batch were mirrored, as their directions say."""
    drawn = [source.example(int(i), np.random.default_rng(0))["direction"][0] for i in batch.source_index]
    return np.sign(batch.arrays["direction"][:, 0]) != np.sign(drawn)


def test_everything_in_an_example_shares_one_crop_and_one_flip() -> None:
    source = MovingDots()
    compared = 0
    for batch in _take(source, SPECS):
        assert {n: (a.shape, a.dtype) for n, a in batch.arrays.items()} == {
            n: (s.shape, s.dtype) for n, s in SPECS.items()
        }
        np.testing.assert_array_equal(batch.arrays["number"], batch.source_index)
        np.testing.assert_array_equal(batch.arrays["clip"][:, 0], batch.arrays["image"])
        for row in range(B):
            arrays = {name: array[row] for name, array in batch.arrays.items()}
            centre = _centre(arrays["image"][..., 0] > 127)
            if centre is None:
                continue
            compared += 1
            pixel = 2 / 12
            maps = arrays["depth"][..., 0] > 500, arrays["classes"][..., 0] > 0, arrays["flow"][..., 1] > 0.5
            for other in (*map(_centre, maps), arrays["place"][0]):
                assert other is None or np.abs(other - centre).max() < pixel
            step = np.sign(arrays["direction"][0])
            assert (np.sign(arrays["flow"][..., 0]) * step >= 0).all() and arrays["flow"][..., 0].any()
            later = _centre(arrays["clip"][2, ..., 0] > 127)
            assert later is None or np.sign(later[0] - centre[0]) == step, "the clip moves where its direction says"
    assert compared > 20
    shares = np.concatenate([_mirrored(source, batch) for batch in _take(source, SPECS)])
    assert 0.2 < shares.mean() < 0.8


def test_labels_stay_labels_and_depth_is_averaged() -> None:
    batches = _take(MovingDots(depth_size=(48, 96)), {name: SPECS[name] for name in ("depth", "classes")})
    values = {
        name: np.unique(np.concatenate([batch.arrays[name] for batch in batches])) for name in ("depth", "classes")
    }
    assert values["classes"].tolist() == [0, 70_001]
    assert {0, 1000.5} < set(values["depth"].tolist())


def test_an_entry_does_not_depend_on_what_else_is_asked_for() -> None:
    for name in ("image", "place"):
        alone = {"image": SPECS["image"], name: SPECS[name]}
        for batch, one in zip(_take(MovingDots(), SPECS, 2), _take(MovingDots(), alone, 2), strict=True):
            np.testing.assert_array_equal(batch.arrays[name], one.arrays[name])


def test_one_entry_that_cannot_be_mirrored_turns_flips_off_and_it_is_said(caplog) -> None:
    source = MovingDots()
    with caplog.at_level(logging.WARNING):
        batches = _take(source, SPECS | STATE)
    assert not np.concatenate([_mirrored(source, batch) for batch in batches]).any()
    assert [record.getMessage() for record in caplog.records] == [
        "data.flip is off: the source does not say how state is mirrored"
    ]
    assert (batches[0].arrays["state"] == batches[0].source_index[:, None]).all()


@pytest.mark.parametrize("words", ["a dot LEFT of a ring", "the rightmost dot", "a left-hand drive"])
def test_an_example_whose_caption_speaks_of_sides_is_cropped_as_ever_and_never_flipped(words, letters, caplog) -> None:
    text = {name: specs(B, length=40)[name] for name in ("tokens", "mask")}
    plain, spoken = MovingDots(), MovingDots(words=words)
    batches, unread = _take(spoken, SPECS | text, tokenizer=letters), _take(spoken, SPECS, tokenizer=letters)
    assert not np.concatenate([_mirrored(spoken, batch) for batch in batches]).any()
    assert [r.getMessage() for r in caplog.records] == [
        "data.flip leaves examples as they are whose caption says left or right"
    ]
    flipped = np.concatenate([_mirrored(spoken, batch) for batch in unread])
    assert flipped.any(), "a caption that the batch does not hold forbids nothing"
    for batch, other in zip(batches, _take(plain, SPECS | text, tokenizer=letters), strict=True):
        same = ~_mirrored(plain, other)
        np.testing.assert_array_equal(batch.arrays["clip"][same], other.arrays["clip"][same])
        assert (batch.arrays["tokens"] != other.arrays["tokens"]).any()


def test_words_that_only_contain_left_and_right_are_no_sides() -> None:
    assert not any(map(speaks_of_sides, ("leftover rice", "bright light", "an upright cleft", "")))
    assert all(
        map(speaks_of_sides, ("Left", "to the right.", "left/up", "moving rightwards", "his right-handed swing"))
    )


def test_each_array_of_tokens_is_made_of_the_text_that_the_config_names(letters) -> None:
    both = PretrainedTokenizers({"tokens": letters, "edit": letters})
    wanted = {"tokens": specs(B, length=40)["tokens"], "edit": specs(B, length=40)["tokens"]}
    wanted["edit_mask"] = specs(B, length=40)["mask"]
    config = dataclasses.replace(RANDOM, texts={"edit": "instruction"})
    (batch,) = _take(MovingDots(), wanted, 1, config, both)
    said = [[letters.decode(row) for row in batch.arrays[name]] for name in ("tokens", "edit")]
    assert said == [["a dot"] * B, [f"move the dot {i}" for i in batch.source_index]]


# --- refused when the pipeline is built ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "message"),
    [
        (
            "pose",
            (3,),
            "float32",
            r"pose; the source has image \(uint8 \[\*, \*, 3\]\), .*instruction \(text\), and there is no",
        ),
        ("depth", (24, 24, 1), "uint16", "asks for depth as uint16, and the source has float32"),
        ("depth", (24, 24, 3), "float32", r"depth as float32 \[24, 24, 3\], and the source has float32 \[\*, \*, 1\]"),
        ("clip", (4, 24, 24, 3), "uint8", r"clip as uint8 \[4, 24, 24, 3\], and the source has uint8 \[3, \*, \*, 3\]"),
        ("clip", (24, 24, 3), "uint8", r"clip as uint8 \[24, 24, 3\], and the source has uint8 \[3, \*, \*, 3\]"),
        ("state", (6,), "float16", r"asks for state as float16 \[6\], and the source has float16 \[5\]"),
        ("caption", (), "int32", "asks for caption, which is a text of the source; name the array of its token ids"),
        ("depth", (12, 24, 1), "float32", "image is 24x24 and depth 12x24; the images of an example share one crop"),
    ],
)
def test_what_the_source_does_not_have_is_refused(name, shape, dtype, message: str) -> None:
    wanted = {"image": SPECS["image"], name: jax.ShapeDtypeStruct((B, *shape), dtype)}
    with pytest.raises(DataError, match=message):
        Pipeline(RANDOM, {"a": wanted}, source=MovingDots())


def test_texts_that_are_not_there_and_tokens_of_another_type_are_refused(letters) -> None:
    wanted = {"tokens": specs(B)["tokens"]}

    def build(texts, spec=wanted) -> None:
        Pipeline(dataclasses.replace(RANDOM, texts=texts), {"a": spec}, letters, source=MovingDots())

    with pytest.raises(DataError, match=r"tokens is made of the text 'title', and the source has .*; set data\.texts"):
        build({"tokens": "title"})
    with pytest.raises(DataError, match=r"data\.texts names token; the arrays of token ids are tokens"):
        build({"token": "caption"})
    with pytest.raises(DataError, match="asks for tokens as int64, and the tokenizer gives int32"):
        build({}, {"tokens": jax.ShapeDtypeStruct((B, 12), np.int64)})
    with pytest.raises(DataError, match=r"tokens is of the shape \(8,\), and token ids are \[B, L\]"):
        build({}, {"tokens": jax.ShapeDtypeStruct((B,), np.int32)})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"depth": np.zeros((24, 48, 1))}, r"depth is float64 \[24, 48, 1\], and its source declares float32"),
        ({"depth": None}, r"depth is nothing, and its source declares float32 \[\*, \*, 1\]"),
        ({"depth": np.zeros((48, 48, 1), np.float32)}, "images of one example must show the same view"),
        ({"number": "three"}, r"number is str, and its source declares int32 \[\]"),
    ],
)
def test_an_example_that_is_not_what_its_source_declares_is_unreadable(spoil, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _take(MovingDots(spoil=spoil), SPECS, 1)
