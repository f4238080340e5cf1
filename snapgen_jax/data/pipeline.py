"""From a source to batches: order, hosts, workers, buckets, restart.

A position is one integer, the number of global batches drawn. The order is

    shuffle -> repeat -> (domain, epoch, index) -> one domain an example -> [host::hosts] -> example -> batch
            -> one bucket a step -> [position:]

and every stage is a pure function of the numbers before it, so a run is restarted at any position by slicing, on any
number of hosts that divides the global batch. grain runs the stages; its own iterator state is never stored.

Worker processes are spawned, and so import the main module again: a script that uses `workers > 0` must keep its
actions under `if __name__ == "__main__":`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import signal
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from snapgen_jax.data.arrays import ArraySpec, Example, entry
from snapgen_jax.data.buckets import Bucket, Specs, assign, weights
from snapgen_jax.data.config import Crop, DataConfig, Flip, Split
from snapgen_jax.data.errors import DataError, UnreadableExampleError
from snapgen_jax.data.mixture import domains_of, shifted
from snapgen_jax.data.sources import Indices, Source, build_source
from snapgen_jax.data.tokenizer import CaptionTokenizer
from snapgen_jax.data.views import View
from snapgen_jax.data.words import speaks_of_sides

_REPLACEMENTS_TRIED = 100
_JUDGED_AFTER = 200  # examples; a share of fewer says little
_NAMED = 20  # unreadable examples listed in an error

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Batch:
    """This host's share of one global batch.

    Attributes:
        bucket: the bucket of this step, the same on all hosts.
        arrays: those that the bucket's specs name: entries of the source, such as "image" uint8 `[b, H, W, 3]`, and
            what the tokenizer makes of its texts, such as "tokens" int32 `[b, L]` and "mask" float32 `[b, L]`.
        valid: bool `[b]`, False where an unreadable example was replaced by the next good one.
        source_index: int64 `[b]`, the example drawn from the source, the unreadable one where it was replaced.
    """

    bucket: str
    arrays: dict[str, np.ndarray]
    valid: np.ndarray
    source_index: np.ndarray


class Pipeline:
    """Batches of a source, from any position."""

    def __init__(
        self,
        config: DataConfig,
        batch_specs: Mapping[str, Specs],
        tokenizer: CaptionTokenizer | None = None,
        *,
        seed: int = 0,
        host_index: int = 0,
        host_count: int = 1,
        split: Split = "train",
        source: Source | None = None,
    ):
        """Plans the pipeline; reads nothing but, for several buckets, the headers of a folder's images.

        Args:
            config: the data config.
            batch_specs: {bucket: {array: spec with the global batch in `shape[0]`, and a dtype}}. An array is made by
                the tokenizer, or else is an entry of the source. Each example goes to the bucket of the nearest aspect
                ratio, and the share of a bucket's batches is `data.bucket_shares`, or else its share of examples.
            tokenizer: makes token ids and masks of texts.
            seed: of the order, and with epoch and index of every draw.
            host_index: which share this process reads.
            host_count: into how many shares a global batch is split.
            split: training draws random crops, flips and bucket shares as configured; validation keeps the centre, and
                takes buckets by their examples.
            source: used in place of the one that the config names.

        Raises:
            DataError: a global batch does not divide by the hosts; a spec names an array that there is not, or one of
                another shape or dtype; `data.bucket_shares` does not fit the buckets; or the source is missing or
                empty.
        """
        self.source = build_source(config, split) if source is None else source
        self._config = config
        declared = self.source.spec()
        buckets = [
            Bucket.of(name, specs, host_count, declared, tokenizer, config.texts) for name, specs in batch_specs.items()
        ]
        training = split == "train"
        crop, flip = (config.crop, _possible_flip(config.flip, buckets, declared)) if training else ("centre", "none")
        domains = domains_of(self.source)
        members = [assign(domain.source, buckets) for domain in domains]
        drawn = {
            bucket.name: [
                domain.weight * len(inside[bucket.name]) for domain, inside in zip(domains, members, strict=True)
            ]
            for bucket in buckets
        }
        shares = weights(
            buckets, {name: sum(each) for name, each in drawn.items()}, config.bucket_shares if training else {}
        )
        self._buckets = [bucket for bucket in buckets if bucket.name in shares]
        parts = []
        for number, bucket in enumerate(self._buckets):
            indices = [
                shifted(inside[bucket.name], domain.start) for domain, inside in zip(domains, members, strict=True)
            ]
            read = _Read(self.source, declared, indices, bucket, seed, crop, flip)
            filled = [k for k, inside in enumerate(indices) if len(inside)]
            orders = [
                grain.MapDataset.range(len(indices[k]))
                .shuffle(seed=_shuffle_seed(seed, number, k))
                .repeat()
                .map_with_index(_Epoch(len(indices[k]), k))
                for k in filled
            ]
            order = _mixed(orders, [drawn[bucket.name][k] for k in filled])
            parts.append(
                order[host_index::host_count]
                .map(read)
                .batch(bucket.local_batch, batch_fn=_Collate(number, bucket, tokenizer))
            )
        self._dataset = _mixed(parts, list(shares.values()))

    def batches(self, position: int = 0) -> Generator[Batch, None, None]:
        """Yields the batches from a position on, without end. Close the generator to stop its threads or processes.

        Raises:
            DataError: more than `max_unreadable_share` of the examples drawn were unreadable (checked from 200 drawn
                on, or one epoch if that is shorter), or a worker process died.
        """
        reading = grain.ReadOptions(num_threads=self._config.threads, prefetch_buffer_size=self._config.prefetch)
        dataset = self._dataset[position:].to_iter_dataset(reading)
        if self._config.workers:
            if not flags.FLAGS.is_parsed():  # grain reads one of its flags, which only absl's `app.run` would parse
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(self._config.workers, self._config.prefetch))
        unreadable = _Unreadable(self.source, self._config.max_unreadable_share)
        with contextlib.closing(dataset.__iter__()) as iterator, _explain_dead_worker():
            for element in iterator:
                # Arrays from a worker lie in shared memory that grain reclaims when it sees fit: the batch owns a copy.
                arrays = {name: np.array(array) for name, array in element["arrays"].items()}
                batch = Batch(
                    self._buckets[element["bucket"]].name,
                    arrays,
                    np.array(element["valid"]),
                    np.array(element["source_index"]),
                )
                unreadable.count(batch, element["problems"])
                yield batch


def _mixed(parts: Sequence[grain.MapDataset], shares: Sequence[float]) -> grain.MapDataset:
    return parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, shares)


def _shuffle_seed(seed: int, bucket: int, domain: int) -> int:
    words = (seed, bucket, domain) if domain else (seed, bucket)
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def _possible_flip(flip: Flip, buckets: Sequence[Bucket], declared: Mapping[str, ArraySpec]) -> Flip:
    """What of `data.flip` the entries allow; what they forbid is said once."""
    shown = [bucket for bucket in buckets if bucket.view]
    entries = {name for bucket in shown for name in bucket.entries}
    if flip == "none" or not shown:
        return flip
    if fixed := sorted(name for name in entries if declared[name].mirror == "none"):
        log.warning("data.flip is off: the source does not say how %s is mirrored", ", ".join(fixed))
        return "none"
    if texts := sorted(name for name in entries if declared[name].kind == "text"):
        log.warning("data.flip leaves examples as they are whose %s says left or right", " or ".join(texts))
    return flip


# --- stages, as picklable callables ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Epoch:
    """Position in the endless stream of a domain and place in its data -> (domain, epoch, place)."""

    length: int
    domain: int

    def __call__(self, position: int, place: int) -> tuple[int, int, int]:
        return self.domain, position // self.length, int(place)


@dataclasses.dataclass(frozen=True)
class _Read:
    """(domain, epoch, place) -> example in the bucket's shape, replaced by the next good one where it is unreadable.

    Attributes:
        indices: for each domain, its examples of the bucket.
    """

    source: Source
    declared: Mapping[str, ArraySpec]
    indices: Sequence[Indices]
    bucket: Bucket
    seed: int
    crop: Crop
    flip: Flip

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled in a worker process, which a terminal sends each Ctrl-C too: the run decides when it ends."""
        self.__dict__.update(state)
        in_main_thread = threading.current_thread() is threading.main_thread()
        if multiprocessing.parent_process() is not None and in_main_thread:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def __call__(self, key: tuple[int, int, int]) -> dict[str, Any]:
        domain, epoch, place = key
        indices, problem = self.indices[domain], ""
        wanted = int(indices[place])
        for step in range(min(len(indices), _REPLACEMENTS_TRIED)):
            index = int(indices[(place + step) % len(indices)])
            rng = np.random.default_rng((self.seed, epoch, index))
            try:
                example = self._example(index, rng)
            except UnreadableExampleError as error:
                problem = problem or str(error)
                continue
            return {"example": example, "source_index": wanted, "problem": problem}
        raise DataError(
            f"{self.source.name(wanted)} is unreadable ({problem}), and so are the next {step} examples: "
            "is the data where it should be?"
        )

    def _example(self, index: int, rng: np.random.Generator) -> Example:
        bucket = self.bucket
        example = self.source.example(index, rng, bucket.entries)
        example = {name: entry(example, name, self.declared[name]) for name in bucket.entries}
        for name, shape in bucket.shapes.items():
            if self.declared[name].kind == "array" and example[name].shape != shape:
                has = ArraySpec("array", example[name].shape, example[name].dtype)
                raise DataError(
                    f"{self.source.name(index)}: {name} is {has}, and its bucket takes {list(shape)}; it was made for "
                    "another bucket, or by other encoders than the inputs of this config"
                )
        if bucket.size is None:
            return example
        view = View.draw(example[bucket.view].shape[-3:-1], bucket.size, rng, self.crop, self.flip)
        if view.mirrored and any(speaks_of_sides(example[text]) for text in bucket.lengths):
            view = dataclasses.replace(view, mirrored=False)
        return {
            name: view.show(self.declared[name], value, bucket.shapes.get(name, ())[-3:-1])
            for name, value in example.items()
        }


