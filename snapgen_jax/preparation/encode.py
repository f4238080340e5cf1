"""Images and captions to what a config stores of them: latents, and text states or token ids.

    OUT/256x256-00003-of-00064.array_record    what was made of shard 3 of the images
    OUT/progress/job.json                      what is made, and of what; a start that would make another is refused
    OUT/progress/00003.json                    shard 3 is done
    OUT/manifest.json                          written last

Every host takes each `hosts`-th shard of the images and makes it alone, over its own devices: the encoders are split
over these, and no host waits for another before the end. A shard is written whole or not at all. What is stored of an
example depends on its shard and on the number of devices of a host, so that neither the number of hosts nor a restart
changes a byte.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath

from snapgen_jax.data.arrays import IMAGE
from snapgen_jax.data.buckets import nearest_size
from snapgen_jax.data.errors import DataError, UnreadableExampleError
from snapgen_jax.data.images import decode
from snapgen_jax.data.records import unpack
from snapgen_jax.data.shards import (
    MANIFEST,
    Manifest,
    Records,
    Shard,
    check_files,
    check_readable,
    read_manifest,
    shard_name,
    write_shard,
)
from snapgen_jax.data.tokenizer_specs import load_tokenizers
from snapgen_jax.data.views import View
from snapgen_jax.parallel.hosts import Cluster, current
from snapgen_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from snapgen_jax.preparation.stored import Encoding, differences, fingerprints, tokenizer_digests
from snapgen_jax.training.exits import PreemptedError
from snapgen_jax.training.files import write_whole
from snapgen_jax.training.lifetime import Lifetime

Tree = Any
PROGRESS = "progress"
_STOPPED = "stopped while encoding; whole shards are kept, run the same command to go on"
_SAY_SECONDS = 30.0
_DECODERS = 8  # threads; Pillow lets others run while it decodes
_TOGETHER_SECONDS = 30 * 86400.0  # hosts end at times of their own

log = logging.getLogger(__name__)


def encode(
    encoding: Encoding,
    images: epath.PathLike,
    out: epath.PathLike,
    *,
    batch_per_device: int = 8,
    max_unreadable_share: float = 0.01,
    cluster: Cluster | None = None,
    say: Callable[[str], None] = print,
) -> Manifest:
    """Encodes a folder of images; goes on where an earlier start stopped.

    Args:
        encoding: what is stored, and what makes it.
        images: folder of shards of the kind "images".
        out: folder to write; the same for all hosts.
        batch_per_device: images, and captions, that a device encodes together.
        max_unreadable_share: of the images of a shard; unreadable ones are left out and counted.
        cluster: the processes of this run.
        say: told in a line now and then how far it is.

    Returns:
        The manifest of `out`.

    Raises:
        DataError: the images are not there, `out` holds another encoding, the disk is full, or too much is unreadable.
        PreemptedError: a signal asked for the end; all whole shards are kept.
    """
    cluster = cluster or current()
    source = read_collected(images)
    if source.kind != "images":
        raise DataError(f"{images} holds what was encoded already; give the folder of `snapgen prepare collect`")
    check_readable(images, source)
    check_files(images, source)
    out = epath.Path(out)
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1), jax.local_devices())
    life = Lifetime(cluster=cluster)
    with life.watch(), life.phase("step"):
        networks, tokenizer = encoding.load(mesh), load_tokenizers(encoding.tokenizers(), None)
        job = _job(encoding, source, networks, tokenizer, batch_per_device * mesh.size)
        _begin(out, job, cluster)
        todo = [k for k in range(len(source.shards)) if _done(out, k) is None]
        if not todo and (out / MANIFEST).exists():
            return read_manifest(out)
        if cluster.index == 0:
            (out / MANIFEST).unlink(missing_ok=True)
        own = [k for k in todo if k % cluster.count == cluster.index]
        encoder = _Encoder(encoding, networks, tokenizer, mesh, batch_per_device * mesh.size, life)
        report = _Report(say, own, source, cluster)
        for k in own:
            made = _encode_shard(encoder, images, source.shards[k], k, len(source.shards), out, max_unreadable_share)
            write_whole(_progress_file(out, k), json.dumps(made))
            report.shard(source.shards[k].examples)
        _together(cluster, "encoded", life)
        manifest = _manifest(encoding, job, out, len(source.shards))
        if cluster.index == 0:
            manifest.write(out)
        _together(cluster, "manifest", life)
    return manifest


def read_collected(images: epath.PathLike) -> Manifest:
    """The manifest of a folder of `snapgen prepare collect`. Raises `DataError` where it is none."""
    if not (epath.Path(images) / MANIFEST).exists():
        raise DataError(
            f"{images} holds no {MANIFEST}, so nothing was collected there, or not to the end; run `snapgen prepare "
            "collect --path=PHOTOGRAPHS --out=COLLECTED` first, and give --images=COLLECTED"
        )
    return read_manifest(images)


def _together(cluster: Cluster, what: str, life: Lifetime) -> None:
    """Waits until every host has come so far. One that leaves because it was told to stop ends the wait."""
    try:
        cluster.barrier(what, _TOGETHER_SECONDS)
    except Exception:
        if life.stopping:
            raise PreemptedError(_STOPPED) from None
        raise


def _job(encoding: Encoding, source: Manifest, networks: Tree, tokenizer: Any, rows: int) -> dict[str, Any]:
    """What decides the bytes that are written, as JSON has it."""
    digest = hashlib.sha256("".join(shard.sha256 for shard in source.shards).encode()).hexdigest()
    facts = {
        **encoding.facts(),
        "encoders": fingerprints(networks),
        "tokenizers": tokenizer_digests(tokenizer, encoding.token_lengths()),
        "images": {"sha256": digest, "examples": source.examples(), "shards": len(source.shards)},
        "computed": {"platform": jax.default_backend(), "rows": rows},
    }
    return json.loads(json.dumps(facts))


def _begin(out: epath.Path, job: Mapping[str, Any], cluster: Cluster) -> None:
    """Leaves the job in the folder, or compares it with the one that is there.

    Raises:
        DataError: it is another.
    """
    path = out / PROGRESS / "job.json"
    if cluster.index == 0 and not path.exists():
        if out.exists() and (others := sorted(path.name for path in out.iterdir())):
            raise DataError(
                f"{out} holds files that `snapgen prepare encode` did not make, {others[0]} for one; give another --out"
            )
        try:
            write_whole(path, json.dumps(job, indent=2, sort_keys=True))
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error}; nothing was encoded") from error
    cluster.barrier("job", _TOGETHER_SECONDS)
    if lines := differences(job, json.loads(path.read_text())):
        named = "\n".join(f"  {line}" for line in lines[:10])
        raise DataError(
            f"{out} holds an encoding, whole or begun, of something else; give another --out, or remove it:\n{named}"
        )


def _progress_file(out: epath.Path, number: int) -> epath.Path:
    return out / PROGRESS / f"{number:05d}.json"


def _done(out: epath.Path, number: int) -> dict[str, Any] | None:
    """What was made of a shard of the images; None where it is to be made, or made again."""
    path = _progress_file(out, number)
    if not path.exists():
        return None
    made = json.loads(path.read_text())
    for shard in made["shards"]:
        file = out / shard["file"]
        if not file.exists() or file.stat().length != shard["bytes"]:
            return None
    return made


def _manifest(encoding: Encoding, job: Mapping[str, Any], out: epath.Path, count: int) -> Manifest:
    made = [_done(out, k) for k in range(count)]
    if missing := [k for k, each in enumerate(made) if each is None]:
        raise DataError(f"shard {missing[0]} of {out} is gone since it was written; run the same command again")
    each = [m for m in made if m is not None]
    shards = [Shard(**shard) for m in each for shard in m["shards"]]
    ordered = [shard for bucket in encoding.sizes for shard in shards if shard.bucket == bucket]
    counts = {name: sum(m[name] for m in each) for name in ("examples", "captions", "unreadable")}
    return Manifest("encoded", encoding.arrays(), tuple(ordered), {**job, **counts})


def _encode_shard(
    encoder: _Encoder,
    images: epath.PathLike,
    shard: Shard,
    number: int,
    count: int,
    out: epath.Path,
    max_unreadable_share: float,
) -> dict[str, Any]:
    """Encodes a shard of images, a file for each bucket that has any; says what was made."""
    records = Records(images, [shard])
    sizes = [(int(r["height"]), int(r["width"])) for r in (unpack(records[i]) for i in range(len(records)))]
    buckets = list(encoder.encoding.sizes)
    nearest = nearest_size(np.array(sizes).reshape(-1, 2), list(encoder.encoding.sizes.values()))
    made: list[Shard] = []
    counts = {"examples": 0, "captions": 0, "unreadable": 0}
    for b, bucket in enumerate(buckets):
        members = np.flatnonzero(nearest == b).tolist()
        if members:
            examples = encoder.examples(records, members, bucket, counts)
            made.append(write_shard(out, shard_name(bucket, number, count), examples, bucket))
    if counts["unreadable"] > max_unreadable_share * max(len(records), 1):
        for written in made:
            (out / written.file).unlink(missing_ok=True)
        raise DataError(
            f"{counts['unreadable']} of the {len(records)} images of {shard.file} are unreadable; "
            f"data.max_unreadable_share allows {max_unreadable_share:.1%}. Collect them again, or raise the share"
        )
    return {"shards": [dataclasses.asdict(one) for one in made], **counts}


class _Encoder:
    """Frozen encoders over the devices of this host."""

    def __init__(self, encoding: Encoding, networks: Tree, tokenizer: Any, mesh: Any, rows: int, life: Lifetime):
        self.encoding, self._networks, self._tokenizer = encoding, networks, tokenizer
        self._mesh, self._rows, self._life = mesh, rows, life
        self._images, self._text = jax.jit(encoding.encode_images), jax.jit(encoding.encode_text)

    def examples(
        self, records: Records, members: Sequence[int], bucket: str, counts: dict[str, int]
    ) -> Iterator[dict[str, Any]]:
        """The encoded examples of a bucket, in order; adds to `counts`."""
        with ThreadPoolExecutor(_DECODERS) as pool:
            read = functools.partial(_read, records, self.encoding.sizes[bucket])
            chunks = [members[i : i + self._rows] for i in range(0, len(members), self._rows)]
            ahead: list[list[Future]] = [[pool.submit(read, i) for i in chunk] for chunk in chunks[:1]]
            for n in range(len(chunks)):
                if n + 1 < len(chunks):
                    ahead.append([pool.submit(read, i) for i in chunks[n + 1]])
                found = [future.result() for future in ahead.pop(0)]
                if self._life.stopping:
                    pool.shutdown(cancel_futures=True)
                    raise PreemptedError(_STOPPED)
                readable = [example for example in found if example is not None]
                counts["unreadable"] += len(found) - len(readable)
                counts["examples"] += len(readable)
                counts["captions"] += sum(len(example["captions"]) for example in readable)
                if readable:
                    yield from self._encoded(readable)

    def _encoded(self, examples: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        pictures = self._run(self._images, np.stack([example["image"] for example in examples]))
        captions = [list(example["captions"]) or [""] for example in examples]
        flat = list(itertools.chain.from_iterable(captions))
        tokens = self._tokenizer.arrays(flat, self.encoding.token_lengths())
        texts = self._run(self._text, tokens)
        start = 0
        for n, example in enumerate(examples):
            stop = start + len(captions[n])
            yield {
                "id": example["id"],
                "captions": captions[n],
                "caption_weights": example["caption_weights"],
                **{name: array[n] for name, array in pictures.items()},
                **{name: array[start:stop] for name, array in texts.items()},
            }
            start = stop

    def _run(self, function: Callable[[Tree, Tree], Tree], arrays: Tree) -> dict[str, np.ndarray]:
        """Runs a function in batches of one size, the last one padded with copies of its last row."""
        total = len(jax.tree.leaves(arrays)[0])
        parts = []
        for start in range(0, total, self._rows):
            batch = jax.tree.map(lambda x, start=start: _padded(x[start : start + self._rows], self._rows), arrays)
            with jax.set_mesh(self._mesh):
                made = function(self._networks, jax.device_put(batch, batch_sharding(self._mesh)))
            rows = min(self._rows, total - start)
            parts.append({name: np.asarray(x)[:rows] for name, x in made.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _padded(rows: np.ndarray, count: int) -> np.ndarray:
    return np.concatenate([rows, np.repeat(rows[-1:], count - len(rows), axis=0)])


def _read(records: Records, size: tuple[int, int], index: int) -> dict[str, Any] | None:
    """An example with its image as the bucket shows it, the centre; None where it is unreadable."""
    record = unpack(records[index])
    try:
        image = decode(record["image"])
    except UnreadableExampleError as error:
        log.warning("unreadable, left out: %s (%s)", records.name(index), error)
        return None
    view = View.draw(image.shape[:2], size, np.random.default_rng(0))
    weights = record.get("caption_weights", np.ones(max(1, len(record["captions"])), np.float32))
    return {
        "id": record.get("id", records.name(index)),
        "captions": record["captions"],
        "caption_weights": np.asarray(weights, np.float32),
        "image": view.show(IMAGE, image, size),
    }


class _Report:
    """Says now and then how far this host is."""

    def __init__(self, say: Callable[[str], None], own: Sequence[int], source: Manifest, cluster: Cluster):
        self._say, self._shards, self._source, self._cluster = say, len(own), source, cluster
        self._begun = self._said = time.monotonic()
        self._examples = self._done = 0

    def shard(self, examples: int) -> None:
        self._done += 1
        self._examples += examples
        now = time.monotonic()
        if now - self._said < _SAY_SECONDS and self._done < self._shards:
            return
        self._said = now
        rate = self._examples / (now - self._begun)
        left = math.ceil((self._shards - self._done) * (now - self._begun) / self._done)
        self._say(
            f"host {self._cluster.index} of {self._cluster.count}: {self._done} of its {self._shards} shards, "
            f"{rate:,.1f} images/s, {left:,} s to go"
        )
