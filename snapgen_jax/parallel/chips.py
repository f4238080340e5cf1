"""What chips can do at most: the denominators of every utilisation that we state.

Dense arithmetic, one chip (not one core). Bandwidths are those that the maker publishes; the best that
micro-benchmarks reach is some 85 to 90% of them.
"""

from __future__ import annotations

import dataclasses

GB = 1e9
_CLOUD = "https://cloud.google.com/tpu/docs/"
_BOOK = "https://jax-ml.github.io/scaling-book/tpus"
_V5E, _V5P, _V6E = ("TPU v5 lite", "TPU v5e"), ("TPU v5", "TPU v5p"), ("TPU v6 lite", "TPU v6e")


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one chip.

    Attributes:
        name: as topologies are called, "v5e".
        flops: bfloat16 operations a second.
        hbm_bytes: memory of the chip.
        hbm_bandwidth: bytes a second between it and the chip.
        link_bandwidth: bytes a second over one link between chips, both directions together.
        devices: JAX devices in one chip.
        kinds: what `device_kind` calls it.
        source: where the figures stand.
        int8_flops: operations a second on int8; those on bfloat16 where the maker states none.
        network_bandwidth: bytes a second that a chip's share of its host sends to another slice over the data centre's
            network; 0 where the maker states none.
    """

    name: str
    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    devices: int
    kinds: tuple[str, ...]
    source: str
    int8_flops: float = 0.0
    network_bandwidth: float = 0.0

    def __post_init__(self) -> None:
        if not self.int8_flops:
            object.__setattr__(self, "int8_flops", self.flops)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * 2**30, 1228 * GB, 90 * GB, 1, ("TPU v4",), f"{_CLOUD}v4; link: {_BOOK}", 275e12),
        Chip("v5e", 197e12, 16 * 2**30, 819 * GB, 100 * GB, 1, _V5E, f"{_CLOUD}v5e; {_BOOK}", 393e12, 3.125 * GB),
        Chip("v5p", 459e12, 95 * 2**30, 2765 * GB, 200 * GB, 1, _V5P, f"{_CLOUD}v5p; {_BOOK}", 918e12, 6.25 * GB),
        Chip("v6e", 918e12, 32 * 2**30, 1638 * GB, 200 * GB, 1, _V6E, f"{_CLOUD}v6e; {_BOOK}", 1836e12, 12.5 * GB),
        Chip("tpu7x", 2307e12, 192 * 2**30, 7380 * GB, 200 * GB, 2, ("TPU7x", "TPU v7x"), f"{_CLOUD}tpu7x"),
    )
}


@dataclasses.dataclass(frozen=True)
class Roofline:
    """What a program needs of one JAX device of a chip, and how long that takes at the chip's peaks.

    Attributes:
        chip: whose peaks.
        flops: operations, as XLA counts them in the compiled program: recomputation is in it.
        bytes_accessed: of memory, likewise.
        wire_bytes: sent over links.
        int8_flops: those of `flops` that are products of int8.
        network_bytes: sent to other slices.
    """

    chip: Chip
    flops: float
    bytes_accessed: float
    wire_bytes: float = 0.0
    int8_flops: float = 0.0
    network_bytes: float = 0.0

    @property
    def times(self) -> dict[str, float]:
        """Seconds that each resource takes by itself: "compute", "hbm", "links", and "network" between slices.

        Raises:
            ValueError: there are several slices, and the maker does not say how fast a chip reaches another.
        """
        chip, at_bfloat16 = self.chip, self.flops - self.int8_flops
        return {
            "compute": chip.devices * (at_bfloat16 / chip.flops + self.int8_flops / chip.int8_flops),
            "hbm": self.bytes_accessed * chip.devices / chip.hbm_bandwidth,
            "links": self.wire_bytes / chip.link_bandwidth,
            **({"network": self.network_bytes / network_bandwidth(chip)} if self.network_bytes else {}),
        }

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(self.times, key=lambda name: self.times[name])

    @property
    def seconds(self) -> float:
        """The least time that the program can take: all resources overlap wholly."""
        return max(self.times.values())


def network_bandwidth(chip: Chip) -> float:
    """Bytes a second that a chip sends to another slice.

    Raises:
        ValueError: the maker does not say.
    """
    if not chip.network_bandwidth:
        raise ValueError(f"no bandwidth between slices of {chip.name} is published; plan one slice")
    return chip.network_bandwidth


def chip_of(name: str) -> Chip:
    """The chip of that name.

    Raises:
        ValueError: it is unknown; names those that are known.
    """
    if name not in CHIPS:
        raise ValueError(f"unknown chip {name!r}; known: {', '.join(CHIPS)}")
    return CHIPS[name]


def chip_of_kind(device_kind: str) -> Chip | None:
    """The chip that calls itself so, or None where its peaks are not in the table (a CPU, a GPU)."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.kinds), None)