@dataclasses.dataclass(frozen=True)
class _Collate:
    """Examples -> the arrays of a batch."""

    number: int
    bucket: Bucket
    tokenizer: CaptionTokenizer | None

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        arrays = {name: np.stack([item["example"][name] for item in examples]) for name in self.bucket.shapes}
        for text, lengths in self.bucket.lengths.items():
            assert self.tokenizer is not None
            arrays |= self.tokenizer.arrays([item["example"][text] for item in examples], lengths)
        problems = [item["problem"] for item in examples]
        return {
            "bucket": self.number,
            "arrays": arrays,
            "valid": np.array([not problem for problem in problems]),
            "source_index": np.array([item["source_index"] for item in examples], np.int64),
            "problems": [problem for problem in problems if problem],
        }


# --- what goes wrong -------------------------------------------------------------------------------------------------


class _Unreadable:
    """Counts the unreadable examples among those drawn, names each once, and stops past the allowed share."""

    def __init__(self, source: Source, allowed: float):
        self._source, self._allowed = source, allowed
        self._judged_after = min(_JUDGED_AFTER, len(source))
        self._drawn = 0
        self._reasons: dict[int, str] = {}

    def count(self, batch: Batch, problems: Sequence[str]) -> None:
        bad = batch.source_index[~batch.valid]
        self._drawn += len(batch.valid)
        for index, problem in zip(bad.tolist(), problems, strict=True):
            if index not in self._reasons:
                self._reasons[index] = problem
                log.warning("unreadable, replaced by the next example: %s (%s)", self._source.name(index), problem)
        # Each example counts once, however many epochs pass: else the share would waver within an epoch.
        different = min(self._drawn, len(self._source))
        if self._drawn >= self._judged_after and len(self._reasons) > self._allowed * different:
            raise DataError(self._report(different))

    def _report(self, different: int) -> str:
        share = len(self._reasons) / different
        listed = [f"  {self._source.name(i)}: {why}" for i, why in list(self._reasons.items())[:_NAMED]]
        more = len(self._reasons) - len(listed)
        return "\n".join(
            [
                f"{len(self._reasons)} of the {different} examples drawn are unreadable, {share:.1%}; "
                f"data.max_unreadable_share allows {self._allowed:.1%}. Mend or remove these, or raise the share:",
                *listed,
                *([f"  and {more} more"] if more else []),
            ]
        )


@contextlib.contextmanager
def _explain_dead_worker() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "Worker process was terminated" not in str(error):
            raise
        raise DataError(
            "a data worker process died; its own message is above. If that speaks of the 'bootstrapping phase', put "
            "what your script does under `if __name__ == '__main__':`. If it was killed for memory, lower data.workers "
            "or data.prefetch"
        ) from error
