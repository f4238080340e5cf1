"""How many bits each layer of a trained network needs: a stage of a chain (see `chain_derive`) that measures it.

    {"name": "bits", "derive": "snapgen_jax.derivations.layer_bits:derive", "earlier": {"base": "base"},
     "options": {"target_bits": 2.0}, "example": {"bits": {}}}
    {"name": "quantised", "config": "quantised.py", "filled": {"bits": "bits.bits"}, ...}

Each layer alone is rounded to 1, 2 and 3 bits, its scales fitted to its weights, and the same prompts are drawn from
the same noise. Each of these is an item, so that a stage that was stopped goes on; all are one compiled program with
other weights, and its batches are shared out over the devices. `networks/bit_assignment.py` makes bits of the errors.
"""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from PIL import Image, ImageDraw, ImageFont

from snapgen_jax.bookkeeping import Items
from snapgen_jax.bounds import SEED, above, at_least, check
from snapgen_jax.config import build_dataclass
from snapgen_jax.data.prompts import CATEGORIES
from snapgen_jax.evaluation.clip_score import contrastive_run, embeddings
from snapgen_jax.evaluation.compositional import fixed_prompts
from snapgen_jax.evaluation.detector import detect
from snapgen_jax.export.run import export_run
from snapgen_jax.generation import Generator, load
from snapgen_jax.networks.bit_assignment import MEASURED, Assignment, assign, average
from snapgen_jax.networks.module import flatten, unflatten
from snapgen_jax.networks.quantise import (
    Layer,
    alternating_scale,
    integers,
    kernel_path,
    level_range,
    min_max_scale,
    quantisable,
)
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.files import write_whole

PICTURE = "bits.png"
ROW, LABEL, BIT, INK = 16, 470, 44, "#222222"
COLOURS = ("#4c72b0", "#55a868", "#ccb974", "#dd8452", "#c44e52", "#8172b3", "#64b5cd", "#777777")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the stage.

    Attributes:
        target_bits: wanted average over the layers whose bits are for choice, in log2 of the number of levels.
        eta: how much more error a large layer is allowed; see `networks/bit_assignment.py`.
        prompts: what is drawn; () for the shapes world's own, with which the detector says what they show.
        per_category, categories: of the shapes world's prompts.
        seed: image n is drawn from (seed, n).
        batch_size: images at a time, on each device.
        generation: options of the generator, such as {"steps": 8}.
    """

    target_bits: float = 2.0
    eta: float = 0.3
    prompts: tuple[str, ...] = ()
    per_category: int = 16
    categories: tuple[str, ...] = CATEGORIES
    seed: int = 0
    batch_size: int = 16
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self, target_bits=above(0), eta=at_least(0), per_category=at_least(1), batch_size=at_least(1), seed=SEED)
        if unknown := [name for name in self.categories if name not in CATEGORIES]:
            raise ValueError(f"categories: there is no {', '.join(unknown)}; there are {', '.join(CATEGORIES)}")


def derive(stages: Mapping[str, epath.Path], workdir: epath.Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Bits for each layer of a run's network.

    Args:
        stages: "base", the trained run; optionally "clip", a contrastive run, in whose eyes images fit their prompts.
            Without it the detector of the shapes world says so; with prompts of one's own, nothing does.
        workdir: of the stage; `bits.png` shows the result.
        options: fields of `Options`.

    Returns:
        "bits" {layer: bits}; "average" over these layers and "stored" over all that are quantised, the fixed ones
        too; "threshold"; "raised" {layer: further bits}.

    Raises:
        ConfigError: the options are none, the run takes no prompts or trains no network, or the average cannot be had.
    """
    chosen: Options = build_dataclass(Options, dict(options))
    drawing = Drawing(stages, chosen)
    items = Items(workdir)
    before = items.run("as trained", lambda: {"similarity": drawing.similarity(drawing.reference)})["similarity"]
    free = {name: layer for name, layer in drawing.layers.items() if layer.fixed is None}
    errors: dict[str, dict[int, float]] = {}
    drops: dict[str, float] = {}
    for i, name in enumerate(free):
        for b in MEASURED:
            item = items.run(
                f"{name} in {b} bits ({i + 1} of {len(free)})", functools.partial(drawing.measure, name, b)
            )
            errors.setdefault(name, {})[b] = item["error"]
            if b == MEASURED[-1] and before is not None:
                drops[name] = before - item["similarity"]
    try:
        found = assign(
            errors, {n: layer.size for n, layer in free.items()}, chosen.target_bits, eta=chosen.eta, drops=drops
        )
    except ValueError as error:
        raise ConfigError(f"target_bits: {error}") from error
    whole = {name: found.bits.get(name, layer.fixed or 0) for name, layer in drawing.layers.items()}
    picture = io.BytesIO()
    draw(found, drawing.layers).save(picture, "PNG")
    write_whole(workdir / PICTURE, picture.getvalue())
    return {
        "bits": dict(found.bits),
        "average": found.average,
        "stored": average(whole, {name: layer.size for name, layer in drawing.layers.items()}),
        "threshold": found.threshold,
        "raised": dict(found.raised),
    }


