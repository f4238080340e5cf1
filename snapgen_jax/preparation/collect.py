"""From images and captions, wherever they are, to shards: read, filtered, freed of duplicates, sorted, written.

Apache Beam runs it, in this process unless its options name another runner. What it passes around is what is known of
an example (`Candidate`, about a kilobyte); the bytes stay where they lie until their shard is written. An example goes
to a shard by a hash of its id, and shards are sorted by that hash, so that a runner's order does not matter.

    OUT/.collecting/     what is being worked on; removed at the end. A run that was stopped goes on from it.
    OUT/report.html
    OUT/manifest.json    written last
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from snapgen_jax.data.errors import DataError
from snapgen_jax.data.records import pack, unpack
from snapgen_jax.data.shards import (
    MANIFEST,
    Manifest,
    Shard,
    StoredArray,
    check_files,
    read_manifest,
    shard_name,
    write_shard,
)
from snapgen_jax.preparation.collect_config import CollectConfig
from snapgen_jax.preparation.extra import require
from snapgen_jax.preparation.inspection import (
    DUPLICATE,
    NEAR_DUPLICATE,
    Candidate,
    candidate_of,
    digest_of,
    inspect_unit,
)
from snapgen_jax.preparation.near import first_neighbours, parts
from snapgen_jax.preparation.places import Place, PlaceReader, writing
from snapgen_jax.preparation.report import report
from snapgen_jax.preparation.sources.interfaces import ImageSource, Unit, build_source
from snapgen_jax.training.files import write_whole

WORK = ".collecting"
_OUTCOME = "outcome"
_IN_PROCESS = "--runner=FnApiRunner"  # the default one may fetch a program from the network and start that
_VERSION = 1  # of what WORK holds


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a collection came to.

    Attributes:
        counts: examples by reason; "" for those that are kept.
        examples: the first few of each.
        sizes: kept images by the largest power of two that their shorter side reaches.
        captions: of all kept images.
        shards: as they were written.
    """

    counts: Mapping[str, int]
    examples: Mapping[str, Sequence[Candidate]]
    sizes: Mapping[int, int]
    captions: int
    shards: tuple[Shard, ...]

    @property
    def kept(self) -> int:
        """Examples in the shards."""
        return self.counts.get("", 0)

    @property
    def rejected(self) -> dict[str, int]:
        """Examples by reason, sorted."""
        return {reason: self.counts[reason] for reason in sorted(self.counts) if reason}


def collect(config: CollectConfig, out: epath.PathLike, beam_options: Sequence[str] = ()) -> Outcome:
    """Collects a source into a folder of shards; reads nothing again where they are there already, of this config.

    Args:
        config: what is collected.
        out: a folder without the shards of another collection; made where it is missing.
        beam_options: Beam's own, such as "--runner=DataflowRunner"; none runs in this process.

    Raises:
        DataError: the folder holds another collection, the source cannot be used, nothing is kept, or the disk is full.
            No manifest is written.
    """
    folder = epath.Path(out).expanduser()
    if (folder / MANIFEST).exists():
        return _collected(folder, config)
    require("apache_beam")
    source = build_source(config)
    units = source.units()
    work = _begin(folder, config)
    _run(units, source, config, folder, work, beam_options)
    outcome = _outcome((work / _OUTCOME).read_bytes())
    if not outcome.counts:
        raise DataError(f"{config.path or config.name} holds no image; looked at {len(units)} parts of it")
    if not outcome.kept:
        raise DataError(f"none of {sum(outcome.counts.values())} images is kept: {listed(outcome.rejected)}")
    with writing(folder):
        write_whole(folder / "report.html", report(config, outcome))
        _manifest(config, outcome).write(folder)
    (folder / WORK).rmtree(missing_ok=True)
    return outcome


def listed(rejected: Mapping[str, int]) -> str:
    """ "2 duplicate, 1 small"."""
    return ", ".join(f"{count:,} {reason}" for reason, count in rejected.items()) or "none"


