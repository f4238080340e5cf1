"""Published tokenizers, read from a folder, give the ids that the reference pipelines give."""

import json
import logging

import numpy as np
import pytest
from transformers import AutoTokenizer

from snapgen_jax.data.errors import DataError
from snapgen_jax.data.pretrained_tokenizers import PretrainedTokenizer
from tests.tiny_tokenizers import write_clip, write_gemma, write_t5

PROMPTS = ["A photo of a  RED circle", "", "two blue squares left of a green star, above a ring"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "clip_l": write_clip(root / "tokenizer"),
        "clip_g": write_clip(root / "tokenizer_2", pad_token="!"),
        "t5": write_t5(root / "tokenizer_3"),
        "gemma": write_gemma(root / "gemma"),
    }


@pytest.mark.parametrize("name", ["clip_l", "t5", "gemma"])
def test_half_a_character_is_named(folders, name):
    tokenizer = PretrainedTokenizer.load(folders[name])
    with pytest.raises(DataError, match=r"'a \\ud83d ring' is no text at '\\ud83d'"):
        tokenizer.encode(["a ring", "a \ud83d ring"], 16)
    assert tokenizer.encode(["a\0b"], 16)[0].shape == (1, 16)


@pytest.mark.parametrize("name", ["clip_l", "clip_g", "t5", "gemma"])
def test_ids_are_those_of_the_reference_call(folders, name):
    tokenizer = PretrainedTokenizer.load(folders[name])
    reference = AutoTokenizer.from_pretrained(folders[name], padding_side="right")
    for length in (8, 77):
        tokens, mask = tokenizer.encode(PROMPTS, length)
        expected = reference(PROMPTS, padding="max_length", max_length=length, truncation=True, return_tensors="np")
        assert tokens.dtype == np.int32
        assert mask.dtype == np.float32
        assert tokens.shape == mask.shape == (3, length)
        np.testing.assert_array_equal(tokens, expected["input_ids"])
        np.testing.assert_array_equal(mask, expected["attention_mask"])


def test_special_tokens_and_padding_are_those_of_each_encoder(folders):
    def encode(name, length=6):
        tokenizer = PretrainedTokenizer.load(folders[name])
        tokens, mask = tokenizer.encode([""], length)
        return tokenizer, tokens[0].tolist(), mask[0].tolist()

    tokenizer, tokens, mask = encode("clip_l")
    begin, end = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
    assert (tokens, mask) == ([begin, end, end, end, end, end], [1, 1, 0, 0, 0, 0])
    _, tokens, mask = encode("clip_g")
    assert (tokens, mask) == ([begin, end, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0])
    _, tokens, mask = encode("t5")
    assert (tokens, mask) == ([1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0])
    tokenizer, tokens, mask = encode("gemma")  # whose folder pads on the left
    assert (tokens, mask) == ([2, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0])
    assert tokenizer.pad_id == 0


def test_a_text_that_is_too_long_keeps_its_end_token_and_the_lost_part_is_named(folders, caplog):
    tokenizer = PretrainedTokenizer.load(folders["clip_l"])
    with caplog.at_level(logging.WARNING):
        tokens, mask = tokenizer.encode(["a red circle above a cross"], 5)
        assert tokens[0, -1] == tokenizer.vocab_size - 1
        assert mask.all()
        assert len(caplog.records) == 1
        assert "this part is lost: 'above a cross" in caplog.text
        tokenizer.encode(["a red circle"], 5)
        assert len(caplog.records) == 1  # it fits exactly
        tokenizer.encode(["a red circle above a cross"] * 20, 5)
    assert len(caplog.records) == 10
    assert "further ones are cut in silence" in caplog.records[-1].getMessage()


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match="is not a folder"):
        PretrainedTokenizer.load(tmp_path / "absent")
    with pytest.raises(DataError, match="holds no readable tokenizer"):
        PretrainedTokenizer.load(tmp_path)


def test_code_in_a_folder_is_never_run(tmp_path):
    folder = write_clip(tmp_path / "tokenizer")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(DataError, match="holds no readable tokenizer"):
        PretrainedTokenizer.load(folder)
    assert not (tmp_path / "ran").exists()