class Drawing:
    """The same images, by a network with one layer in few bits.

    Attributes:
        layers: of the network.
        reference: uint8 `[N, H, W, 3]` as the run draws them.
    """

    def __init__(self, stages: Mapping[str, epath.Path], options: Options):
        own = [[p for p in fixed_prompts() if p.category == c] for c in options.categories]
        spread = [prompt for group in own for prompt in _spread(group, options.per_category)]
        self._asked = [] if options.prompts else spread
        self.prompts = list(options.prompts) or [prompt.prompt for prompt in spread]
        self.generator = load(stages["base"], mesh=_shared_by(len(self.prompts), options.batch_size))
        self.options = options
        if not self.generator.takes_prompts:
            raise ConfigError(f"{stages['base']} takes no prompts, by whose images its layers are compared")
        recipe: Any = self.generator.recipe
        if not hasattr(recipe, "role") or recipe.role not in self.generator.params.get("model", {}):
            raise ConfigError(
                f"{stages['base']} trains no denoiser; name a run of flow_matching, or of what follows it"
            )
        self.role: str = recipe.role
        self.layers: dict[str, Layer] = quantisable(recipe.config.network)
        self._clip: Any = None
        if "clip" in stages:
            self._clip = contrastive_run(str(stages["clip"]), self.generator, "layer_bits")
        self.reference = self._draw(self.generator)

    def _draw(self, generator: Generator) -> np.ndarray:
        options = self.options
        size = options.batch_size * generator.devices
        return generator.generate(self.prompts, seed=options.seed, batch_size=size, **options.generation)

    def measure(self, name: str, bits: int) -> dict[str, float | None]:
        """The mean squared error of pixels, 0 to 255, with one layer in so many bits, and how well the images fit."""
        generator = self.generator
        flat = dict(flatten(generator.params["model"][self.role]))
        low, high = (jnp.float32(bound) for bound in level_range(bits))
        flat[kernel_path(name)] = _rounded(flat[kernel_path(name)], low, high)
        model = {**generator.params["model"], self.role: unflatten(flat)}
        images = self._draw(generator.with_weights({**generator.params, "model": model}, generator.frozen))
        error = np.mean((images.astype(np.float32) - self.reference.astype(np.float32)) ** 2)
        return {"error": float(error), "similarity": self.similarity(images)}

    def similarity(self, images: np.ndarray) -> float | None:
        """How well images fit their prompts, by the contrastive run or by the detector; None where there is neither."""
        if self._clip is not None:
            image, text = embeddings(self._clip, images, self.prompts)
            return float(np.mean(np.sum(image * text, axis=1)))
        if not self._asked:
            return None
        shown = [p.requirement.met_by(detect(image)) for p, image in zip(self._asked, images, strict=True)]
        return float(np.mean(shown))


@jax.jit
def _rounded(w: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """A kernel of few levels, in its own dtype; one program for each shape, whatever the bits."""
    wide = w.astype(jnp.float32)
    scale = alternating_scale(wide, min_max_scale(wide, low, high), low, high)
    return (integers(wide, scale, low, high) * scale).astype(w.dtype)


def _shared_by(prompts: int, batch_size: int) -> Mesh | None:
    """The devices that share out a batch of so many each, as many as the prompts divide by; None for one."""
    devices = jax.local_devices()
    count = next(n for n in range(len(devices), 0, -1) if min(n * batch_size, prompts) % n == 0)
    return make_mesh(MeshConfig(data=count), devices[:count]) if count > 1 else None


def _spread(group: Sequence[Any], count: int) -> list[Any]:
    """So many of a list, evenly over it: seen combinations and held-out ones."""
    return [group[i * len(group) // count] for i in range(min(count, len(group)))]


def draw(found: Assignment, layers: Mapping[str, Layer]) -> Image.Image:
    """A row for each layer, RGB: its name, its bits as a bar, those that were raised hatched, and its weights."""
    bits = {name: found.bits.get(name, layer.fixed or 0) for name, layer in layers.items()}
    picture = Image.new("RGB", (LABEL + 8 * BIT + 120, ROW * (len(bits) + 3)), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    pen.text((8, 4), f"bits by layer; {found.average:.3f} on average of those for choice", INK, font)
    for i, (name, b) in enumerate(bits.items()):
        top = ROW * (i + 2)
        pen.text((8, top), name, INK, font)
        pen.rectangle((LABEL, top + 2, LABEL + b * BIT, top + ROW - 3), fill=COLOURS[b - 1])
        for raised in range(found.raised.get(name, 0)):
            left = LABEL + (b - raised - 1) * BIT
            pen.rectangle((left, top + 2, left + BIT, top + ROW - 3), outline=INK)
        pen.text((LABEL + b * BIT + 6, top), f"{b}", INK, font)
        pen.text((LABEL + 8 * BIT + 30, top), f"{layers[name].size:,}", INK, font)
    return picture


def bundle(stages: Mapping[str, epath.Path], workdir: epath.Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Exports a run, as the last stage of a chain.

    Args:
        stages: "run", what is exported.
        workdir: of the stage; the bundle is its folder "bundle".
        options: further arguments of `export.run.export_run`, such as "precisions".

    Returns:
        "bundle", its folder, and what was measured.
    """
    out = workdir / "bundle"
    numbers = export_run(stages["run"], out, **options)
    return {"bundle": str(out), **numbers}
