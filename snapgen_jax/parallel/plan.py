"""Whether a job fits a pod and what it will cost, known on a laptop: the very step is compiled for the real topology.

XLA compiles for TPUs that are not there (`jax.experimental.topologies`), and says what the program needs. Memory is
what the compiler allots. Operations are XLA's estimate, and what passes through memory is read off the program it made.
The time that follows is what the chip needs at its peaks and a lower bound, since arithmetic, memory and links are
taken to overlap wholly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from snapgen_jax.parallel.chips import Chip, Roofline, chip_of, network_bandwidth
from snapgen_jax.parallel.hlo import ACROSS, Collective, collectives
from snapgen_jax.parallel.traffic import traffic

Tree = Any
_LIBTPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
# What libtpu wants to be told before it describes chips that are not there.
_ACCELERATORS = {"v4": "v4-8", "v5e": "v5litepod-16", "v5p": "v5p-8", "v6e": "v6e-16", "tpu7x": "tpu7x-16"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that are wired together.

    Attributes:
        name: "v5e:4x4".
        chip: what each can do.
        devices: JAX's description of them.
    """

    name: str
    chip: Chip
    devices: Sequence[Any]

    @property
    def chips(self) -> int:
        """How many there are."""
        return len(self.devices) // self.chip.devices

    @property
    def slices(self) -> int:
        """Groups of chips that only the data centre's network joins."""
        return slices_of(self.name)


def slices_of(name: str) -> int:
    """How many slices a topology of that name has: 2 of "2*v5e:4x4"."""
    return int(name.rpartition("*")[0] or 1)


