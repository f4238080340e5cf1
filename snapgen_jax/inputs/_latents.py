"""What the kinds of example share whose latents were stored beforehand: their shapes, the text encoders that may run
inside the step all the same, and that nothing here decodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from snapgen_jax.inputs._images import Size, bucket_name
from snapgen_jax.inputs._text_encoders import TextEncoders
from snapgen_jax.inputs.interfaces import Networks, TokenizerSpec, Tree
from snapgen_jax.networks.codec import Codec
from snapgen_jax.networks.module import Network
from snapgen_jax.training.exits import ConfigError

LATENT = "latent"


class StoredLatents:
    """Latents `[h, w, c]` of images of some sizes, as an autoencoder left them."""

    def __init__(self, sizes: Sequence[Size], reduction: int, channels: int):
        """Raises `ValueError` where an image size does not divide by `reduction`, or no size is given."""
        self.sizes, self.reduction, self.channels = tuple(sizes), reduction, channels
        if not sizes:
            raise ValueError("image_sizes is empty; give at least one (height, width)")
        for size in sizes:
            self.shape(size)

    def shape(self, size: Size | None = None) -> tuple[int, int, int]:
        """`(h, w, c)` of the latent of an image size, by default of the first."""
        height, width = size or self.sizes[0]
        if height % self.reduction or width % self.reduction:
            raise ValueError(
                f"image size {(height, width)} does not divide by reduction={self.reduction}; change one of them"
            )
        return height // self.reduction, width // self.reduction, self.channels

    def specs(
        self,
        batch_size: int,
        others: Mapping[str, jax.ShapeDtypeStruct],
        prefix: str = "",
        dtype: Any = jnp.bfloat16,
    ) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """One bucket per image size: `latent` of that dtype `[B, h, w, c]`, where it has channels, and other arrays;
        each after the prefix."""

        def of(size: Size) -> dict[str, jax.ShapeDtypeStruct]:
            shape = (batch_size, *self.shape(size))
            latent = {LATENT: jax.ShapeDtypeStruct(shape, dtype)} if self.channels else {}
            return {f"{prefix}{name}": spec for name, spec in {**latent, **others}.items()}

        return {bucket_name(size): of(size) for size in self.sizes}


class OfLatents:
    """The part of an `Inputs` that these kinds share.

    Attributes:
        latents: the shapes.
        text: the text encoders, where token ids are stored and these run inside the step; None where states are.
    """

    latents: StoredLatents
    text: TextEncoders | None

    def latent_shape(self, size: Size | None = None) -> tuple[int, ...]:
        """`(h, w, c)` of the latent of an image size."""
        return self.latents.shape(size)

    def text_networks(self) -> dict[str, Network]:
        """The text encoders, where they run inside the step."""
        return {} if self.text is None else self.text.networks()

    def pretrained(self) -> tuple[str, ...]:
        """The text encoders, where they run inside the step."""
        return tuple(self.text_networks())

    def load(self, roles: tuple[str, ...], mesh: Mesh | None) -> dict[str, Tree]:
        """Reads the text encoders onto the mesh, where they run inside the step; or draws them as stand-ins."""
        return {} if self.text is None else self.text.load(roles, None, mesh)

    def tokenizers(self) -> dict[str, TokenizerSpec]:
        """Those of the text encoders, where they run inside the step."""
        return {} if self.text is None else self.text.tokenizers()

    def integer_bounds(self) -> dict[str, int]:
        """None: there are no integers."""
        return {}

    def decode(self, networks: Networks, x_0: jax.Array) -> dict[str, jax.Array]:
        """Nothing: the autoencoder is not here."""
        del networks, x_0
        return {}

    def codec(self, networks: Networks) -> Codec:
        """There is none.

        Raises:
            ConfigError: always, with what to do instead.
        """
        del networks
        raise ConfigError(
            "a run on stored latents holds no codec; name the autoencoder that made them (--weights, or its own run)"
        )

    def check_run(self, workdir: str, inputs: Mapping[str, Any], parts: Sequence[str]) -> None:
        """Nothing: a run does not say of what its stored latents and text states were made."""
        del workdir, inputs, parts

    def check_batch(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Nothing: every value has a meaning."""
        del arrays
