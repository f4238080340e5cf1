"""Shards as a source, of images and of what encoders made of them."""

import dataclasses
import io
import itertools
import json
import os
import threading

import jax
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from snapgen_jax.data import shards
from snapgen_jax.data.config import DataConfig, DomainConfig
from snapgen_jax.data.errors import DataError
from snapgen_jax.data.pipeline import Pipeline
from snapgen_jax.data.sources import build_source

SIZES = {"32x32": (4, 4), "32x64": (4, 8)}  # bucket -> latent


def png(grey, size=(12, 8)):
    file = io.BytesIO()
    Image.new("RGB", size[::-1], (grey,) * 3).save(file, "png")
    return file.getvalue()


def write_images(folder, count=12, shard_count=3, first=0):
    """Images whose grey is their number, with two captions of which the second is drawn three times as often."""

    def example(number):
        captions = [f"grey {number}", f"the same grey {number}"]
        return {
            "image": png(number),
            "captions": captions,
            "caption_weights": np.array([1.0, 3.0], np.float32),
            "height": 12 if number % 2 else 8,
            "width": 8 if number % 2 else 12,
        }

    numbers = np.array_split(np.arange(first, first + count), shard_count)
    written = [
        shards.write_shard(folder, shards.shard_name("images", k, shard_count), map(example, map(int, inside)))
        for k, inside in enumerate(numbers)
    ]
    arrays = {"image": shards.StoredArray("bytes"), "captions": shards.StoredArray("text", captions=True)}
    shards.Manifest("images", arrays, tuple(written)).write(folder)
    return folder


