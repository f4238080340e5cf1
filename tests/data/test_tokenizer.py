"""The tokenizer is deterministic, knows every text, and frames and pads as the text encoders expect."""

import numpy as np
import pytest

from snapgen_jax.data.config import DataConfig
from snapgen_jax.data.errors import DataError
from snapgen_jax.data.sources import build_source
from snapgen_jax.data.tokenizer import BOS_ID, EOS_ID, PAD_ID, Tokenizer, build_tokenizer, train, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    config = DataConfig()
    return train_tokenizer(build_source(config), config, sample=2000)


def test_every_caption_word_of_the_shapes_world_becomes_one_token(tokenizer: Tokenizer) -> None:
    tokens, mask = tokenizer.encode(["a photo of two red circles left of a blue square"], 16)
    assert tokens.dtype == np.int32 and mask.dtype == np.float32
    assert mask[0].sum() == 11 + 2
    assert tokens[0, 0] == BOS_ID and tokens[0, 12] == EOS_ID and (tokens[0, 13:] == PAD_ID).all()


def test_no_training_caption_of_the_shapes_world_is_longer_than_sixteen_tokens(tokenizer: Tokenizer) -> None:
    source = build_source(DataConfig())
    captions = [source.example(i, np.random.default_rng(i), ("caption",))["caption"] for i in range(3000)]
    _, mask = tokenizer.encode(captions, 40)
    assert mask.sum(axis=1).max() <= 16


def test_training_twice_gives_the_same_tokenizer(tokenizer: Tokenizer, tmp_path) -> None:
    config = DataConfig()
    train_tokenizer(build_source(config), config, sample=2000).save(tmp_path / "again.json")
    tokenizer.save(tmp_path / "once.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "once.json").read_bytes()


def test_any_text_survives_a_round_trip_but_for_its_case(tokenizer: Tokenizer) -> None:
    for text in ("A Red circle", "naïve café, 東京 🚀", "tabs\tand  two spaces"):
        tokens, _ = tokenizer.encode([text], 128)
        assert tokenizer.decode(tokens[0]) == text.lower()


def test_the_empty_prompt_is_bos_and_eos(tokenizer: Tokenizer) -> None:
    tokens, mask = tokenizer.encode([""], 4)
    assert tokens.tolist() == [[BOS_ID, EOS_ID, PAD_ID, PAD_ID]]
    assert mask.tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_a_caption_that_spells_a_special_token_does_not_become_one(tokenizer: Tokenizer) -> None:
    tokens, mask = tokenizer.encode(["a <eos> star <pad>"], 64)
    inside = tokens[0, 1 : int(mask[0].sum()) - 1]
    assert not np.isin(inside, [PAD_ID, BOS_ID, EOS_ID]).any()


def test_half_a_character_is_named_and_nul_is_a_byte(tokenizer: Tokenizer) -> None:
    with pytest.raises(
        DataError, match=r"the caption or prompt 'a \\udcff ring' is no text at '\\udcff': it was not UTF-8"
    ):
        tokenizer.encode(["a ring", "a \udcff ring"], 16)
    tokens, _ = tokenizer.encode(["a\0b"], 16)
    assert tokenizer.decode(tokens[0]) == "a\0b"


def test_a_long_caption_is_cut_keeps_its_eos_and_warns_once(tokenizer: Tokenizer, tmp_path, caplog) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    fresh = Tokenizer.load(tmp_path / "tokenizer.json")
    for _ in range(2):
        tokens, mask = fresh.encode(["a red star " * 20], 8)
    assert tokens[0, -1] == EOS_ID and mask.all()
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_saved_tokenizer_loads_to_the_same_ids(tokenizer: Tokenizer, tmp_path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = build_tokenizer(DataConfig(tokenizer=str(path)), build_source(DataConfig()))
    assert loaded.vocab_size == tokenizer.vocab_size
    np.testing.assert_array_equal(
        loaded.encode(["three blue rings"], 9)[0], tokenizer.encode(["three blue rings"], 9)[0]
    )


def test_the_vocabulary_respects_its_bound() -> None:
    captions = [f"word{i} word{i}" for i in range(500)]
    assert train(captions, 300).vocab_size == 300


def test_wrong_tokenizer_files_and_sizes_are_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="vocab_size 100 is below 259"):
        train(["a"], 100)
    with pytest.raises(DataError, match=r"missing\.json"):
        Tokenizer.load(tmp_path / "missing.json")
    (tmp_path / "other.json").write_text('{"model": {"type": "BPE", "vocab": {}, "merges": []}}')
    with pytest.raises(DataError, match="ids 0, 1, 2"):
        Tokenizer.load(tmp_path / "other.json")
