"""A detector that can be differentiated: what an image shows, as densities, and how far that is from what is demanded.

A density map (Lempitsky and Zisserman 2010, "Learning to count objects in images") has its mass at the centres of
objects, and so much of it as there are objects. There is one for each kind and colour. What a text demands is counted
in it: how many of each, nothing else, and where the first lies as seen from the second.

    R = 1 / (1 + E),   E = sum_i c(s_i, n_i) + h(s_rest) + r

s_i is the mass of demand i and n_i its number, s_rest the mass of all that is not demanded; h measures a difference of
numbers, in units of half an object, and c = h + `LOG_WEIGHT` log^2; r is the relation's. So R > 1/2 says that in all
less than half an object is wrong. R falls as 1 / E and not as exp(-E), and the logarithm finds a gradient where next to
nothing is seen: an image with everything wrong still learns what to show first.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.sharding import PartitionSpec

from snapgen_jax.networks.layers import Conv, GroupNorm
from snapgen_jax.networks.matching import Stage
from snapgen_jax.networks.module import Preset, Rules, compute_dtype, shard

__all__ = ["Detection", "DetectionConfig", "Evidence"]

MOST = 4  # objects of a demand
DEMAND = 3  # numbers of a demand: kind, colour, count
# From a to b, where a is left of b, right of it, above it, and below it.
DIRECTIONS = ((1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0))
HALF = 0.5  # of an object, where h is one
ROUND = 0.25  # objects, below which h is a square and above which it is a line
LOG_WEIGHT, LEAST = 0.02, 1e-5
MARGIN = 0.04  # of the side of an image: what it takes for a relation to be clear
EMPTY = -7.0  # first bias: next to no object in a cell


@dataclasses.dataclass(frozen=True)
class DetectionConfig(Preset):
    """Architecture of a `Detection`. The defaults are those of the shapes world.

    Attributes:
        kinds, colours: how many there are. Their numbers begin at 1, since 0 is for none.
        demands: how many demands a text may make.
        image_size: side to which images are resized, in pixels.
        channels: widths of the convolutions; each stage has half the height and width of the one before it.
        blocks: residual blocks of a stage.
        groups: of the norms between convolutions.
        dtype: platform choice, fixed by `module.for_platform`.
    """

    kind: Literal["detection"] = "detection"
    kinds: int = 6
    colours: int = 8
    demands: int = 3
    image_size: int = 32
    channels: tuple[int, ...] = (32, 64)
    blocks: int = 1
    groups: int = 16
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "smoke": {"image_size": 8, "channels": (8,), "groups": 4},
        "shapes": {},
    }

    def __post_init__(self):
        factor = 2 ** len(self.channels)
        if not self.channels or self.image_size % factor:
            raise ValueError(
                f"DetectionConfig: channels={self.channels} halve the image {len(self.channels)} times, and "
                f"image_size={self.image_size} does not divide by {factor}; give at least one width, and such a size"
            )
        if wrong := [width for width in self.channels if width % self.groups]:
            raise ValueError(f"DetectionConfig: groups={self.groups} do not divide channels={wrong}; change one")
        if min(self.kinds, self.colours, self.demands) < 1:
            raise ValueError(
                f"DetectionConfig: kinds={self.kinds}, colours={self.colours} and demands={self.demands} count what "
                "there is; give at least 1 of each"
            )

    @property
    def cells(self) -> int:
        """Side of a density map, in cells."""
        return self.image_size // 2 ** len(self.channels)

    @property
    def length(self) -> int:
        """L, how many numbers say what is demanded."""
        return DEMAND * self.demands + 1

    @property
    def demand_ids(self) -> int:
        """Every number that says what is demanded is smaller."""
        return 1 + max(self.kinds, self.colours, MOST, len(DIRECTIONS))

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Creates the network with freshly drawn parameters."""
        return Detection(self, rngs)

    def rules(self) -> Rules:
        """How its parameters are split over a mesh; the first match wins."""
        return [(r"conv\w*/kernel$", PartitionSpec(None, None, None, "fsdp"))]

    def input_spec(
        self, batch: int = 1, height: int | None = None, width: int | None = None, tokens: int = 77
    ) -> tuple[jax.ShapeDtypeStruct, ...]:
        """`ShapeDtypeStruct`s of a `Detection`'s positional arguments: images and demands; `tokens` has no say."""
        del tokens
        height, width = (self.image_size if side is None else side for side in (height, width))
        images = jax.ShapeDtypeStruct((batch, height, width, 3), jnp.float32)
        return images, jax.ShapeDtypeStruct((batch, self.length), jnp.int32)


class Evidence(NamedTuple):
    """What a detector says of each cell.

    Attributes:
        mass: `[B, H, W]` float32 > 0, how many centres of objects a cell holds.
        log_kind: `[B, H, W, K]` float32, logarithm of the probability of each kind.
        log_colour: `[B, H, W, C]` float32, logarithm of the probability of each colour.
    """

    mass: jax.Array
    log_kind: jax.Array
    log_colour: jax.Array

    def density(self) -> jax.Array:
        """`[B, H, W, K * C]` float32 >= 0; channel `k * C + c` is that of kind k and colour c."""
        each = jnp.exp(self.log_kind[..., :, None] + self.log_colour[..., None, :])
        return self.mass[..., None] * rearrange(each, "b h w k c -> b h w (k c)")