def _begin(folder: epath.Path, config: CollectConfig) -> epath.Path:
    """The folder of the work of just this config, without what an earlier run left that was stopped."""
    asked = json.dumps([_VERSION, dataclasses.asdict(config)], sort_keys=True)
    if folder.exists() and not (folder / WORK).exists() and (others := sorted(folder.iterdir())):
        raise DataError(f"{folder} holds files of something else, {others[0].name} for one; give an empty folder")
    work = folder / WORK / hashlib.blake2b(asked.encode(), digest_size=10).hexdigest()
    with writing(folder):
        if (folder / WORK).exists():  # so that these files are ours
            for left in [other for other in (folder / WORK).iterdir() if other != work]:
                left.rmtree()
            for left in [*folder.glob("images-*-of-*.array_record"), folder / "report.html", work / _OUTCOME]:
                left.unlink(missing_ok=True)
            for left in [*folder.glob(".writing-*"), *work.glob(".writing-*")]:
                left.rmtree()
        work.mkdir(parents=True, exist_ok=True)
    return work


def _run(
    units: Sequence[Unit],
    source: ImageSource,
    config: CollectConfig,
    folder: epath.Path,
    work: epath.Path,
    beam_options: Sequence[str],
) -> None:
    beam = require("apache_beam")
    try:
        options = beam.options.pipeline_options.PipelineOptions([_IN_PROCESS, *beam_options])
        pipeline = beam.Pipeline(options=options)
    except ValueError as error:
        raise DataError(f"Beam's options {' '.join(beam_options)} cannot be used: {error}") from error
    with _outside_of_notebooks():
        _build(pipeline, units, source, config, str(folder), str(work))
    log = logging.getLogger("apache_beam.runners.common")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it would print the traceback of an error that is raised here anyway
    try:
        with _outside_of_notebooks():
            pipeline.run().wait_until_finish()
    except Exception as error:
        # A runner adds which step failed, and may hand on what its workers said as text alone.
        text = f"errors.DataError: {error}" if isinstance(error, DataError) else str(error)
        said = re.findall(r"errors\.DataError: (.*?)(?: \[while running|$)", text, flags=re.DOTALL)
        if not said:
            raise
        raise DataError(said[-1]) from error
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def _outside_of_notebooks() -> Iterator[None]:
    """Keeps Beam from naming steps after the cells of a notebook: the part of it that does so needs an older pandas."""
    from apache_beam.utils import interactive_utils

    before = interactive_utils.is_in_ipython
    interactive_utils.is_in_ipython = lambda: False
    try:
        yield
    finally:
        interactive_utils.is_in_ipython = before


def _build(
    pipeline: Any, units: Sequence[Unit], source: ImageSource, config: CollectConfig, folder: str, work: str
) -> None:
    """Puts the steps together. Each is a function of its arguments, below."""
    beam = require("apache_beam")
    single = beam.pvalue.AsSingleton
    combiners = beam.combiners
    found = (
        pipeline
        | "units" >> beam.Create(units)
        | "to the workers" >> beam.Reshuffle()
        | "inspect" >> beam.FlatMap(inspect_unit, source, config, work)
    )
    rejected, passed = [found | "rejected" >> beam.Filter(_is_rejected)], found | "passed" >> beam.Filter(_is_kept)
    if config.filters.duplicates == "reject":
        told = passed | beam.Map(_by_digest) | beam.GroupByKey() | "equals" >> beam.FlatMap(_mark_equals)
        rejected.append(told | "equal" >> beam.Filter(_is_rejected))
        passed = told | "unequal" >> beam.Filter(_is_kept)
    if (bits := config.filters.near_duplicate_bits) is not None:
        twins = passed | beam.FlatMap(_parts, bits) | "alike" >> beam.GroupByKey() | beam.FlatMap(_twins, bits)
        both = {"candidate": passed | "by id" >> beam.Map(_by_id), "twin": twins} | beam.CoGroupByKey()
        told = both | "near" >> beam.Map(_mark_near)
        rejected.append(told | "like" >> beam.Filter(_is_rejected))
        passed = told | "unlike" >> beam.Filter(_is_kept)
    every = (*rejected, passed) | beam.Flatten()
    counts = every | beam.Map(_reason) | "count" >> combiners.Count.PerElement() | "counts" >> combiners.ToDict()
    examples = (
        every
        | beam.Map(_by_reason)
        | beam.combiners.Top.SmallestPerKey(max(config.examples_shown, 1), key=_to_show)
        | "examples" >> combiners.ToDict()
    )
    sizes = passed | beam.Map(_size) | "sized" >> combiners.Count.PerElement() | "sizes" >> combiners.ToDict()
    captions = passed | "captions" >> beam.Map(_caption_count) | "all captions" >> beam.CombineGlobally(sum)
    count = passed | beam.Map(_length) | "bytes" >> beam.CombineGlobally(sum) | beam.Map(_shard_count, config)
    shards = (
        passed
        | "to shards" >> beam.Map(_by_shard, single(count))
        | "shard" >> beam.GroupByKey()
        | "write" >> beam.Map(_write, single(count), config, folder)
        | "shards" >> combiners.ToList()
    )
    parts_of_outcome = map(single, (counts, examples, sizes, captions, shards))
    _ = pipeline | "end" >> beam.Create([work]) | "outcome" >> beam.Map(_keep_outcome, *parts_of_outcome)


