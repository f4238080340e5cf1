"""What a method and the data know about a kind of example: its arrays, its frozen networks, its conditions.

A recipe holds one `Inputs` object and is told nothing else about what it is fed. Imports nothing of ours, so that
`data/` may read a `TokenizerSpec`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh

Tree = Any
Networks = Mapping[str, Tree]
"""`{role: parameters}`, what `Recipe.weights` returns."""


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
    """The tokenizer that makes one array of token ids `[B, L]`, and the array of its mask.

    Attributes:
        kind: "trained" is a `tokenizer.json` of ours, trained on the captions of the data or kept by a run;
            "pretrained" is that of a published text encoder; "stand_in" makes ids of words that mean nothing, for an
            encoder that was drawn; "demands" gives what a caption of the shapes world demands, as numbers in place of
            ids (`data.shapes_demands`).
        length: L, tokens in a caption.
        vocab_size: how many ids the text encoder knows; every id must be smaller.
        workdir: "trained": the run whose `tokenizer.json` is used; "" trains a new one.
        folder: "pretrained": local folder of the tokenizer's files.
        like: "trained": another array of token ids, on whose texts alone a new tokenizer is trained; "" for its own
            too.
        text: that stands in place of every caption; "" for the captions themselves.
    """

    kind: Literal["trained", "pretrained", "stand_in", "demands"]
    length: int
    vocab_size: int
    workdir: str = ""
    folder: str = ""
    like: str = ""
    text: str = ""


@runtime_checkable
class Inputs(Protocol):
    """One kind of example. Every function is pure, except `load`.

    Attributes:
        config: the dataclass that it was built from.
    """

    config: Any

    def batch_specs(self) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """`{bucket: {array: ShapeDtypeStruct}}` of a global batch, one bucket a static shape."""
        ...

    def latent_shape(self, size: tuple[int, int] | None = None) -> tuple[int, ...]:
        """Shape of one `x_0`, without the batch axis.

        Args:
            size: (height, width) in pixels; None for the first bucket.

        Raises:
            ValueError: the size does not divide as the codec needs.
        """
        ...

    def conditions(self) -> tuple[str, ...]:
        """The arrays of a batch that `draw_condition` reads: what a caller gives to have something generated."""
        ...

    def networks(self) -> dict[str, Any]:
        """`{role: networks.module.Network}` of the networks that it brings: text encoders, conditioner, codec."""
        ...

    def pretrained(self) -> tuple[str, ...]:
        """The roles of `networks()` whose weights come from an earlier run or a folder. A recipe trains the others."""
        ...

    def load(self, roles: tuple[str, ...], mesh: Mesh | None) -> dict[str, Tree]:
        """Reads the weights of some of `pretrained()` onto the mesh: `{role: parameters}`.

        Raises:
            ConfigError: an origin is not named, is not there, or holds another network.
        """
        ...

    def tokenizers(self) -> dict[str, TokenizerSpec]:
        """`{array of token ids: its tokenizer}`; empty where no text is read."""
        ...

    def integer_bounds(self) -> dict[str, int]:
        """`{array of integers: how many values have a meaning}`, of those that are neither token ids nor pixels."""
        ...

    def clean(self, networks: Networks, batch: Tree) -> jax.Array:
        """The `x_0` of the path, float32 `[B, ...]`."""
        ...

    def unconditional_share(self) -> float:
        """Share of training examples that keep no condition at all, which is what guidance is trained on."""
        ...

    def draw_kept(self, key: jax.Array, batch_size: int) -> dict[str, jax.Array]:
        """`{encoder: [B]}`, true where an example keeps that encoder's condition in training."""
        ...

    def draw_condition(self, networks: Networks, batch: Tree, key: jax.Array, kept: Mapping[str, jax.Array]) -> Tree:
        """What the loss is told of a batch, some of it dropped. A method calls it outside of its loss, so that no
        gradient passes what is computed here; one that trains an encoder that runs here calls it inside.

        Args:
            networks: `{role: parameters}`.
            batch: arrays of `batch_specs`, at least those of the condition.
            key: for what is random in it, beside `kept`.
            kept: of `draw_kept`, perhaps another `Inputs`'; an encoder that it does not name is kept where any is.
                Empty to keep everything.
        """
        ...

    def condition(self, networks: Networks, drawn: Tree) -> Any:
        """What the network attends to, from `draw_condition`. Gradients pass to the networks."""
        ...

    def null_condition(self, networks: Networks) -> Any:
        """The same of nothing at all, `[1, ...]`: the condition that guidance leads away from."""
        ...

    def decode(self, networks: Networks, x_0: jax.Array) -> dict[str, jax.Array]:
        """Pictures, clips or maps of `x_0`: `{"image": uint8 [B, H, W, 3]}`; `{}` where nothing here decodes."""
        ...

    def codec(self, networks: Networks) -> Any:
        """The `networks.codec.Codec` between pictures and `x_0`, with its parameters.

        Raises:
            ConfigError: there is none; says what to do instead.
        """
        ...

    def check_run(self, workdir: str, inputs: Mapping[str, Any], parts: Sequence[str]) -> None:
        """Compares with the `inputs` section of an earlier run's config, for a network of that run that is fed from
        here.

        Args:
            workdir: of that run, for the message.
            inputs: its section.
            parts: what must be equal, "latent" and "condition" or one of them.

        Raises:
            ConfigError: that run was trained on other latents or conditions.
        """
        ...

    def check_batch(self, arrays: Mapping[str, Any]) -> None:
        """Compares values of a batch with what the networks know.

        Args:
            arrays: NumPy arrays, all or some of `batch_specs`.

        Raises:
            ConfigError: a value has no meaning, such as a class label beyond the last; says what to change.
        """
        ...

    def exports(self) -> Any:
        """What it brings to a bundle, a `training.exports.InputsExport`.

        Raises:
            ConfigError: a phone does not hold it; says what to do instead.
        """
        ...


