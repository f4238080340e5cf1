"""Generators without networks: what they draw can be told from what they are given."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from snapgen_jax.generation import Generator
from snapgen_jax.inputs.interfaces import TokenizerSpec
from tests.recipes_for_tests import OneArray, OneArrayConfig

SIDE, FRAMES = 8, 12


@dataclasses.dataclass(frozen=True)
class Options:
    """What the recipes here let a caller choose."""

    steps: int = 4
    guidance: float = 1.0
    method: Literal["euler", "heun"] = "euler"
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}; give 1 or more")


class Greys:
    """A recipe that paints one grey: the sum of its condition arrays, its weights and ten times the steps beyond four.

    It draws an image, a clip that grows brighter by one a frame, a depth map, and a number of its own noise.
    """

    options = Options()

    def __init__(self, specs, conditions=None, tokenizers=None, outputs=("image", "clip", "depth", "draw")):
        self.inputs = OneArray(OneArrayConfig("image", {}, 4))
        self.specs, self.names, self.text, self.outputs = specs, conditions, tokenizers or {}, outputs
        self.traced = 0

    def batch_specs(self):
        return self.specs

    def conditions(self):
        return tuple(next(iter(self.specs.values()))) if self.names is None else self.names

    def tokenizers(self):
        return self.text

    def generate(self, params, frozen, conditions, keys, options):
        self.traced += 1
        given = [x.reshape(len(keys), -1)[:, 0].astype(jnp.float32) for x in conditions.values()]
        grey = sum(given, jnp.zeros(len(keys))) + params + frozen + 10 * (options.steps - 4)
        frame = jnp.broadcast_to(grey[:, None, None, None], (len(keys), SIDE, SIDE, 3))
        clip = frame[:, None] + jnp.arange(FRAMES)[:, None, None, None]
        outputs = {
            "image": frame.astype(jnp.uint8),
            "clip": clip.astype(jnp.uint8),
            "depth": frame[..., :1] + jnp.arange(SIDE)[:, None, None],
            "draw": jax.vmap(jax.random.uniform)(keys),
        }
        return {name: outputs[name] for name in self.outputs}


class Circle(Greys):
    """A contrastive recipe: an image's grey and a prompt's number are angles in sixteenths of a turn.

    It embeds texts alone, or images beside them.
    """

    def conditions(self):
        return ("tokens",)

    def generate(self, params, frozen, conditions, keys, options):
        def unit(number):
            angle = number.astype(jnp.float32) * (2 * np.pi / 16)
            return jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)

        image = {"image": unit(conditions["image"][:, 0, 0, 0])} if "image" in conditions else {}
        return {**image, "text": unit(conditions["tokens"][:, 0])}


class Numbers:
    """Token ids that are the numbers which prompts spell."""

    names = ("tokens",)

    def arrays(self, texts, lengths):
        return {"tokens": np.array([[int(text)] for text in texts], np.int32)}


def spec(*shape, dtype=np.int32):
    """One array of a batch of four."""
    return jax.ShapeDtypeStruct((4, *shape), dtype)


LABELS = {"8x8": {"image": spec(SIDE, SIDE, 3, dtype=np.uint8), "label": spec()}}
TOKENS = {"8x8": {"image": spec(SIDE, SIDE, 3, dtype=np.uint8), "tokens": spec(1)}}
EDITS = {  # two sizes of image, and an instruction
    f"{side}x{side}": {"source": spec(side, side, 3, dtype=np.uint8), "tokens": spec(1)} for side in (8, 16)
}


def by_label(**parts):
    """Draws from class labels."""
    return Generator(Greys(LABELS, ("label",), **parts), jnp.int32(0), jnp.int32(0), None)


def by_prompt(params=0, frozen=0, workdirs=(), **parts):
    """Draws from prompts that are numbers; `workdirs` are runs whose tokenizers it names."""
    text = {f"tokens_{n}": TokenizerSpec("trained", 1, 9, workdir=w) for n, w in enumerate(workdirs)}
    return Generator(Greys(TOKENS, ("tokens",), text, **parts), jnp.int32(params), jnp.int32(frozen), Numbers())


def by_edit():
    """Draws from prompts that are numbers, and images to edit."""
    return Generator(Greys(EDITS), jnp.int32(0), jnp.int32(0), Numbers())


@dataclasses.dataclass
class Batch:
    """As the pipeline gives them."""

    arrays: dict
    valid: np.ndarray
    source_index: np.ndarray
    bucket: str = "8x8"


class Validation:
    """Twelve examples in batches of four, over and over: example n has the grey n, the label 10 n and the caption "n".

    Examples 1 and 6 cannot be read. A batch of another size comes between.
    """

    class source:
        held_out = True

        def __len__(self):
            return 12

        def example(self, index, rng, names=None):
            return {"caption": str(index)}

    source = source()

    def __iter__(self):
        while True:
            for rows in np.arange(12).reshape(3, 4):
                image = np.broadcast_to(rows[:, None, None, None], (4, SIDE, SIDE, 3)).astype(np.uint8)
                arrays = {"image": image, "source": 2 * image, "label": 10 * rows.astype(np.int32)}
                arrays["states"] = rows[:, None].astype(np.float32)
                yield Batch(arrays, ~np.isin(rows, (1, 6)), rows)
                large = {"source": np.zeros((4, 16, 16, 3), np.uint8)}
                yield Batch(large, np.ones(4, bool), np.arange(4), "16x16")


READABLE = [0, 2, 3, 4, 5, 7, 8, 9, 10, 11]