# --- the steps -------------------------------------------------------------------------------------------------------


def _is_rejected(candidate: Candidate) -> bool:
    return bool(candidate.reason)


def _is_kept(candidate: Candidate) -> bool:
    return not candidate.reason


def _reason(candidate: Candidate) -> str:
    return candidate.reason


def _by_reason(candidate: Candidate) -> tuple[str, Candidate]:
    return candidate.reason, candidate


def _to_show(candidate: Candidate) -> tuple[bool, str]:
    """Order of the examples of a rejected reason: those with a picture first."""
    return not (candidate.thumbnail or candidate.place), candidate.id


def _by_id(candidate: Candidate) -> tuple[str, Candidate]:
    return candidate.id, candidate


def _by_digest(candidate: Candidate) -> tuple[bytes, Candidate]:
    return candidate.digest, candidate


def _mark_equals(group: tuple[bytes, Iterable[Candidate]]) -> Iterator[Candidate]:
    """Of equal files the one with the least id stays."""
    first = min(group[1], key=lambda candidate: candidate.id)
    for candidate in group[1]:
        yield candidate if candidate.id == first.id else _duplicate(candidate, DUPLICATE, first.id, first.place)


def _duplicate(candidate: Candidate, reason: str, of: str, twin: Place | None) -> Candidate:
    return dataclasses.replace(candidate, reason=reason, detail=of, twin=twin)


def _parts(candidate: Candidate, bits: int) -> Iterator[tuple[tuple[int, bytes], tuple[str, bytes, Place | None]]]:
    for part in parts(candidate.near, bits):
        yield part, (candidate.id, candidate.near, candidate.place)


def _twins(
    group: tuple[tuple[int, bytes], Iterable[tuple[str, bytes, Place | None]]], bits: int
) -> Iterator[tuple[str, tuple[str, Place | None]]]:
    """(id, its first neighbour's id and place) of all that have one within the group."""
    members = sorted(group[1])
    for (id, _, _), first in zip(members, first_neighbours([near for _, near, _ in members], bits), strict=True):
        if first is not None:
            yield id, (members[first][0], members[first][2])


def _mark_near(group: tuple[str, Mapping[str, Iterable[Any]]]) -> Candidate:
    (candidate,) = group[1]["candidate"]
    twin = min(group[1]["twin"], default=None)
    return candidate if twin is None else _duplicate(candidate, NEAR_DUPLICATE, *twin)


def _size(candidate: Candidate) -> int:
    return 1 << (min(candidate.height, candidate.width).bit_length() - 1)


def _caption_count(candidate: Candidate) -> int:
    return len(candidate.captions)


def _length(candidate: Candidate) -> int:
    assert candidate.place is not None
    return candidate.place.length


def _shard_count(total: int, config: CollectConfig) -> int:
    return config.shards or max(1, round(total / (config.shard_megabytes * 1e6)))