class FrozenEncoders(Protocol):
    """What makes the arrays of stored inputs: a codec and text encoders. Every function is pure, except `load`."""

    def networks(self) -> dict[str, Any]:
        """`{role: networks.module.Network}` of those that run beforehand."""
        ...

    def load(self, mesh: Mesh | None) -> dict[str, Tree]:
        """Reads all of them onto the mesh: `{role: parameters}`.

        Raises:
            ConfigError: an origin is not named, is not there, or holds another network.
        """
        ...

    def tokenizers(self) -> dict[str, TokenizerSpec]:
        """`{array of token ids: its tokenizer}`."""
        ...

    def encode_images(self, networks: Networks, images: jax.Array) -> dict[str, jax.Array]:
        """Of pictures uint8 `[B, H, W, 3]`, the arrays `[B, ...]` that are stored once an example."""
        ...

    def encode_text(self, networks: Networks, tokens: Tree) -> dict[str, jax.Array]:
        """Of token ids and masks `[B, L]`, the arrays `[B, ...]` that are stored for each caption."""
        ...

    def describe(self) -> dict[str, Any]:
        """What two sets of shards must agree on, as JSON has it."""
        ...


@runtime_checkable
class StoredInputs(Inputs, Protocol):
    """Inputs whose arrays frozen encoders made before training."""

    def frozen_encoders(self) -> FrozenEncoders:
        """Those that make its arrays, by its own config.

        Raises:
            ConfigError: they make other arrays than the config describes.
        """
        ...


@runtime_checkable
class StoredInputsConfig(Protocol):
    """The config of `StoredInputs`."""

    def unstored(self) -> Any:
        """The config of the inputs that run the same encoders inside the step, on pictures and captions: of the same
        latents and conditions, and with trained networks of the same shapes. None where no weights are named to run."""
        ...


def subtree(networks: Networks, prefix: str) -> dict[str, Tree]:
    """The roles below a prefix, without it: `{"teacher/text": x}` within "teacher" is `{"text": x}`."""
    return {role.removeprefix(f"{prefix}/"): tree for role, tree in networks.items() if role.startswith(f"{prefix}/")}


def prefixed(prefix: str, networks: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `subtree`."""
    return {f"{prefix}/{role}": tree for role, tree in networks.items()}


def is_kept(kept: Mapping[str, jax.Array], encoder: str) -> jax.Array | None:
    """Where an encoder is kept, `[B]`: as `kept` says, or where any encoder is, if it does not name this one; None for
    everywhere."""
    if encoder in kept or not kept:
        return kept.get(encoder)
    either, *others = (x.astype(bool) for x in kept.values())
    for other in others:
        either = either | other
    return either
