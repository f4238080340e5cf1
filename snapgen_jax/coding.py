"""Image files to latents and back, by the codec of a trained run or by published weights."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import cast

import jax
import numpy as np
from etils import epath

from snapgen_jax.data.images import decode
from snapgen_jax.generation import load
from snapgen_jax.networks.codec import Codec, CodecConfig, build_codec, from_uint8, to_uint8
from snapgen_jax.networks.module import Platform
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.weights.frozen import load_codec
from snapgen_jax.weights.maps import sd3_autoencoder
from snapgen_jax.weights.published import read_config_file


def codec_of_run(workdir: epath.PathLike, decoder: epath.PathLike | None = None) -> Codec:
    """The codec of a trained run: of an autoencoder, of a tiny decoder, or of a generator.

    Args:
        workdir: the run.
        decoder: a run of a tiny decoder that takes the place of the codec's own decoder; a generator's only.

    Raises:
        ConfigError: there is no run, no checkpoint, or the decoder does not fit.
    """
    generator = load(workdir, decoder=decoder)
    return generator.recipe.codec(generator.params, generator.frozen)


def codec_of_weights(folder: epath.PathLike) -> Codec:
    """A published autoencoder, from its folder with `config.json` and safetensors.

    Raises:
        ConfigError: the folder holds none that we can read.
    """
    try:
        network = read_config_file(pathlib.Path(folder) / "config.json", sd3_autoencoder.read_config)
    except ValueError as error:
        raise ConfigError(f"{folder} is no folder of a published autoencoder: {error}") from error
    config = CodecConfig("autoencoder", autoencoder=network, workdir=str(folder))
    codec = build_codec(config, cast(Platform, jax.default_backend()))
    return codec.bind(load_codec(config, codec))


def encode_files(codec: Codec, paths: Sequence[str]) -> dict[str, np.ndarray]:
    """Image files to `{file name without its ending: float32 [h, w, c]}`. Of a side that the codec does not divide, the
    surplus pixels are cut, as many at either end.

    Raises:
        ConfigError: two files share a name, or one is too small.
        UnreadableExampleError: a file is no image.
    """
    latents: dict[str, np.ndarray] = {}
    encode = jax.jit(lambda codec, image: codec.encode(from_uint8(image)[None])[0])
    unit = _unit(codec)
    for path in paths:
        name = pathlib.PurePath(path).stem
        if name in latents:
            raise ConfigError(
                f"two images are called {name!r}, and latents are kept by name; rename one, or encode apart"
            )
        image = decode(path)
        height, width = (side // unit * unit for side in image.shape[:2])
        if not height or not width:
            raise ConfigError(
                f"{path} has {image.shape[0]} x {image.shape[1]} px; the codec takes {unit} px a side or more"
            )
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        latents[name] = np.asarray(encode(codec, image[top : top + height, left : left + width]))
    return latents


def decode_latents(codec: Codec, latents: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`{name: [h, w, c]}` to `{name: uint8 [H, W, 3]}`.

    Raises:
        ConfigError: an array is no latent of this codec.
    """
    channels = codec.latent_shape(_unit(codec))[-1]
    images = {}
    run = jax.jit(lambda codec, latent: to_uint8(codec.decode(latent[None])[0]))
    for name, latent in latents.items():
        if latent.ndim != 3 or latent.shape[-1] != channels:
            raise ConfigError(f"{name!r} has shape {latent.shape}; this codec's latents are [h, w, {channels}]")
        images[name] = np.asarray(run(codec, latent.astype(np.float32)))
    return images


def _unit(codec: Codec) -> int:
    """Side, in pixels, of what becomes one latent pixel."""
    described = codec.describe()
    return int(described.get("reduction") or described.get("patch") or 1)
