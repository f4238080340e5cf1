"""What the kinds of example that are images share: their specs, and a codec among the networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from snapgen_jax.inputs._export import decoder_unit
from snapgen_jax.inputs.interfaces import Networks, Tree, prefixed, subtree
from snapgen_jax.networks.codec import Codec, CodecConfig, build_codec, from_uint8, to_uint8
from snapgen_jax.networks.module import Network, Platform
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.exports import ExportUnit
from snapgen_jax.weights.frozen import load_codec

CODEC = "codec"
Size = tuple[int, int]


def bucket_name(size: Size) -> str:
    """The bucket of images of a size."""
    return f"{size[0]}x{size[1]}"


def image_specs(
    batch_size: int, sizes: Sequence[Size], others: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """One bucket per image size: `image` uint8 `[B, H, W, 3]`, and the other arrays."""
    return {
        bucket_name((h, w)): {"image": jax.ShapeDtypeStruct((batch_size, h, w, 3), jnp.uint8), **others}
        for h, w in sizes
    }


class ImageCodec:
    """A codec whose parameters lie among the roles of a recipe: as "codec", or below it where it has two networks."""

    def __init__(self, config: CodecConfig, platform: Platform, sizes: Sequence[Size]):
        """Raises `ValueError` where an image size does not divide as the codec needs, or no size is given."""
        self.config, self.platform, self.sizes = config, platform, tuple(sizes)
        self.codec = build_codec(config, platform)
        if not sizes:
            raise ValueError("image_sizes is empty; give at least one (height, width)")
        for size in sizes:
            self.codec.latent_shape(size)

    def networks(self) -> dict[str, Network]:
        """`{role: network}`; `{}` for a codec that is no network."""
        return {f"{CODEC}/{part}" if part else CODEC: network for part, network in self.codec.networks().items()}

    def load(self, mesh: Mesh | None) -> dict[str, Tree]:
        """Reads the weights that the config names: `{role: parameters}`.

        Raises:
            ConfigError: a run or folder is not named, is not there, or holds another network.
        """
        params = load_codec(self.config, self.codec, mesh)
        return {CODEC: params} if CODEC in self.networks() else prefixed(CODEC, params)

    def bind(self, networks: Networks) -> Codec:
        """The codec with its parameters."""
        roles = self.networks()
        return self.codec.bind(networks[CODEC] if CODEC in roles else subtree(networks, CODEC) if roles else {})

    def latent_shape(self, size: Size | None = None) -> tuple[int, int, int]:
        """`(h, w, c)` of the latent of an image size, by default of the first."""
        return self.codec.latent_shape(size or self.sizes[0])

    def encode(self, networks: Networks, images: jax.Array) -> jax.Array:
        """uint8 `[B, H, W, 3]` to latents, float32 `[B, h, w, c]`."""
        return self.bind(networks).encode(from_uint8(images)).astype(jnp.float32)

    def decode(self, networks: Networks, x_0: jax.Array) -> dict[str, Any]:
        """Latents to `{"image": uint8 [B, H, W, 3]}`."""
        return {"image": to_uint8(self.bind(networks).decode(x_0))}

    def describe(self) -> dict[str, Any]:
        """How a client makes pictures of latents, as plain JSON."""
        return self.codec.describe()

    def export_unit(self) -> ExportUnit | None:
        """The decoder, where the codec is a network."""
        return decoder_unit(self.config, self.latent_shape()) if self.networks() else None

    def check_run(self, workdir: str, inputs: Mapping[str, Any]) -> None:
        """Compares the latents with those of an earlier run, of which `inputs` is that section of its config.

        Raises:
            ConfigError: they differ.
        """
        ours = latents_of(vars(self.config))
        if (codec := inputs.get("codec")) is not None and latents_of(codec) != ours:
            raise ConfigError(
                f"the run {workdir!r} has the latents {latents_of(codec)}, and here are {ours}; make them equal, or "
                "let the teacher take latents of its own (teacher.inputs, teacher.takes) and distil features alone"
            )


def latents_of(codec: Mapping[str, Any]) -> dict[str, Any]:
    """What a codec's config says of its latents, as JSON has it."""
    named = {"identity": ("scale", "shift"), "patch": ("patch", "scale", "shift", "frequency_scale")}
    chosen = {name: codec.get(name) for name in ("kind", *named.get(codec["kind"], ()))}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()}


class OfImages:
    """The part of an `Inputs` that all kinds of images share: a codec makes latents of `image` and pictures of latents.

    Attributes:
        images: the codec.
    """

    images: ImageCodec

    def latent_shape(self, size: Size | None = None) -> tuple[int, ...]:
        """`(h, w, c)` of the latent of an image size."""
        return self.images.latent_shape(size)

    def clean(self, networks: Networks, batch: Tree) -> jax.Array:
        """The latents of the images."""
        return self.images.encode(networks, batch["image"])

    def decode(self, networks: Networks, x_0: jax.Array) -> dict[str, jax.Array]:
        """`{"image": uint8 [B, H, W, 3]}`."""
        return self.images.decode(networks, x_0)

    def codec(self, networks: Networks) -> Codec:
        """That of the config, with its parameters."""
        return self.images.bind(networks)

    def check_run(self, workdir: str, inputs: Mapping[str, Any], parts: Sequence[str]) -> None:
        """Raises `ConfigError` where an earlier run had other latents."""
        if "latent" in parts:
            self.images.check_run(workdir, inputs)

    def integer_bounds(self) -> dict[str, int]:
        """None: beside images and token ids there are no integers."""
        return {}

    def check_batch(self, arrays: Mapping[str, Any]) -> None:
        """Nothing: every value has a meaning."""
        del arrays

    def load_codec(self, roles: tuple[str, ...], mesh: Mesh | None) -> dict[str, Tree]:
        """Reads the codec, where it is among the roles."""
        return self.images.load(mesh) if any(role in roles for role in self.images.networks()) else {}