def write_encoded(folder, counts=(6, 4), first=0):
    """Latents and token ids that hold the number of their example, and the ids that of the caption too."""
    written, number = [], first
    for (bucket, shape), count in zip(SIZES.items(), counts, strict=True):
        for k in range(2):
            examples = []
            for _ in range(count // 2):
                tokens = np.stack([np.full(5, 10 * number + caption, np.int32) for caption in range(2)])
                latent = np.full((*shape, 2), number, ml_dtypes.bfloat16)
                examples.append({"latent": latent, "ids": tokens, "captions": [f"a {number}", f"b {number}"]})
                number += 1
            written.append(shards.write_shard(folder, shards.shard_name(bucket, k, 2), examples, bucket))
    arrays = {
        "latent": shards.StoredArray("bfloat16", (None, None, 2)),
        "ids": shards.StoredArray("int32", (5,), captions=True),
    }
    facts = {"sizes": {name: [8 * n for n in shape] for name, shape in SIZES.items()}}
    shards.Manifest("encoded", arrays, tuple(written), facts).write(folder)
    return folder


def specs(batch=2, names=tuple(SIZES)):
    def of(shape):
        latent = jax.ShapeDtypeStruct((batch, *shape, 2), ml_dtypes.bfloat16)
        return {"latent": latent, "ids": jax.ShapeDtypeStruct((batch, 5), np.int32)}

    return {name: of(SIZES[name]) for name in names}


def config(path, **changes):
    return DataConfig(**{"source": "stored", "path": str(path), "validation_share": 0.0, **changes})


def take(pipeline, count, position=0):
    with_end = pipeline.batches(position)
    try:
        return list(itertools.islice(with_end, count))
    finally:
        with_end.close()


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    return write_encoded(tmp_path_factory.mktemp("encoded"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def test_images_are_decoded_and_captions_drawn_by_weight(images):
    source = build_source(config(images))
    rng, drawn = np.random.default_rng(0), []
    for _ in range(400):
        example = source.example(7, rng)
        assert example["image"].shape == (12, 8, 3) and (example["image"] == 7).all()
        drawn.append(example["caption"])
    assert set(drawn) == {"grey 7", "the same grey 7"}
    assert drawn.count("the same grey 7") / 400 == pytest.approx(0.75, abs=0.06)
    np.testing.assert_array_equal(source.sizes()[:2], [(8, 12), (12, 8)])
    assert source.name(5).endswith("images-00001-of-00003.array_record, record 1")


def test_every_bucket_gets_the_latents_of_its_size_with_the_ids_of_one_caption(encoded):
    seen = {name: set() for name in SIZES}
    for batch in take(Pipeline(config(encoded), specs()), 20):
        latent, ids = batch.arrays["latent"], batch.arrays["ids"]
        assert latent.dtype == ml_dtypes.bfloat16 and latent.shape == (2, *SIZES[batch.bucket], 2)
        for row, number in enumerate(batch.source_index):
            assert (latent[row] == number).all()
            assert set(ids[row]) <= {10 * number, 10 * number + 1} and len(set(ids[row])) == 1
            seen[batch.bucket].add(int(ids[row, 0]))
    assert {n // 10 for n in seen["32x32"]} == set(range(6)) and {n // 10 for n in seen["32x64"]} == set(range(6, 10))
    assert any(n % 10 == 1 for n in seen["32x32"]) and any(n % 10 == 0 for n in seen["32x32"])


def test_worker_processes_give_the_same_batches(encoded):
    here, apart = (take(Pipeline(config(encoded, workers=n), specs()), 3) for n in (0, 1))
    for a, b in zip(here, apart, strict=True):
        np.testing.assert_array_equal(a.arrays["latent"], b.arrays["latent"])
        np.testing.assert_array_equal(a.arrays["ids"], b.arrays["ids"])
        assert b.arrays["latent"].dtype == ml_dtypes.bfloat16


def test_a_share_is_held_out_of_every_bucket_or_another_folder_is_named(encoded, tmp_path):
    splits = {}
    for split in ("train", "validation"):
        source = build_source(config(encoded, validation_share=0.3), split)
        assert source.held_out
        splits[split] = {
            int(source.example(i, np.random.default_rng(0))["latent"][0, 0, 0]) for i in range(len(source))
        }
        assert sum(len(inside) for inside in source.buckets().values()) == len(source)
    assert splits["train"] | splits["validation"] == set(range(10)) and len(splits["validation"]) == 3
    assert not splits["train"] & splits["validation"]
    other = write_encoded(tmp_path, (2, 2), first=50)
    named = config(encoded, validation_path=str(other))
    assert len(build_source(named, "train")) == 10
    held = build_source(named, "validation")
    assert held.held_out and held.example(0, np.random.default_rng(0))["latent"][0, 0, 0] == 50


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        (specs(names=("32x32",)), "stored in the sizes 32x64, and no bucket has these"),
        (specs() | {"64x64": specs()["32x32"]}, "nothing is stored for the buckets 64x64"),
        (
            {
                name: {**of, "latent": jax.ShapeDtypeStruct(of["latent"].shape, np.float32)}
                for name, of in specs().items()
            },
            "latent as float32, and the source has bfloat16",
        ),
        (
            {name: {**of, "ids": jax.ShapeDtypeStruct((2, 7), np.int32)} for name, of in specs().items()},
            r"ids as int32 \[7\], and the source has int32 \[5\]",
        ),
        (
            {name: {**of, "states": jax.ShapeDtypeStruct((2, 7), np.int32)} for name, of in specs().items()},
            "asks for states; the source has",
        ),
    ],
)
def test_what_does_not_fit_the_batches_is_refused_by_name(encoded, buckets, message):
    with pytest.raises(DataError, match=message):
        Pipeline(config(encoded), buckets)


def test_no_path_a_missing_shard_and_a_cut_one_are_refused_before_anything_is_drawn(tmp_path):
    with pytest.raises(DataError, match=r"data.path is not set(.|\n)*snapgen prepare encode"):
        build_source(config(""))
    folder = write_encoded(tmp_path / "shards")
    victim = folder / "32x64-00001-of-00002.array_record"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-9])
    with pytest.raises(DataError, match=r"32x64-00001-of-00002.array_record has [\d,]+ bytes, and manifest.json says"):
        build_source(config(folder))
    victim.unlink()
    with pytest.raises(DataError, match=r"32x64-00001-of-00002.array_record is missing"):
        build_source(config(folder))
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"holds no manifest.json"):
        build_source(config(folder))


