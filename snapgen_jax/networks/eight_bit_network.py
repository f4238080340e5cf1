"""A frozen network whose linear layers of tokens compute in eight bits (see `networks/eight_bits.py`).

It is the network of another config with other parameters: where that has `kernel`, this has `kernel` in eight bits and
`kernel_scale`. All else, and which layers those are, is the other's.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from snapgen_jax.networks.eight_bits import SCALE, Format, quantise_kernel
from snapgen_jax.networks.layers import Linear
from snapgen_jax.networks.module import Network, Path, Rules, Tree, build, flatten, part_name, unflatten
from snapgen_jax.networks.wrapped import WrappedConfig


@dataclasses.dataclass(frozen=True)
class EightBitConfig(WrappedConfig):
    """The config of such a network.

    Attributes:
        network: config of the network as it was trained, with its platform choices fixed.
        form: of the kernels and of what they are multiplied by.
    """

    form: Format

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Creates the network and rounds it."""
        module = self.network.module(rngs)
        for path, node in list(nnx.iter_graph(module)):
            if isinstance(node, Linear) and self._rounds("/".join(map(part_name, path))):
                kernel, scale = quantise_kernel(node.kernel[...], self.form)
                node.kernel, node.kernel_scale = nnx.Param(kernel), nnx.data(nnx.Param(scale))
        return module

    def _rounds(self, layer: str) -> bool:
        return re.search(self.network.EIGHT_BITS, layer) is not None

    def rules(self) -> Rules:
        """Those of the network, and for the scales of a kernel what its rule says of its outputs."""
        scales = []
        for pattern, spec in self.network.rules():
            if pattern.endswith("kernel$") and len(spec) > 1:
                placed = PartitionSpec(*spec[:-2], spec[-1])
                scales.append((pattern.removesuffix("kernel$") + rf"{SCALE}$", placed))
        return [*self.network.rules(), *scales]

    def kernels(self) -> tuple[Path, ...]:
        """The paths of the kernels that are in eight bits."""
        _, spec = build(self)
        return tuple((*path[:-1], "kernel") for path in flatten(spec) if path[-1] == SCALE)

    def rounded(self, kernels: dict[Path, jax.Array]) -> Tree:
        """`kernels()` of the network as it was trained, `{path: [..., in, out]}`, in eight bits with their scales: a
        part of the parameter tree. To be jitted."""
        flat = {}
        for path, kernel in kernels.items():
            flat[path], flat[*path[:-1], SCALE] = quantise_kernel(kernel, self.form)
        return unflatten(flat)


def in_precision(config: Any, precision: Literal["compute"] | Format) -> Any:
    """The config itself where it computes in its own dtype, else that of the network in eight bits."""
    return config if precision == "compute" else EightBitConfig(config, precision)


def as_trained(network: Network) -> Network:
    """The network that a network in eight bits was made of."""
    return build(network.config.network)[0]