class Detection(nnx.Module):
    """Images and demands to rewards. Build it through `networks.module.build`."""

    def __init__(self, config: DetectionConfig, rngs: nnx.Rngs):
        dtype, last = compute_dtype(config), config.channels[-1]
        self.config = config
        self.stages = nnx.List(
            [
                Stage(before, after, config, rngs)
                for before, after in zip((3, *config.channels[:-1]), config.channels, strict=True)
            ]
        )
        self.norm = GroupNorm(last, config.groups, dtype=dtype)
        self.conv_mass = Conv(last, 1, 1, dtype=dtype, rngs=rngs)
        self.conv_kind = Conv(last, config.kinds, 1, dtype=dtype, rngs=rngs)
        self.conv_colour = Conv(last, config.colours, 1, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array, demands: jax.Array) -> jax.Array:
        """How well images show what is demanded of them, and nothing else.

        Args:
            images: `[B, H, W, 3]` float32 in [0, 1], of any size.
            demands: `[B, L]` int32: for each demand a kind, a colour or 0 for any, and a number, all of them 0 for no
                demand; and a relation of the first to the second, 0 for none, as `data.shapes_demands` writes them.

        Returns:
            `[B]` float32 in (0, 1); 1/2 without a gradient where nothing is demanded.
        """
        return self.reward(self.density(images), demands)

    def density(self, images: jax.Array) -> jax.Array:
        """Density maps `[B, h, w, K * C]` float32 >= 0 of images as in a call; h and w are `cells`."""
        return self.see(images).density()

    def see(self, images: jax.Array) -> Evidence:
        """What there is in images as in a call, in `cells` x `cells` cells."""
        size = self.config.image_size
        if images.shape[1:3] != (size, size):
            images = jax.image.resize(images, (len(images), size, size, 3), "linear", antialias=True)
        x = shard(2 * images - 1, "image")
        for stage in self.stages:
            x = stage(x)
        x = jax.nn.silu(self.norm(x))
        mass = jax.nn.softplus(self.conv_mass(x)[..., 0].astype(jnp.float32) + EMPTY)
        kind, colour = (conv(x).astype(jnp.float32) for conv in (self.conv_kind, self.conv_colour))
        return Evidence(mass, jax.nn.log_softmax(kind, axis=-1), jax.nn.log_softmax(colour, axis=-1))

    def reward(self, density: jax.Array, demands: jax.Array) -> jax.Array:
        """R `[B]` of density maps, see the top of this file."""
        config = self.config
        groups = demands[:, :-1].reshape(-1, config.demands, DEMAND)
        kind, colour, number = groups[..., 0], groups[..., 1], groups[..., 2].astype(jnp.float32)
        of_kind = kind[..., None] == 1 + jnp.arange(config.kinds)  # [B, G, K]
        of_colour = (colour == 0)[..., None] | (colour[..., None] == 1 + jnp.arange(config.colours))
        wanted = of_kind[..., :, None] & of_colour[..., None, :]
        wanted = rearrange(wanted, "b g k c -> b g (k c)").astype(jnp.float32)
        masses = density.sum((1, 2))  # [B, KC]
        found = jnp.einsum("bgc,bc->bg", wanted, masses)
        rest = jnp.sum(masses * (1 - wanted.max(axis=1)), axis=-1)
        logarithm = jnp.log((found + LEAST) / (number + LEAST))
        counted = jnp.where(kind > 0, difference(found - number) + LOG_WEIGHT * jnp.square(logarithm), 0).sum(axis=-1)
        error = counted + difference(rest) + self._related(density, wanted[:, :2], demands[:, -1])
        return jnp.where((kind > 0).any(axis=-1), 1 / (1 + error), 0.5)

    def _related(self, density: jax.Array, wanted: jax.Array, relation: jax.Array) -> jax.Array:
        """`[B]`: minus log2 of the probability that the relation holds between the centres of two masses."""
        if self.config.demands < 2:
            return jnp.zeros(len(density))
        pairs = jnp.einsum("bgc,bhwc->bghw", wanted, density)
        centres = [_centre(pairs[:, i]) for i in (0, 1)]
        between = centres[1] - centres[0]  # [B, 2]
        directions = jnp.asarray(((0.0, 0.0), *DIRECTIONS))
        along = jnp.sum(directions[relation] * between, axis=-1)
        apart = jnp.sqrt(jnp.sum(jnp.square(between), axis=-1) + 1e-6)
        margin = along - 0.5 * apart  # as `data.shapes.holds` has it
        return jnp.where(relation > 0, jax.nn.softplus(-margin / MARGIN) / math.log(2), 0)


def difference(x: jax.Array) -> jax.Array:
    """h: 0 at 0, 1 at half an object, a square near 0 and a line far from it (the pseudo-Huber loss)."""

    def rounded(x: Any) -> Any:
        return (1 + (x / ROUND) ** 2) ** 0.5 - 1

    return rounded(x) / rounded(HALF)


def _centre(mass: jax.Array) -> jax.Array:
    """Centre (x, y) `[B, 2]` of masses `[B, H, W]`, from 0 to 1 across the image."""
    height, width = mass.shape[1:]
    total = mass.sum((1, 2)) + 1e-12
    across = jnp.sum(mass.sum(1) * (jnp.arange(width) + 0.5), axis=-1) / (width * total)
    down = jnp.sum(mass.sum(2) * (jnp.arange(height) + 0.5), axis=-1) / (height * total)
    return jnp.stack([across, down], axis=-1)