def test_a_damaged_shard_of_the_right_size_names_itself_and_the_record(tmp_path):
    folder = write_encoded(tmp_path)
    victim = folder / "32x32-00000-of-00002.array_record"
    victim.write_bytes(bytes(victim.stat().st_size))
    source = build_source(config(folder))
    with pytest.raises(DataError, match=r"32x32-00000-of-00002.array_record, record 1 cannot be read"):
        source.example(1, np.random.default_rng(0))


def test_latents_of_other_shapes_than_their_bucket_says_name_the_example(tmp_path):
    folder = write_encoded(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    swap = {"32x32": "32x64", "32x64": "32x32"}
    for shard in manifest["shards"]:
        shard["bucket"] = swap[shard["bucket"]]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        DataError, match=r"latent is bfloat16 \[4, \d, 2\], and its bucket takes \[4, \d, 2\]; it was made"
    ):
        take(Pipeline(config(folder), specs()), 1)


# --- mixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(encoded, tmp_path_factory):
    other = write_encoded(tmp_path_factory.mktemp("other"), (4, 2), first=100)
    domains = (
        DomainConfig(source="stored", path=str(encoded), validation_share=0.0, weight=3.0),
        DomainConfig(source="stored", path=str(other), validation_share=0.0, weight=1.0),
    )
    return DataConfig(mixture=domains)


def test_a_mixture_draws_its_domains_by_weight_whatever_their_lengths(two):
    batches = take(Pipeline(two, specs(4)), 100)
    numbers = np.concatenate([batch.arrays["latent"][:, 0, 0, 0].astype(int) for batch in batches])
    assert np.mean(numbers < 100) == pytest.approx(0.75, abs=0.01)
    assert set(numbers) == {*range(10), *range(100, 106)}


@pytest.mark.parametrize("hosts", [2, 4])
def test_a_mixture_has_one_order_on_any_number_of_hosts_and_from_any_position(two, hosts):
    whole = take(Pipeline(two, specs(8), seed=3), 8)
    shares = [
        take(Pipeline(two, specs(8), seed=3, host_index=h, host_count=hosts), 5, position=3) for h in range(hosts)
    ]
    for n, batch in enumerate(whole[3:]):
        together = np.stack([share[n].arrays["ids"] for share in shares], axis=1).reshape(8, 5)
        np.testing.assert_array_equal(together, batch.arrays["ids"])
        assert {share[n].bucket for share in shares} == {batch.bucket}


def test_sources_whose_entries_differ_are_not_mixed(two, images, tmp_path):
    odd = write_encoded(tmp_path)
    text = (odd / "manifest.json").read_text().replace('"int32"', '"int64"')
    (odd / "manifest.json").write_text(text)
    with pytest.raises(
        DataError, match=r"source 1 has .*ids \(int64 \[5\]\)(.|\n)*whose entries of one name are alike"
    ):
        build_source(dataclasses.replace(two, mixture=(two.mixture[0], DomainConfig(source="stored", path=str(odd)))))
    with pytest.raises(ValueError, match="mixture stands beside path"):
        dataclasses.replace(two, path=str(images))


def test_thirty_five_domains_cost_as_many_threads_and_no_more_open_files_than_the_limit_of_the_readers(tmp_path):
    domains = [write_encoded(tmp_path / str(n), (6, 2), first=10 * n) for n in range(35)]
    mixed = DataConfig(mixture=tuple(DomainConfig(source="stored", path=str(p), validation_share=0.0) for p in domains))
    alone = DataConfig(mixture=mixed.mixture[:1])

    def threads_while_reading(data):
        stream = Pipeline(data, specs(4)).batches(0)
        try:
            for _ in range(60):
                next(stream)
            return threading.active_count(), len(os.listdir("/proc/self/task"))
        finally:
            stream.close()

    one, many = threads_while_reading(alone), threads_while_reading(mixed)
    assert many[0] == one[0] and many[1] <= one[1] + 2
    assert shards._reader.cache_info().currsize <= shards._OPEN < 4 * 35 * 2
