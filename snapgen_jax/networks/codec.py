"""Images to latents and back: the interface, the codecs by config, and the two codecs that need no training.

`PatchCodec` turns each p x p patch of each colour channel by the orthonormal two-dimensional DCT-II. An image becomes p
times smaller on each side and 3 p^2 channels deep without loss. The transform is a rotation of the pixels: white noise
stays white, and a squared error stays the same number.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from snapgen_jax.bounds import FINITE, above, at_least, check
from snapgen_jax.networks.autoencoder import AutoencoderCodec, AutoencoderConfig
from snapgen_jax.networks.module import Network, Platform, Tree, build, for_platform
from snapgen_jax.networks.pruned import PrunedDecoderConfig
from snapgen_jax.networks.sizes import height_width
from snapgen_jax.networks.tiny_decoder import TinyDecoderCodec, TinyDecoderConfig

COLOURS = 3


class Codec(Protocol):
    """Between images, float32 `[..., H, W, 3]` in [-1, 1], and latents of about unit variance, `[..., h, w, c]`.

    A codec that is a network has parameters, which are an argument of every step: it is built without them, says their
    shapes by `spec`, and codes after `bind`. The others have none, `{}`.
    """

    def encode(self, images: jax.Array) -> jax.Array:
        """Images to latents."""
        ...

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents to images; values may leave [-1, 1] a little."""
        ...

    def latent_shape(self, image_size: int | tuple[int, int]) -> tuple[int, int, int]:
        """(h, w, c) of the latents of a square or (H, W) image."""
        ...

    def describe(self) -> dict[str, Any]:
        """What a client needs to decode without this library, as plain JSON."""
        ...

    def networks(self) -> dict[str, Network]:
        """Its networks, by where their parameters stand in `spec`: "" for a tree that is one network's."""
        ...

    def spec(self) -> Tree:
        """Shapes of the parameters that `bind` takes."""
        ...

    def bind(self, params: Tree) -> Codec:
        """The codec with its parameters."""
        ...


@dataclasses.dataclass(frozen=True)
class CodecConfig:
    """Which codec, and its normalisation `latents = scale * transform(images - shift)`.

    Attributes:
        kind: "identity" (latents are pixels), "patch" (orthonormal patch transform), or "autoencoder" (a network, which
            normalises as it was trained to).
        patch: side p of a patch in pixels; "patch" only.
        scale: 1 / standard deviation of the pixels, which the transform keeps. The defaults are those of the rendered
            shapes on their light background; photographs are near 2 and 0.
        shift: mean of the pixels, in [-1, 1].
        frequency_scale: further factors, one for each of the p^2 frequencies in row-major order (vertical, horizontal),
            to weigh detail against layout; empty means all one. "patch" only.
        autoencoder: the network of the kind "autoencoder".
        workdir: where its weights are: a run of the recipe `autoencoder`, or a folder of published weights.
        decoder: what decodes: the autoencoder's own decoder, or a tiny one.
        tiny_decoder: the network of the decoder "tiny"; it may be the autoencoder's with fewer channels.
        decoder_workdir: where its weights are: a run of the recipe `decoder_distillation`.
    """

    kind: Literal["identity", "patch", "autoencoder"] = "patch"
    patch: int = 4
    scale: float = 2.25
    shift: float = 0.7
    frequency_scale: tuple[float, ...] = ()
    autoencoder: AutoencoderConfig = AutoencoderConfig.preset("shapes")
    workdir: str = ""
    decoder: Literal["autoencoder", "tiny"] = "autoencoder"
    tiny_decoder: TinyDecoderConfig | PrunedDecoderConfig = TinyDecoderConfig.preset("shapes")
    decoder_workdir: str = ""

    def __post_init__(self) -> None:
        """Raises `ValueError` where weights are named that the kind does not read."""
        check(self, patch=at_least(1), scale=above(0), shift=FINITE, frequency_scale=above(0))
        kind, decoder = ("kind", "autoencoder"), ("decoder", "tiny")
        for name, wanted in {"workdir": (kind,), "decoder_workdir": (kind, decoder)}.items():
            unread = [(key, value) for key, value in wanted if getattr(self, key) != value]
            if getattr(self, name) and unread:
                needed = " and ".join(f"{key}={value!r}" for key, value in unread)
                raise ValueError(f"{name} is not read under this {unread[0][0]}; set {needed}, or leave {name} out")


def build_codec(config: CodecConfig, platform: Platform = "cpu") -> Codec:
    """The codec that a config describes, without parameters; `platform` is the one that its networks run on.

    Raises:
        ValueError: the kind is unknown, or the two networks of a codec do not fit each other.
    """
    match config.kind:
        case "identity":
            return IdentityCodec(config)
        case "patch":
            return PatchCodec(config)
        case "autoencoder":
            return _learned(config, platform)
        case other:
            raise ValueError(f"unknown codec {other!r}; expected 'identity', 'patch' or 'autoencoder'")


def _learned(config: CodecConfig, platform: Platform) -> Codec:
    large, tiny = config.autoencoder, config.tiny_decoder
    encoder = AutoencoderCodec(build(for_platform(large, platform))[0])
    if config.decoder == "autoencoder":
        return encoder
    for name in ("latent_channels", "reduction"):
        if getattr(large, name) != getattr(tiny, name):
            raise ValueError(
                f"the codec's autoencoder has {name} {getattr(large, name)} and its tiny_decoder {getattr(tiny, name)};"
                " a decoder takes the latents of the autoencoder that it was trained with: make them equal"
            )
    return TinyDecoderCodec(build(for_platform(tiny, platform))[0], encoder=encoder)