def _hash(id: str) -> bytes:
    return hashlib.blake2b(id.encode(), digest_size=8).digest()


def _by_shard(candidate: Candidate, count: int) -> tuple[int, Candidate]:
    return int.from_bytes(_hash(candidate.id)) * count >> 64, candidate


def _write(group: tuple[int, Iterable[Candidate]], count: int, config: CollectConfig, folder: str) -> Shard:
    candidates = sorted(group[1], key=lambda candidate: (_hash(candidate.id), candidate.id))
    return write_shard(folder, shard_name("images", group[0], count), _records(candidates, config))


def _records(candidates: Iterable[Candidate], config: CollectConfig) -> Iterator[dict[str, Any]]:
    reader = PlaceReader()
    try:
        for candidate in candidates:
            assert candidate.place is not None
            image = reader.read(candidate.place)
            if digest_of(image) != candidate.digest:
                raise DataError(
                    f"{candidate.id} changed while it was collected; start again when nothing writes to the source"
                )
            columns = candidate.columns
            yield {
                "id": candidate.id,
                "image": image,
                "captions": [text for text, _ in candidate.captions],
                "caption_weights": np.array([weight for _, weight in candidate.captions], np.float32),
                "height": np.int32(candidate.height),
                "width": np.int32(candidate.width),
                **{name: np.float64(_number(columns[name])) for name in config.all_numbers()},
                **{name: columns[name] or "" for name in config.texts},
            }
    finally:
        reader.close()


def _number(value: float | str | None) -> float:
    return float("nan") if value is None else float(value)


def _keep_outcome(work: str, counts: Any, examples: Any, sizes: Any, captions: int, shards: Any) -> None:
    values = {
        "counts": counts,
        "examples": {reason: [dataclasses.asdict(c) for c in found] for reason, found in examples.items()},
        "sizes": {str(size): count for size, count in sizes.items()},
        "captions": captions,
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
    with writing(epath.Path(work)):
        write_whole(epath.Path(work) / _OUTCOME, pack(values))


# --- the end ---------------------------------------------------------------------------------------------------------


def _outcome(packed: bytes) -> Outcome:
    values = unpack(packed)
    shards = (Shard(**shard) for shard in values["shards"])
    return Outcome(
        values["counts"],
        {reason: tuple(map(candidate_of, found)) for reason, found in values["examples"].items()},
        {int(size): count for size, count in values["sizes"].items()},
        values["captions"],
        tuple(sorted(shards, key=lambda shard: shard.file)),
    )


def _collected(folder: epath.Path, config: CollectConfig) -> Outcome:
    """What a folder holds that is done.

    Raises:
        DataError: it is no collection, one of another config, or a shard of it is missing or cut.
    """
    manifest = read_manifest(folder)
    asked = json.loads(json.dumps(dataclasses.asdict(config)))
    if manifest.kind != "images" or manifest.facts.get("config") != asked:
        raise DataError(f"{folder} holds another collection; name another folder, or remove this one")
    check_files(folder, manifest)
    facts = manifest.facts
    sizes = {int(size): count for size, count in facts["sizes"].items()}
    return Outcome({"": facts["kept"], **facts["rejected"]}, {}, sizes, facts["captions"], manifest.shards)


def _manifest(config: CollectConfig, outcome: Outcome) -> Manifest:
    arrays = {
        "id": StoredArray("text"),
        "image": StoredArray("bytes"),
        "captions": StoredArray("text", captions=True),
        "caption_weights": StoredArray("float32", captions=True),
        "height": StoredArray("int32"),
        "width": StoredArray("int32"),
        **{name: StoredArray("float64") for name in config.all_numbers()},
        **{name: StoredArray("text") for name in config.texts},
    }
    facts = {
        "config": dataclasses.asdict(config),
        "read": sum(outcome.counts.values()),
        "kept": outcome.kept,
        "rejected": outcome.rejected,
        "captions": outcome.captions,
        "sizes": {str(size): outcome.sizes[size] for size in sorted(outcome.sizes)},
    }
    return Manifest("images", arrays, outcome.shards, facts)