def topology(name: str) -> Topology:
    """Describes "v5e:4x4", "v5p:2x2x2" and the like, or "2*v5e:4x4" for two slices joined by the network.

    Raises:
        ValueError: the chip is unknown, libtpu knows no such shape, libtpu is not installed, the number of slices is
            none, or there are several of a chip whose maker does not say how fast one reaches another.
    """
    slices, star, shape = name.rpartition("*")
    if star and not (slices.isdecimal() and int(slices)):
        raise ValueError(f"no topology {name!r}: {slices!r} is no number of slices; write 2*v5e:4x4 for two")
    chip = chip_of(shape.partition(":")[0])
    if slices and int(slices) > 1:
        network_bandwidth(chip)
    for key, value in {**_LIBTPU, "TPU_ACCELERATOR_TYPE": _ACCELERATORS[chip.name]}.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    options = {"num_slices": int(slices)} if slices else {}
    try:
        found = topologies.get_topology_desc(shape, platform="tpu", **options)
    except Exception as error:
        raise ValueError(
            f"no topology {name!r}: {str(error).splitlines()[0]}. Shapes are as in v5e:4x4, v5p:2x2x2, v6e:16x16; "
            "compiling for TPUs needs libtpu (pip install 'snapgen-jax[tpu]', or `make dev` in a clone)"
        ) from error
    return Topology(name, chip, found.devices)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one step needs and costs on one device of a mesh, and what follows for the run.

    Attributes:
        topology, chip, chips, mesh: where it would run.
        bucket: which of the recipe's batch shapes.
        global_batch: examples in a step.
        hbm_bytes: what a device has; the compiler keeps a little of it.
        state_bytes: of the whole state, as it is saved.
        train_steps: in the run.
        versions: of what compiled it.
        fits: the compiler found room for the step. Where it did not, what follows is unknown but for `peak_bytes`.
        peak_bytes: the most that is in use at once, or would be.
        compile_seconds: on this machine.
        argument_bytes: state, frozen networks and batch, on one device.
        temporary_bytes: what the step allots beside them.
        flops: of one step on one device, as XLA estimates them, with loops counted as often as they run.
        int8_flops: those of `flops` that are products of int8 by int8.
        memory_bytes: that one step reads from and writes to the memory of one device, see `parallel.traffic`; 0 in a
            plan that was stored without.
        bytes_accessed: XLA's estimate of the same: of all operands and results, on the chip or not, and of the body of
            a loop once.
        collectives: by kind, in one step.
        part: the piece of the step that was compiled by itself; "" for the whole.
        derived_from: the topology that the step was compiled for, where that is another; "" where it is this one.
    """

    topology: str
    chip: str
    chips: int
    mesh: dict[str, int]
    bucket: str
    global_batch: int
    hbm_bytes: int
    state_bytes: int
    train_steps: int
    versions: Mapping[str, str]
    fits: bool
    peak_bytes: int
    compile_seconds: float
    argument_bytes: int = 0
    temporary_bytes: int = 0
    flops: float = 0.0
    memory_bytes: int = 0
    bytes_accessed: float = 0.0
    collectives: Mapping[str, Collective] = dataclasses.field(default_factory=dict)
    part: str = ""
    derived_from: str = ""
    int8_flops: int = 0

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Plan:
        """The inverse of `to_json`; other keys are passed over."""
        own = {f.name: fields[f.name] for f in dataclasses.fields(cls) if f.name in fields}
        return cls(**{**own, "collectives": {k: Collective(**v) for k, v in own.get("collectives", {}).items()}})

    def on(self, where: Topology) -> Plan:
        """What this step would need and cost on other chips, each with the same share of a batch; not compiled there.

        A replica does the same work wherever it is, and a sum over n replicas sends 2 (n-1)/n of its size. Over several
        slices of n replicas each sum is made in its slice first; then each replica exchanges its n-th part with those
        of the other slices, and gathers the other parts. Another chip's compiler may fuse and lay out otherwise, so
        that its bytes are a guess.

        Raises:
            ValueError: the step does not fit, its parameters are split, so that a replica's work depends on the mesh,
                or it has one replica alone, which sends nothing, or several slices.
        """
        if not self.fits or math.prod(self.mesh.values()) != self.mesh["data"]:
            raise ValueError(
                f"only a plan that fits, on a mesh of replicas, tells of other chips; this one is {self.mesh}"
            )
        if slices_of(self.topology) > 1:
            raise ValueError(f"only a plan for one slice tells of other chips; this one is for {self.topology}")
        devices, before, slices = len(where.devices), self.mesh["data"], where.slices
        if before < 2:
            raise ValueError(f"only a plan for several devices tells what others send; this one is for {self.topology}")
        near = devices // slices
        grown = ((near - 1) / near) / ((before - 1) / before)
        sent = {
            kind: dataclasses.replace(found, wire_bytes=round(found.wire_bytes * grown))
            for kind, found in self.collectives.items()
        }
        if slices > 1:
            summed = sum(found.bytes for found in self.collectives.values())
            part = Collective(1, summed // near, round(2 * (slices - 1) / slices * summed / near))
            gathered = Collective(1, summed, round((near - 1) / near * summed))
            sent |= {ACROSS: part, "all-gather": gathered}
        hbm = int(where.chip.hbm_bytes / where.chip.devices)
        return dataclasses.replace(
            self,
            topology=where.name,
            chip=where.chip.name,
            chips=where.chips,
            mesh={**self.mesh, "data": devices},
            global_batch=self.global_batch * devices // before,
            hbm_bytes=hbm,
            fits=self.peak_bytes <= hbm,
            compile_seconds=0.0,
            collectives=sent,
            derived_from=self.topology,
        )

    @property
    def devices(self) -> int:
        """JAX devices in the mesh."""
        return math.prod(self.mesh.values())

    @property
    def roofline(self) -> Roofline:
        """What the step needs of one device, and the time that this takes at the chip's peaks: no step is faster."""
        wire_bytes = sum(found.wire_bytes for kind, found in self.collectives.items() if kind != ACROSS)
        across = self.collectives.get(ACROSS, Collective(0, 0, 0)).wire_bytes
        moved = self.memory_bytes or self.bytes_accessed
        return Roofline(chip_of(self.chip), self.flops, moved, wire_bytes, self.int8_flops, across)

    @property
    def examples_per_second(self) -> float:
        """Of the whole mesh, at most."""
        return self.global_batch / self.roofline.seconds

    def to_json(self) -> dict[str, Any]:
        """All fields, and what follows from them; of a step that does not fit, what is known."""
        fields = dataclasses.asdict(self)
        if not self.fits:
            unknown = {f.name for f in dataclasses.fields(self) if f.default is not dataclasses.MISSING} - {"part"}
            return {name: value for name, value in fields.items() if name not in {*unknown, "collectives"}}
        per_example, at_peaks = self.devices / self.global_batch, self.roofline
        days = self.train_steps * at_peaks.seconds / 86400
        return {
            **fields,
            "compute_seconds": at_peaks.times["compute"],
            "hbm_seconds": at_peaks.times["hbm"],
            "link_seconds": at_peaks.times["links"],
            **({"network_seconds": at_peaks.times["network"]} if "network" in at_peaks.times else {}),
            "bound": at_peaks.bound,
            "step_seconds": at_peaks.seconds,
            "flops_per_example": self.flops * per_example,
            "bytes_per_example": at_peaks.bytes_accessed * per_example,
            "intensity": self.flops / max(at_peaks.bytes_accessed, 1.0),
            "examples_per_second": self.examples_per_second,
            "examples_per_second_per_chip": self.examples_per_second / self.chips,
            "days": days,
            "chip_hours": 24 * days * self.chips,
        }

    def table(self) -> str:
        """The plan for a person."""
        mesh = " x ".join(f"{name}={size}" for name, size in self.mesh.items())
        verdict = "fits" if self.fits else "DOES NOT FIT"
        rows = [
            ("where", f"{self.topology}: {self.chips} chips, mesh {mesh}"),
            ("batch", f"{self.global_batch} examples of {self.bucket}, {self.global_batch / self.chips:g} a chip"),
            *([("part", f"{self.part!r} alone, not the whole step")] if self.part else []),
            ("memory", f"{verdict}: {gigabytes(self.peak_bytes)} of {gigabytes(self.hbm_bytes)} on each device"),
            *(self._cost_rows() if self.fits else [("", f"what would help: {self.advice()}")]),
            ("a checkpoint", gigabytes(self.state_bytes)),
            ("compilation", f"{self.compile_seconds:.0f} s here")
            if not self.derived_from
            else ("derived", f"from the step compiled for {self.derived_from}"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name.ljust(width)}  {text}" for name, text in rows)

    def _cost_rows(self) -> list[tuple[str, str]]:
        j = self.to_json()
        sent = [
            (
                kind,
                f"{found.count}, {gigabytes(found.bytes)}; {gigabytes(found.wire_bytes)} over "
                f"{'the network' if kind == ACROSS else 'links'}",
            )
            for kind, found in self.collectives.items()
        ]
        return [
            ("", f"arguments {gigabytes(self.argument_bytes)}, temporaries {gigabytes(self.temporary_bytes)}"),
            (
                "a step",
                f"{tera(self.flops)}FLOP (XLA's estimate), {gigabytes(self.roofline.bytes_accessed)} of memory traffic",
            ),
            *([("", f"of that {tera(self.int8_flops)}FLOP in int8")] if self.int8_flops else []),
            ("an example", f"{tera(j['flops_per_example'])}FLOP, {gigabytes(j['bytes_per_example'])}"),
            ("intensity", f"{j['intensity']:.1f} FLOP/byte"),
            *sent,
            (
                "at the peaks",
                f"compute {1000 * j['compute_seconds']:.1f} ms, HBM {1000 * j['hbm_seconds']:.1f} ms, links "
                f"{1000 * j['link_seconds']:.1f} ms"
                + (f", network {1000 * j['network_seconds']:.1f} ms" if "network_seconds" in j else "")
                + f": bound by {j['bound']}",
            ),
            ("at best", f"{j['examples_per_second']:,.0f} examples/s, {j['examples_per_second_per_chip']:.2f} a chip"),
            ("the run", f"{self.train_steps:,} steps: {j['days']:.2f} days, {j['chip_hours']:,.0f} chip-hours at best"),
        ]

    def advice(self) -> str:
        """What would make a step fit that does not, the cheapest first."""
        knobs = []
        if self.mesh.get("data", 1) > 1:
            kept = gigabytes(self.state_bytes)
            knobs.append(
                f"mesh.fsdp={self.devices} mesh.data=1 shares out a state of {kept} that each device holds whole"
            )
        if self.global_batch > self.devices:
            knobs.append("microbatches=2 computes the batch in two halves")
        knobs += ["network.remat='blocks' keeps the inputs of each block alone", "a smaller batch_size, or more chips"]
        return "; ".join(knobs)


def gigabytes(count: float) -> str:
    """ "1.50 GB", or megabytes below one."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def tera(count: float) -> str:
    """ "1.50 T", or "1.50 G" below one."""
    return f"{count / 1e12:.3g} T" if count >= 1e12 else f"{count / 1e9:.3g} G"


def tree_bytes(tree: Tree) -> int:
    """Of all arrays of a tree, whole."""
    return sum(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def plan_step(
    lowered: Any,
    where: Topology,
    mesh: Mesh,
    *,
    bucket: str,
    global_batch: int,
    state: Tree,
    train_steps: int,
    part: str = "",
) -> Plan:
    """Compiles a lowered step and reads what it needs and costs.

    Args:
        lowered: a `jax.stages.Lowered` on a mesh over the devices of `where`.
        where: the topology.
        mesh: over its devices.
        bucket, global_batch: the batch that it was lowered for.
        state: the state's tree of shapes, for the size of a checkpoint.
        train_steps: in the run.
        part: what of the step it is; "" for the whole.
    """
    facts: dict[str, Any] = {
        "topology": where.name,
        "chip": where.chip.name,
        "chips": where.chips,
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        "bucket": bucket,
        "global_batch": global_batch,
        "hbm_bytes": int(where.chip.hbm_bytes / where.chip.devices),
        "state_bytes": tree_bytes(state),
        "train_steps": train_steps,
        "part": part,
        "versions": {"jax": jax.__version__, "libtpu": _libtpu_version()},
    }
    begin = time.perf_counter()
    try:
        with _no_compilation_cache():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Plan(**facts, fits=False, peak_bytes=_needed(str(error)), compile_seconds=time.perf_counter() - begin)
    seconds = time.perf_counter() - begin
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    found = traffic(text)
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Plan(
        **facts,
        fits=True,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=held + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        flops=float(cost.get("flops", 0.0)) + found.repeated_flops,
        int8_flops=found.int8_flops,
        memory_bytes=found.memory_bytes,
        bytes_accessed=float(cost.get("bytes accessed", 0.0)),
        collectives=collectives(text, where.slices),
        compile_seconds=seconds,
    )


@contextlib.contextmanager
def _no_compilation_cache() -> Iterator[None]:
    """A program for chips that are not here can be written to JAX's cache and not be read from it."""
    before = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def _needed(refusal: str) -> int:
    """The most memory that a compiler's refusal speaks of: "(2.29T) exceeds available HBM (15.75G)"."""
    sizes = re.findall(r"([\d.]+)([KMGT])\b", refusal)
    return max((int(float(n) * 1024 ** ("KMGT".index(unit) + 1)) for n, unit in sizes), default=0)


def _libtpu_version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return "none"