@dataclasses.dataclass(frozen=True)
class IdentityCodec:
    """Latents are the normalised pixels."""

    config: CodecConfig

    def encode(self, images: jax.Array) -> jax.Array:
        """`[..., H, W, 3]` -> `[..., H, W, 3]`."""
        return (images - self.config.shift) * self.config.scale

    def decode(self, latents: jax.Array) -> jax.Array:
        """The inverse of `encode`."""
        return latents / self.config.scale + self.config.shift

    def latent_shape(self, image_size: int | tuple[int, int]) -> tuple[int, int, int]:
        """(H, W, 3)."""
        return (*height_width(image_size), COLOURS)

    def describe(self) -> dict[str, Any]:
        """`images = latents / scale + shift`."""
        return {"kind": "identity", "scale": self.config.scale, "shift": self.config.shift}

    def networks(self) -> dict[str, Network]:
        """It has none."""
        return {}

    def spec(self) -> Tree:
        """It has no parameters."""
        return {}

    def bind(self, params: Tree) -> IdentityCodec:
        """Itself: it has no parameters."""
        del params
        return self


@dataclasses.dataclass(frozen=True)
class PatchCodec:
    """Latents are the DCT coefficients of p x p patches; channel = (vertical * p + horizontal) * 3 + colour."""

    config: CodecConfig

    def __post_init__(self) -> None:
        given, expected = len(self.config.frequency_scale), self.config.patch**2
        if given not in (0, expected):
            raise ValueError(
                f"frequency_scale has {given} entries; a patch of {self.config.patch} has {expected} frequencies"
            )

    def encode(self, images: jax.Array) -> jax.Array:
        """`[..., H, W, 3]` -> `[..., H/p, W/p, 3 p^2]`. Raises if p does not divide H and W."""
        *lead, height, width, _ = images.shape
        h, w, c = self.latent_shape((height, width))
        p = self.config.patch
        rows = (images - self.config.shift).reshape(-1, p, w, p * COLOURS)  # rank 4 all the way, for phones
        patches = rows.transpose(0, 2, 1, 3).reshape(*lead, h, w, c)
        return jnp.matmul(patches, self._analysis().T * self._gain(), precision="highest")

    def decode(self, latents: jax.Array) -> jax.Array:
        """The inverse of `encode`."""
        *lead, h, w, _ = latents.shape
        p = self.config.patch
        patches = jnp.matmul(latents, self._analysis() / self._gain()[:, None], precision="highest")
        rows = patches.reshape(-1, w, p, p * COLOURS).transpose(0, 2, 1, 3)
        return rows.reshape(*lead, h * p, w * p, COLOURS) + self.config.shift

    def latent_shape(self, image_size: int | tuple[int, int]) -> tuple[int, int, int]:
        """(H/p, W/p, 3 p^2). Raises if p does not divide H and W."""
        height, width = height_width(image_size)
        p = self.config.patch
        if height % p or width % p:
            raise ValueError(f"an image of {height} x {width} px does not divide into patches of {p}; change either")
        return height // p, width // p, COLOURS * p * p

    def describe(self) -> dict[str, Any]:
        """What a client replays, with the p x p matrix D[k, n] = sqrt((1 + [k>0]) / p) cos(pi (n + 1/2) k / p):
        divide the coefficient F[k, l] of each patch and colour by scale * frequency_scale[k p + l], turn it back by
        D^T F D, add the shift."""
        p = self.config.patch
        return {
            "kind": "patch",
            "transform": "dct2_orthonormal",
            "patch": p,
            "channel_order": ["vertical_frequency", "horizontal_frequency", "colour"],
            "scale": self.config.scale,
            "shift": self.config.shift,
            "frequency_scale": list(self.config.frequency_scale or (1.0,) * p**2),
        }

    def networks(self) -> dict[str, Network]:
        """It has none."""
        return {}

    def spec(self) -> Tree:
        """It has no parameters."""
        return {}

    def bind(self, params: Tree) -> PatchCodec:
        """Itself: it has no parameters."""
        del params
        return self

    def _analysis(self) -> np.ndarray:
        """`[3 p^2, 3 p^2]` orthonormal, coefficients from pixels."""
        d = dct_matrix(self.config.patch)
        return np.kron(np.kron(d, d), np.eye(COLOURS)).astype(np.float32)

    def _gain(self) -> np.ndarray:
        """`[3 p^2]` factor of each channel."""
        frequencies = np.asarray(self.config.frequency_scale or (1.0,) * self.config.patch**2)
        return np.repeat(self.config.scale * frequencies, COLOURS).astype(np.float32)


def dct_matrix(n: int) -> np.ndarray:
    """The orthonormal DCT-II, `[frequency, position]` float64: row k is a cosine of k half periods over n samples."""
    k, position = np.mgrid[:n, :n]
    d = np.sqrt(2 / n) * np.cos(np.pi * (position + 0.5) * k / n)
    d[0] /= np.sqrt(2)
    return d


def from_uint8(images: jax.Array) -> jax.Array:
    """Grey levels 0..255 to float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(images: jax.Array) -> jax.Array:
    """[-1, 1] to the nearest of the grey levels 0..255; values outside are clipped. The inverse of `from_uint8`."""
    return jnp.round(jnp.clip(images * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)
