"""The share of each bucket's batches: by its examples, or as the config says."""

import itertools
from collections import Counter
from collections.abc import Collection, Mapping

import numpy as np
import pytest

from snapgen_jax.config import from_json, load_config, to_json
from snapgen_jax.data.arrays import IMAGE, ArraySpec, Example
from snapgen_jax.data.config import DataConfig
from snapgen_jax.data.errors import DataError
from snapgen_jax.data.pipeline import Pipeline
from tests.data.conftest import specs


class _Greys:
    """Thirty portraits and ten landscapes."""

    held_out = True

    def __len__(self) -> int:
        return 40

    def spec(self) -> dict[str, ArraySpec]:
        return {"image": IMAGE}

    def example(self, index: int, rng: np.random.Generator, names: Collection[str] | None = None) -> Example:
        return {"image": np.full((*self.sizes()[index], 3), index, np.uint8)}

    def name(self, index: int) -> str:
        return f"grey {index}"

    def sizes(self) -> np.ndarray:
        return np.array([(12, 8)] * 30 + [(8, 12)] * 10)

    def buckets(self) -> None:
        return None


BUCKETS = {name: {"image": specs(2, *size)["image"]} for name, size in {"12x8": (12, 8), "8x12": (8, 12)}.items()}
EMPTY = {"8x80": {"image": specs(2, 8, 80)["image"]}}


def _counts(shares: Mapping[str, float], count: int = 40, buckets=BUCKETS, **options) -> Counter[str]:
    batches = Pipeline(DataConfig(bucket_shares=shares), buckets, source=_Greys(), **options).batches()
    return Counter(batch.bucket for batch in itertools.islice(batches, count))


def test_without_shares_batches_follow_the_examples() -> None:
    assert _counts({}) == {"12x8": 30, "8x12": 10}


def test_the_config_sets_the_share_of_batches() -> None:
    assert _counts({"12x8": 0.5, "8x12": 0.5}) == {"12x8": 20, "8x12": 20}
    assert _counts({"12x8": 1, "8x12": 4}) == {"12x8": 8, "8x12": 32}
    assert _counts({"12x8": 0, "8x12": 1}) == {"8x12": 40}


def test_a_bucket_without_examples_needs_no_share() -> None:
    assert _counts({"12x8": 1, "8x12": 1}, buckets=BUCKETS | EMPTY) == {"12x8": 20, "8x12": 20}


def test_validation_keeps_the_proportions_of_its_examples() -> None:
    assert _counts({"12x8": 1, "8x12": 4}, split="validation") == {"12x8": 30, "8x12": 10}


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"12x8": 1, "8x12": 1, "9x9": 1}, r"names 9x9; the buckets are 12x8, 8x12, 8x80"),
        ({"12x8": 1, "8x12": 1, "8x80": 1}, r"asks for 8x80, and no example has a shape near to it"),
        ({"12x8": 1}, r"leaves out 8x12; a share of 0 means never"),
        ({"12x8": 1, "8x12": -1}, r"must be numbers from 0 on"),
        ({"12x8": 0, "8x12": 0}, r"must be numbers from 0 on, one at least above 0"),
        ({"12x8": float("nan"), "8x12": 1}, r"must be numbers from 0 on"),
    ],
)
def test_shares_that_do_not_fit_the_buckets_are_refused(shares, message: str) -> None:
    with pytest.raises(DataError, match=r"data\.bucket_shares " + message):
        _counts(shares, buckets=BUCKETS | EMPTY)


def test_shares_are_set_in_a_config_and_kept_in_its_file() -> None:
    changes = ["data.bucket_shares.32x32=2", "data.texts.tokens=caption"]
    config = from_json(to_json(load_config("configs/shapes/quickstart.py:runlocal", changes)))
    assert config.data.bucket_shares.to_dict() == {"32x32": 2.0}
    assert config.data.texts.to_dict() == {"tokens": "caption"}
