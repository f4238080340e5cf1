"""The position is one integer: any batch can be reached again, on any number of hosts, by threads or by processes."""

import dataclasses
import itertools
import logging
import os
import pathlib
from collections.abc import Collection

import jax
import numpy as np
import pytest
from PIL import Image

from snapgen_jax.data.arrays import IMAGE, TEXT, ArraySpec, Example
from snapgen_jax.data.config import DataConfig
from snapgen_jax.data.errors import DataError, UnreadableExampleError
from snapgen_jax.data.pipeline import Batch, Pipeline
from snapgen_jax.data.sources import build_source
from snapgen_jax.data.tokenizer import Tokenizer, train, train_tokenizer
from tests.data.conftest import assert_equal_batches, specs
from tests.data.moving_dots import MovingDots, batch_specs

SHAPES = DataConfig()
DIGITS = DataConfig(source="digits", crop="random", flip="random")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(build_source(SHAPES), SHAPES, sample=500)


def _take(pipeline: Pipeline, count: int, position: int = 0) -> list[Batch]:
    batches = pipeline.batches(position)
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


class _Numbers:
    """`count` examples of 4x4, each filled with its own index plus a draw; those in `bad` are unreadable."""

    held_out = True

    def __init__(self, count: int, bad: tuple[int, ...] = (), sizes: list[tuple[int, int]] | None = None):
        self._count, self._bad, self._sizes = count, bad, sizes

    def __len__(self) -> int:
        return self._count

    def spec(self) -> dict[str, ArraySpec]:
        return {"image": IMAGE, "caption": TEXT}

    def example(self, index: int, rng: np.random.Generator, names: Collection[str] | None = None) -> Example:
        if index in self._bad:
            raise UnreadableExampleError("made so")
        caption = f"number {index} draw {rng.integers(1000)}"
        return {"image": np.full((4, 4, 3), index % 256, np.uint8), "caption": caption}

    def name(self, index: int) -> str:
        return f"file {index}"

    def sizes(self) -> np.ndarray | None:
        return None if self._sizes is None else np.array(self._sizes)

    def buckets(self) -> None:
        return None


def _numbers(count: int, batch: int, bad: tuple[int, ...] = (), share: float = 1.0, **options) -> Pipeline:
    config = DataConfig(max_unreadable_share=share)
    image = {"image": specs(batch, 4, 4)["image"]}
    return Pipeline(config, {"4x4": image}, source=_Numbers(count, bad), **options)


def test_a_batch_holds_what_the_specs_name(tokenizer: Tokenizer) -> None:
    (batch,) = _take(Pipeline(SHAPES, {"32x32": specs(8, 32, 32, 16)}, tokenizer), 1)
    assert batch.bucket == "32x32"
    shapes = {name: (array.shape, array.dtype.name) for name, array in batch.arrays.items()}
    assert shapes == {"image": ((8, 32, 32, 3), "uint8"), "tokens": ((8, 16), "int32"), "mask": ((8, 16), "float32")}
    assert batch.valid.all() and batch.source_index.dtype == np.int64


def test_images_and_captions_of_a_batch_belong_together(tokenizer: Tokenizer) -> None:
    pipeline = Pipeline(SHAPES, {"32x32": specs(4, 32, 32, 16)}, tokenizer, seed=5)
    batch = _take(pipeline, 1)[0]
    for row, index in enumerate(batch.source_index):
        example = pipeline.source.example(int(index), np.random.default_rng((5, 0, index)))
        np.testing.assert_array_equal(batch.arrays["image"][row], example["image"])
        assert tokenizer.decode(batch.arrays["tokens"][row]) == example["caption"]


@pytest.mark.parametrize("config", [SHAPES, DIGITS], ids=["shapes", "digits"])
@pytest.mark.parametrize("threads", [1, 3])
def test_restart_continues_bit_for_bit(config: DataConfig, threads: int, tokenizer: Tokenizer) -> None:
    config = dataclasses.replace(config, threads=threads, prefetch=4)
    batch = 8 if config.source == "shapes" else 256  # digits: past the end of an epoch
    whole = _take(Pipeline(config, {"16x16": specs(batch)}, tokenizer, seed=1), 9)
    for position in (1, 8):
        again = Pipeline(config, {"16x16": specs(batch)}, tokenizer, seed=1)
        assert_equal_batches(_take(again, 9 - position, position), whole[position:])


