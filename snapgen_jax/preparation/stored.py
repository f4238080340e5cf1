"""Which stored arrays a config asks for, what makes them, and whether a folder of shards holds them."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from snapgen_jax.data.errors import DataError
from snapgen_jax.data.shards import Manifest, StoredArray
from snapgen_jax.data.tokenizer import CaptionTokenizer
from snapgen_jax.inputs.interfaces import FrozenEncoders, Networks, StoredInputs, TokenizerSpec, prefixed, subtree
from snapgen_jax.inputs.registry import InputsConfig
from snapgen_jax.networks.module import Network, Platform, frozen_spec
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.fingerprint import fingerprint

log = logging.getLogger("snapgen_jax.data.pretrained_tokenizers")

Tree = Any
Specs = Mapping[str, Mapping[str, Any]]


def stored_inputs(config: Any, sizes: Sequence[tuple[int, int]], platform: Platform) -> list[StoredInputs]:
    """The stored inputs that a recipe's config names, of the network itself and of teachers, each once.

    Args:
        config: of the recipe.
        sizes: image sizes of the batches, which are the student's.
        platform: the one compiled for.
    """
    kinds, found = typing.get_args(InputsConfig), []

    def walk(value: Any) -> Iterator[Any]:
        if isinstance(value, kinds):
            yield dataclasses.replace(value, image_sizes=tuple(sizes))
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            for field in dataclasses.fields(value):
                yield from walk(getattr(value, field.name))

    for each in dict.fromkeys(walk(config)):
        inputs = each.build(1, platform)
        if isinstance(inputs, StoredInputs):
            found.append(inputs)
    return found


@dataclasses.dataclass(frozen=True)
class Encoding:
    """All that is stored for a config, and the frozen encoders that make it.

    Attributes:
        parts: `{name: encoders}` of each of its inputs.
        sizes: `{bucket: (height, width)}`.
        specs: `{bucket: {array: spec}}` of the batches; the first axis is the batch.
    """

    parts: Mapping[str, FrozenEncoders]
    sizes: Mapping[str, tuple[int, int]]
    specs: Specs

    @classmethod
    def of(cls, config: Any, batch_specs: Specs, sizes: Sequence[tuple[int, int]], platform: Platform) -> Encoding:
        """
        Args:
            config: of the recipe.
            batch_specs: of the recipe.
            sizes: image sizes of its buckets, in their order.
            platform: the one compiled for.

        Raises:
            ConfigError: the batches hold what no stored inputs make, or the encoders make other arrays.
        """
        needed = list(next(iter(batch_specs.values())))
        parts: dict[str, FrozenEncoders] = {}
        covered: set[str] = set()
        for inputs in stored_inputs(config, sizes, platform):
            made = set(next(iter(inputs.batch_specs().values())))
            if made & set(needed) and not made <= covered:
                name = "student" if not parts else "teacher" if len(parts) == 1 else f"teacher_{len(parts)}"
                parts[name] = inputs.frozen_encoders()
                covered |= made
        if missing := [name for name in needed if name not in covered]:
            raise ConfigError(
                f"the batches of this config hold {', '.join(missing)}, which are not stored; give a config whose "
                "inputs (and teacher.inputs) are of the kind 'stored_encodings' or 'stored'"
            )
        return cls(parts, dict(zip(batch_specs, sizes, strict=True)), batch_specs)

    def networks(self) -> dict[str, Network]:
        """`{part/role: network}` of all that run."""
        return {k: v for name, part in self.parts.items() for k, v in prefixed(name, part.networks()).items()}

    def load(self, mesh: Any) -> dict[str, Tree]:
        """Reads all of them: `{part/role: parameters}`."""
        return {k: v for name, part in self.parts.items() for k, v in prefixed(name, part.load(mesh)).items()}

    def tokenizers(self) -> dict[str, TokenizerSpec]:
        """`{array of token ids: its tokenizer}`."""
        return {k: v for part in self.parts.values() for k, v in part.tokenizers().items()}

    def encode_images(self, networks: Networks, images: jax.Array) -> dict[str, jax.Array]:
        """Of pictures uint8 `[B, H, W, 3]`, what is stored once an example."""
        return {
            k: v for n, part in self.parts.items() for k, v in part.encode_images(subtree(networks, n), images).items()
        }

    def encode_text(self, networks: Networks, tokens: Tree) -> dict[str, jax.Array]:
        """Of token ids and masks, what is stored for each caption."""
        return {
            k: v for n, part in self.parts.items() for k, v in part.encode_text(subtree(networks, n), tokens).items()
        }

    def token_lengths(self) -> dict[str, int]:
        """`{array that a tokenizer makes: tokens}`, masks included."""
        return {f"{name}{end}": s.length for name, s in self.tokenizers().items() for end in ("", "_mask")}

    def arrays(self) -> dict[str, StoredArray]:
        """The entries of the records, as a manifest has them."""
        first = next(iter(self.specs.values()))
        varies = {
            name for name in first if any(specs[name].shape != first[name].shape for specs in self.specs.values())
        }
        shared = {
            "id": StoredArray("text"),
            "captions": StoredArray("text", captions=True),
            "caption_weights": StoredArray("float32", captions=True),
        }
        images = self._image_arrays()
        for name, spec in first.items():
            shape: tuple[int | None, ...] = tuple(spec.shape[1:])
            if name in varies:
                shape = (None, None, *shape[2:])
            shared[name] = StoredArray(jnp.dtype(spec.dtype).name, shape, captions=name not in images)
        return shared

    def _image_arrays(self) -> set[str]:
        networks = {role: frozen_spec(network) for role, network in self.networks().items()}
        (height, width) = next(iter(self.sizes.values()))
        image = jax.ShapeDtypeStruct((1, height, width, 3), jnp.uint8)
        return set(jax.eval_shape(self.encode_images, networks, image))

    def facts(self) -> dict[str, Any]:
        """What two sets of shards must agree on, as JSON has it."""
        return {
            "inputs": {name: part.describe() for name, part in self.parts.items()},
            "sizes": {bucket: list(size) for bucket, size in self.sizes.items()},
        }


def fingerprints(networks: Networks) -> dict[str, str]:
    """`{role: fingerprint}` of frozen networks, of their parameters in bfloat16: the platform chooses their dtype."""

    def rounded(tree: Tree) -> Tree:
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)

    return {role: fingerprint(jax.jit(rounded)(tree)) for role, tree in networks.items()}


PROBES = ("", "a red circle left of a blue square", "Ein Größenvergleich, 12.5 %: “naïve” 東京 🦊", "word " * 400)


def tokenizer_digests(tokenizer: CaptionTokenizer, lengths: Mapping[str, int]) -> dict[str, str]:
    """`{array: digest of the ids or masks that it has of a few texts}`: two tokenizers that agree there are one.

    Args:
        tokenizer: what makes the arrays.
        lengths: `{array: tokens}`.
    """
    level, log.disabled = log.disabled, True  # the long text is cut, as it should be
    try:
        arrays = tokenizer.arrays(PROBES, lengths)
    finally:
        log.disabled = level
    return {name: hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()[:32] for name, x in arrays.items()}


def check_tokenizers(manifest: Manifest, tokenizer: CaptionTokenizer, lengths: Mapping[str, int], folder: str) -> None:
    """Compares tokenizers with those that made a folder. There may be others, such as those of a teacher's captions.

    Raises:
        DataError: one is another; names it.
    """
    made = manifest.facts.get("tokenizers", {})
    given = tokenizer_digests(
        tokenizer, {name: n for name, n in lengths.items() if name in made and name in tokenizer.names}
    )
    if other := [name for name, digest in given.items() if digest != made[name]]:
        raise DataError(
            f"{folder} was made with other tokenizers than this config names, of {', '.join(other)}; name those that "
            "it was made with, or encode again"
        )


def differences(wanted: Any, found: Any, path: str = "") -> list[str]:
    """Where two JSON values differ: "inputs.student.latent.scale is 1.5, and the manifest says 0.2"."""
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        names = sorted({*wanted, *found})
        return [
            line
            for name in names
            for line in differences(wanted.get(name), found.get(name), f"{path}.{name}" if path else name)
        ]
    return [] if wanted == found else [f"{path} is {wanted!r} by the config, and {found!r} there"]


def check_manifest(manifest: Manifest, encoding: Encoding, folder: str) -> None:
    """Compares a folder of encoded examples with what a config asks for.

    Raises:
        DataError: it was made by other encoders, in another dtype, with another scale; names the first ten differences.
    """
    wanted = encoding.facts()["inputs"]
    lines = differences(wanted, {name: manifest.facts.get("inputs", {}).get(name) for name in wanted})
    if lines:
        more = [f"  ... and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise DataError(
            "\n".join(
                [
                    f"{folder} was not made for this config; make these equal, or encode with it:",
                    *(f"  {line}" for line in lines[:10]),
                    *more,
                ]
            )
        )


def check_encoders(manifest: Manifest, networks: Networks, folder: str) -> None:
    """Compares loaded encoders with those that made a folder.

    Args:
        manifest: of the folder.
        networks: `{part/role: parameters}`, all or some of those that the manifest names.
        folder: for the message.

    Raises:
        DataError: one is another; names it.
    """
    made = manifest.facts.get("encoders", {})
    given = fingerprints({role: tree for role, tree in networks.items() if role in made})
    other = [role for role, digest in given.items() if digest != made[role]]
    if other:
        raise DataError(
            f"{folder} was made by other weights than this config names, of {', '.join(other)}; name the folders that "
            "its manifest was made with, or run `snapgen prepare encode` with these"
        )
