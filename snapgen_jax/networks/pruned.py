"""A decoder of fewer channels: the network, and its first weights from those of the whole one.

    config = PrunedDecoderConfig.preset("sd1", keep=0.5)
    params = pruned(config, autoencoder_params)      # of build(config)

SnapFusion (arXiv 2306.00980, section 3.3) prunes the decoder of Stable Diffusion evenly to half of its channels, which
leaves a quarter of its parameters. The paper does not say which channels stay. Here they are those whose weights have
the largest L1 norm, in whole groups of the GroupNorms, so that a norm still sees all that it normalises together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from snapgen_jax.networks.autoencoder import AutoencoderConfig, Decoder, Statistics
from snapgen_jax.networks.module import Preset, Rules, Tree, flatten, part_name, unflatten
from snapgen_jax.networks.tiling import decode_tiled

__all__ = ["PrunedDecoder", "PrunedDecoderConfig", "pruned"]

_ALL = ""  # channels of which all stay: those of latents and colours


@dataclasses.dataclass(frozen=True)
class PrunedDecoderConfig(Preset):
    """Architecture of a `PrunedDecoder`.

    Attributes:
        autoencoder: whose decoder is pruned; it has the widths of the whole one.
        keep: share of the channels of every layer that stay. Whole groups of the GroupNorms stay, so `keep` times
            `autoencoder.groups` must be a whole number.
    """

    kind: Literal["pruned_decoder"] = "pruned_decoder"
    autoencoder: AutoencoderConfig = AutoencoderConfig.preset("sd1")
    keep: float = 0.5

    def __post_init__(self) -> None:
        groups = self.keep * self.autoencoder.groups
        if not 0 < self.keep <= 1 or groups != round(groups):
            raise ValueError(
                f"PrunedDecoderConfig: keep={self.keep} of {self.autoencoder.groups} groups is {groups:g}; whole "
                "groups stay: choose a share above 0 and at most 1 that gives a whole number of them"
            )

    @property
    def narrow(self) -> AutoencoderConfig:
        """The autoencoder's config with the channels and groups that stay."""
        whole, groups = self.autoencoder, round(self.keep * self.autoencoder.groups)
        widths = tuple(width // whole.groups * groups for width in whole.channels)
        return dataclasses.replace(whole, channels=widths, groups=groups)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return self.autoencoder.latent_channels

    @property
    def reduction(self) -> int:
        """Side, in pixels, of the square that one latent pixel becomes."""
        return self.autoencoder.reduction

    @property
    def dtype(self) -> Literal["auto", "float32", "bfloat16"]:
        """In which it computes."""
        return self.autoencoder.dtype

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """Creates the decoder with freshly drawn parameters."""
        return PrunedDecoder(self, rngs)

    def rules(self) -> Rules:
        """How its parameters are split over a mesh; the first match wins."""
        return self.autoencoder.rules()

    def input_spec(self, batch: int = 1, height: int = 32, width: int = 32) -> tuple[Any, ...]:
        """Shapes of the positional arguments of a `PrunedDecoder`: normalised latents."""
        return (jax.ShapeDtypeStruct((batch, height, width, self.latent_channels), jnp.float32),)

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        name: {"autoencoder": AutoencoderConfig.preset(name)} for name in AutoencoderConfig.PRESETS
    }


class PrunedDecoder(Decoder):
    """Normalised latents to images. Build it through `networks.module.build`; `TinyDecoderCodec` makes it a `Codec`."""

    def __init__(self, config: PrunedDecoderConfig, rngs: nnx.Rngs):
        self.config = config.narrow
        super().__init__(self.config, rngs)
        measured = self.config.normalisation == "measured"
        self.statistics = Statistics(self.config.latent_channels) if measured else None

    def __call__(self, z: jax.Array) -> jax.Array:
        """`[B, h, w, c]` -> `[B, H, W, 3]` float32; in tiles where a side exceeds `config.tile`. No gradient moves the
        statistics of the latents."""
        config = self.config
        if self.statistics is None:
            z = z / config.scale + config.shift
        else:
            mean, deviation = (jax.lax.stop_gradient(x[...]) for x in (self.statistics.bias, self.statistics.scale))
            z = z * deviation + mean
        return decode_tiled(super().__call__, z, tile=config.tile, overlap=config.tile_overlap)