def test_worker_processes_give_the_same_batches_as_threads_from_any_position(
    photo_folder: pathlib.Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    (photo_folder / "2.jpg").write_bytes(b"no photograph")
    config = DataConfig(source="folder", path=str(photo_folder), flip="random", max_unreadable_share=0.5)
    in_threads = _take(Pipeline(config, {"16x16": specs(4)}, tokenizer), 8)
    caplog.clear()
    in_workers = _take(Pipeline(dataclasses.replace(config, workers=2), {"16x16": specs(4)}, tokenizer), 5, position=3)
    assert_equal_batches(in_workers, in_threads[3:])
    assert not np.concatenate([batch.valid for batch in in_workers]).all()
    assert "2.jpg" in caplog.text, "the main process names what a worker could not read"


def test_clips_points_and_single_numbers_pass_through_worker_processes() -> None:
    config = DataConfig(flip="random", workers=1)
    wanted = {"a": batch_specs(4) | {"state": jax.ShapeDtypeStruct((4, 5), np.float16)}}
    in_workers = _take(Pipeline(config, wanted, source=MovingDots()), 2)
    in_threads = _take(Pipeline(dataclasses.replace(config, workers=0), wanted, source=MovingDots()), 2)
    assert {array.ndim for array in in_workers[0].arrays.values()} == {1, 2, 3, 4, 5}
    assert_equal_batches(in_workers, in_threads)


def test_another_seed_gives_another_order_and_other_draws(tokenizer: Tokenizer) -> None:
    a, b = (_take(Pipeline(DIGITS, {"16x16": specs(16)}, tokenizer, seed=seed), 1)[0] for seed in (0, 1))
    assert set(a.source_index) != set(b.source_index)
    first, later = (_take(_numbers(3, 3, seed=0), 2)[epoch] for epoch in (0, 1))
    assert set(first.source_index) == set(later.source_index) == {0, 1, 2}


def test_draws_change_with_the_epoch() -> None:
    tokenizer = train([f"number {i} draw {i}" for i in range(1000)], 2000)
    pipeline = Pipeline(DataConfig(), {"a": specs(4, 4, 4)}, tokenizer, source=_Numbers(4))
    said = [{tokenizer.decode(row) for row in batch.arrays["tokens"]} for batch in _take(pipeline, 2)]
    assert not said[0] & said[1]


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_shares_of_all_hosts_are_the_batch_of_one(hosts: int, tokenizer: Tokenizer) -> None:
    def batches(index: int, count: int) -> list[Batch]:
        options = {"host_index": index, "host_count": count}
        return _take(Pipeline(DIGITS, {"16x16": specs(8)}, tokenizer, seed=2, **options), 6, position=221)

    shares = [batches(index, hosts) for index in range(hosts)]
    for step, one in enumerate(batches(0, 1)):
        for name, array in one.arrays.items():
            together = np.stack([share[step].arrays[name] for share in shares], axis=1)  # host is the faster index
            np.testing.assert_array_equal(together.reshape(array.shape), array)
        indices = np.stack([share[step].source_index for share in shares], axis=1).reshape(-1)
        np.testing.assert_array_equal(indices, one.source_index)


@pytest.mark.parametrize("hosts", [1, 2, 8])  # eight do not divide an epoch
def test_every_example_of_every_epoch_is_seen_once_also_after_a_restart_on_other_hosts(hosts: int) -> None:
    # 60 examples in batches of 8: epochs end inside batches. One host stops after 5 batches; `hosts` go on.
    stream = [batch.source_index for batch in _take(_numbers(60, 8, seed=3), 5)]
    shares = [_take(_numbers(60, 8, seed=3, host_index=i, host_count=hosts), 10, position=5) for i in range(hosts)]
    stream += [batch.source_index for step in zip(*shares, strict=True) for batch in step]
    drawn = np.concatenate(stream)
    assert drawn[60:].tolist() != drawn[:60].tolist(), "every epoch has its own order"
    counts = np.bincount(drawn, minlength=60)
    assert len(drawn) == 120 and (counts == 2).all()
    first_epoch = np.concatenate([batch.source_index for batch in _take(_numbers(60, 8, seed=3), 8)])[:60]
    assert sorted(first_epoch) == list(range(60))


def test_a_batch_larger_than_the_data_set_spans_epochs() -> None:
    (batch,) = _take(_numbers(3, 12), 1)
    assert np.bincount(batch.source_index).tolist() == [4, 4, 4]


# --- buckets ---------------------------------------------------------------------------------------------------------


def _two_buckets(**options) -> Pipeline:
    sizes = [(300, 200)] * 10 + [(100, 150)] * 20 + [(200, 320)] * 10  # 10 portraits, 30 landscapes
    buckets = {"48x32": specs(4, 48, 32), "32x48": specs(6, 32, 48)}
    image = {name: {"image": bucket["image"]} for name, bucket in buckets.items()}
    return Pipeline(DataConfig(), image, source=_Numbers(40, sizes=sizes), **options)


def test_images_go_to_the_bucket_of_their_shape_in_their_share() -> None:
    batches = _take(_two_buckets(), 24)
    for batch in batches:
        portrait = batch.bucket == "48x32"
        assert batch.arrays["image"].shape == ((4, 48, 32, 3) if portrait else (6, 32, 48, 3))
        assert ((batch.source_index < 10) == portrait).all()
    drawn = np.bincount(np.concatenate([batch.source_index for batch in batches]), minlength=40)
    assert drawn.max() - drawn.min() <= 2, "every image is drawn equally often"


def test_two_buckets_restart_bit_for_bit() -> None:
    whole = _take(_two_buckets(), 20)
    for position in (1, 6, 13):
        assert_equal_batches(_take(_two_buckets(), 20 - position, position), whole[position:])


def test_all_hosts_are_in_the_same_bucket_at_every_step_and_share_no_example() -> None:
    hosts = [_take(_two_buckets(host_index=i, host_count=2), 7) for i in range(2)]
    for a, b, one in zip(*hosts, _take(_two_buckets(), 7), strict=True):
        assert a.bucket == b.bucket == one.bucket
        assert sorted([*a.source_index, *b.source_index]) == sorted(one.source_index)


def test_a_bucket_that_no_image_fits_is_never_drawn_and_said(caplog) -> None:
    buckets = {name: {"image": specs(2, *size)["image"]} for name, size in {"wide": (8, 80), "square": (8, 8)}.items()}
    pipeline = Pipeline(DataConfig(), buckets, source=_Numbers(5, sizes=[(9, 9)] * 5))
    assert {batch.bucket for batch in _take(pipeline, 10)} == {"square"}
    assert "'wide'" in caplog.text


def test_photographs_fill_buckets_of_their_own_shape(photo_folder: pathlib.Path, photographs) -> None:
    config = DataConfig(source="folder", path=str(photo_folder))
    buckets = {"32x32": specs(2, 32, 32), "32x48": specs(4, 32, 48)}
    pipeline = Pipeline(config, buckets, train(photographs, 400), split="validation")
    landscape = {i for i in range(6) if pipeline.source.sizes()[i, 0] != pipeline.source.sizes()[i, 1]}
    batches = _take(pipeline, 9)
    assert {batch.bucket for batch in batches} == {"32x32", "32x48"}
    for batch in batches:
        assert batch.valid.all()
        assert (set(batch.source_index.tolist()) <= landscape) == (batch.bucket == "32x48")
        assert batch.arrays["image"].std() > 20, "pictures, not flat grey"


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_an_unreadable_example_is_replaced_by_the_next_good_one_flagged_and_named_once(caplog) -> None:
    with caplog.at_level(logging.WARNING):
        batches = _take(_numbers(10, 5, bad=(3, 4)), 4)
    for batch in batches:
        bad = np.isin(batch.source_index, (3, 4))
        np.testing.assert_array_equal(batch.valid, ~bad)
        np.testing.assert_array_equal(batch.arrays["image"][:, 0, 0, 0], np.where(bad, 5, batch.source_index))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and all("made so" in message for message in messages)
    assert all(any(name in message for message in messages) for name in ("file 3", "file 4"))


def test_past_the_allowed_share_the_run_stops_with_the_list() -> None:
    pipeline = _numbers(100, 10, bad=(20, 40), share=0.01)
    with pytest.raises(DataError, match=r"(?s)2 of the 100 examples drawn are unreadable, 2\.0%.*file \d0: made so"):
        _take(pipeline, 11)


def test_up_to_the_allowed_share_the_run_goes_on() -> None:
    assert len(_take(_numbers(100, 10, bad=(20,), share=0.01), 30)) == 30


def test_few_examples_are_not_judged_before_two_hundred_are_drawn() -> None:
    pipeline = _numbers(1000, 10, bad=tuple(range(0, 1000, 10)), share=0.01)
    batches = pipeline.batches()
    assert len(list(itertools.islice(batches, 19))) == 19
    with pytest.raises(DataError, match="of the 200 examples drawn"):
        next(batches)


def test_a_source_without_one_readable_example_stops_at_once() -> None:
    with pytest.raises(DataError, match="is unreadable"):
        _take(_numbers(5, 5, bad=(0, 1, 2, 3, 4)), 1)


def test_a_corrupt_photograph_stops_a_small_folder_and_is_named(photo_folder: pathlib.Path) -> None:
    broken = photo_folder / "2.jpg"
    broken.write_bytes(broken.read_bytes()[:2000])
    config = DataConfig(source="folder", path=str(photo_folder))
    with pytest.raises(DataError, match=r"(?s)1 of the 6 examples drawn are unreadable.*2\.jpg: OSError.*truncated"):
        _take(Pipeline(config, {"16x16": {"image": specs(3)["image"]}}), 3)


def test_a_file_that_vanished_is_unreadable_not_a_crash(photo_folder: pathlib.Path) -> None:
    config = DataConfig(source="folder", path=str(photo_folder), max_unreadable_share=0.5)
    pipeline = Pipeline(config, {"16x16": {"image": specs(6)["image"]}})
    Image.new("RGB", (4, 4)).save(photo_folder / "0.jpg")
    (photo_folder / "1.jpg").unlink()
    (batch,) = _take(pipeline, 1)
    assert [pipeline.source.name(i) for i in batch.source_index[~batch.valid]] == ["1.jpg"]


class _Deadly(_Numbers):
    def example(self, index: int, rng: np.random.Generator, names: Collection[str] | None = None) -> Example:
        os._exit(3)


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run_with_advice() -> None:
    pipeline = Pipeline(DataConfig(workers=1), {"4x4": {"image": specs(2, 4, 4)["image"]}}, source=_Deadly(4))
    with pytest.raises(DataError, match=r"worker process died.*__main__"):
        _take(pipeline, 1)


def test_a_global_batch_that_does_not_divide_by_the_hosts_is_refused() -> None:
    with pytest.raises(DataError, match="global batch of 30 does not divide by the 4 hosts; use 28 or 32"):
        _numbers(10, 30, host_count=4)


def test_specs_that_image_data_cannot_fill_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(
        DataError,
        match=r"asks for depth; the source has image \(uint8 \[\*, \*, 3\]\), caption \(text\), .* give tokens, mask",
    ):
        Pipeline(SHAPES, {"a": {"depth": specs(2)["image"]}}, tokenizer)
    with pytest.raises(DataError, match=r"differ in their global batch, \[2, 4\]"):
        Pipeline(SHAPES, {"a": {"image": specs(2)["image"], "tokens": specs(4)["tokens"]}}, tokenizer)
    longer = {"tokens": specs(2)["tokens"], "mask": np.empty((2, 99), np.float32)}
    with pytest.raises(DataError, match=r"tokens and mask differ in length: \d+ and 99"):
        Pipeline(SHAPES, {"a": longer}, tokenizer)
    with pytest.raises(
        DataError,
        match=r"asks for mask, tokens; the source has image .*, and there is no tokenizer; choose another data.source",
    ):
        Pipeline(SHAPES, {"a": specs(2)})


def test_captions_alone_are_read_without_images(tokenizer: Tokenizer) -> None:
    text = {name: specs(4)[name] for name in ("tokens", "mask")}
    (batch,) = _take(Pipeline(SHAPES, {"text": text}, tokenizer), 1)
    assert set(batch.arrays) == {"tokens", "mask"}
    assert batch.arrays["mask"].sum() > 8
