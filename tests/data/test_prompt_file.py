"""Prompts without images: a line is an example, and a batch of them has token ids alone."""

import jax
import numpy as np
import pytest

from snapgen_jax.data.config import DataConfig
from snapgen_jax.data.errors import DataError
from snapgen_jax.data.pipeline import Pipeline
from snapgen_jax.data.sources import build_source
from snapgen_jax.data.tokenizer import train
from snapgen_jax.data.tokenizer_specs import check_texts
from snapgen_jax.inputs.interfaces import TokenizerSpec

LINES = [
    f"{count} {colour} foxes" for count in ("two", "three") for colour in ("red", "blue", "green", "grey", "black")
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(LINES) + "\n  \n", encoding="utf-8")
    return path


def source(file, split="train", **changes):
    return build_source(DataConfig(source="prompts", path=str(file), **changes), split)


def texts(found):
    return [found.example(i, np.random.default_rng(0))["caption"] for i in range(len(found))]


def test_the_splits_share_out_the_lines(file):
    held, rest = (source(file, split, validation_share=0.3) for split in ("validation", "train"))
    assert sorted(texts(held) + texts(rest)) == sorted(LINES) and len(held) == 3 and held.held_out
    assert rest.name(0) == f"{file}, line {1 + 2 * LINES.index(texts(rest)[0])}"
    assert not source(file, "validation", validation_share=0.0).held_out


def test_a_file_of_its_own_serves_for_validation(file, tmp_path):
    other = tmp_path / "validation.txt"
    other.write_text("a moon")
    assert texts(source(file, "validation", validation_path=str(other))) == ["a moon"]
    assert texts(source(file, validation_path=str(other))) == LINES


def test_batches_of_prompts_hold_no_image(file):
    tokenizer = train(LINES, 300)
    specs = {"8x8": {"tokens": jax.ShapeDtypeStruct((4, 12), np.int32)}}
    batches = Pipeline(DataConfig(source="prompts", path=str(file)), specs, tokenizer, seed=0).batches(0)
    batch = next(batches)
    batches.close()
    assert batch.bucket == "8x8" and set(batch.arrays) == {"tokens"} and batch.arrays["tokens"].shape == (4, 12)
    assert {tokenizer.decode(row) for row in batch.arrays["tokens"]} <= set(LINES)


@pytest.mark.parametrize(
    ("text", "message"), [(None, "is no readable text file"), ("\n \n", "has no prompt; write one a line")]
)
def test_a_file_without_prompts_is_refused(tmp_path, text, message):
    path = tmp_path / "file.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message):
        source(path)
    with pytest.raises(DataError, match=r"needs data\.path, a text file"):
        source("")


def test_a_line_that_a_detector_cannot_read_is_named_before_training(tmp_path):
    path, specs = tmp_path / "prompts.txt", {"detection_tokens": TokenizerSpec("demands", 10, 9)}
    path.write_text("two stars\n\na red circle left of a blue square\n")
    check_texts(specs, {}, source(path, validation_share=0.0))
    path.write_text("two stars\n\na photograph of a horse\n")
    with pytest.raises(DataError, match=r"prompts\.txt, line 3: 'a photograph of a horse' is no caption whose demands"):
        check_texts(specs, {}, source(path, validation_share=0.0))
    wish = {"detection_tokens": TokenizerSpec("demands", 10, 9, text="a red circle")}
    check_texts(wish, {}, source(path, validation_share=0.0))