def pruned(config: PrunedDecoderConfig, params: Tree) -> Tree:
    """The channels of a decoder whose weights are largest.

    Channels that are added to each other, those of a residual stream, stay or go together: what counts is the sum of
    the L1 norms of all that makes them.

    Args:
        config: of the pruned decoder.
        params: of an `Autoencoder` of `config.autoencoder`; its encoder is not looked at.

    Returns:
        the parameters of a `PrunedDecoder`.

    Raises:
        ValueError: `params` are of another autoencoder.
    """
    flat, layers = flatten(params["decoder"]), dict(_layers(config.autoencoder))
    if flat.keys() - {(*path, leaf) for path in layers for leaf in ("kernel", "bias", "scale")}:
        raise ValueError("the decoder has other layers than its config describes; prune it with the config it has")
    norms: dict[str, jax.Array] = {}
    for path, (_, makes) in layers.items():
        if (*path, "kernel") in flat and makes != _ALL:
            kernel = flat[*path, "kernel"]
            norms[makes] = norms.get(makes, 0) + jnp.sum(jnp.abs(kernel), axis=range(kernel.ndim - 1))
    groups = config.autoencoder.groups
    kept = {space: _largest(norm, groups, config.narrow.groups) for space, norm in norms.items()}

    def prune(path: tuple[str, ...], leaf: jax.Array) -> jax.Array:
        reads, makes = layers[path[:-1]]
        leaf = leaf if makes == _ALL else jnp.take(leaf, kept[makes], axis=-1)
        return leaf if path[-1] != "kernel" or reads == _ALL else jnp.take(leaf, kept[reads], axis=-2)

    statistics = {"statistics": params["statistics"]} if "statistics" in params else {}
    return {**unflatten({path: prune(path, leaf) for path, leaf in flat.items()}), **statistics}


def _largest(norm: jax.Array, groups: int, count: int) -> jax.Array:
    """The channels, in order, of those `count` of some groups whose norms are largest."""
    size = norm.shape[0] // groups
    chosen = jnp.sort(jnp.argsort(-norm.reshape(groups, size).sum(axis=1), stable=True)[:count])
    return (chosen[:, None] * size + jnp.arange(size)).reshape(-1)


def _layers(config: AutoencoderConfig) -> Iterator[tuple[tuple[str, ...], tuple[str, str]]]:
    """Path of each layer of a decoder, and the channels that it reads and makes; equal names are the same channels,
    which a residual adds or a norm scales."""

    def named(path: str) -> tuple[str, ...]:
        return tuple(path.split("/"))

    def residual(path: str, before: str, after: str) -> Iterator[tuple[tuple[str, ...], tuple[str, str]]]:
        inner = f"{path}/conv_1"
        yield named(f"{path}/norm_1"), (before, before)
        yield named(f"{path}/conv_1"), (before, inner)
        yield named(f"{path}/norm_2"), (inner, inner)
        yield named(f"{path}/conv_2"), (inner, after)
        if before != after:
            yield named(f"{path}/skip"), (before, after)

    if config.quantisation == "convolutions":
        yield named("quantisation"), (_ALL, _ALL)
    stream, width = "conv_in", config.channels[-1]
    yield named("conv_in"), (_ALL, stream)
    yield from residual("middle/residual_1", stream, stream)
    attention, scores, values = "middle/attention", "scores", "values"
    yield named(f"{attention}/norm"), (stream, stream)
    yield named(f"{attention}/query"), (stream, scores)
    yield named(f"{attention}/key"), (stream, scores)
    yield named(f"{attention}/value"), (stream, values)
    yield named(f"{attention}/out"), (values, stream)
    yield from residual("middle/residual_2", stream, stream)
    for i, channels in enumerate(reversed(config.channels)):
        stage = f"stages/{part_name(i)}"
        for j in range(config.layers + 1):
            path = f"{stage}/residuals/{part_name(j)}"
            after = stream if channels == width else path
            yield from residual(path, stream, after)
            stream, width = after, channels
        if i < len(config.channels) - 1:
            yield named(f"{stage}/sampler"), (stream, f"{stage}/sampler")
            stream = f"{stage}/sampler"
    yield named("norm_out"), (stream, stream)
    yield named("conv_out"), (stream, _ALL)
