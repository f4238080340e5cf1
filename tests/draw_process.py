"""One process of a `drawing.draw` of several, by a generator without a network, which takes its time.

python -m tests.draw_process '{"folder": ..., "count": 40, "processes": 2, "coordinator": "localhost:1", "index": 0}'
"""

import json
import sys
import time

import jax
import jax.numpy as jnp

from snapgen_jax import drawing
from snapgen_jax.cli_exit import run_to_exit_code
from snapgen_jax.generation import Generator
from snapgen_jax.parallel import hosts
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from tests.generators_for_tests import LABELS, Greys, by_label

CLASSES = 5
TOLD = drawing.Told(label="label", classes=CLASSES)


class Noisy(Greys):
    """Ten times the label, and noise of each example's own key below ten."""

    def generate(self, params, frozen, conditions, keys, options):
        image = super().generate(params, frozen, {}, keys, options)["image"]
        noise = jax.vmap(lambda key: jax.random.randint(key, image.shape[1:], 0, 10))(keys)
        label = conditions["label"][:, None, None, None]
        return {"image": (10 * label + noise + 0 * image).astype(jnp.uint8)}


class Slow(Generator):
    """Says what it draws, and waits."""

    seconds = 0.0

    def generate(self, *arguments, **options):
        time.sleep(self.seconds)
        print("drawing", *options["indices"], flush=True)
        return super().generate(*arguments, **options)


def generator(devices):
    """Over some devices of this process."""
    recipe = Noisy(LABELS, ("label",))
    recipe.inputs.integer_bounds = lambda: {"label": CLASSES}
    weights = by_label().params
    return Slow(recipe, weights, weights, None, make_mesh(MeshConfig(), jax.local_devices()[:devices]))


def main(options):
    hosts.start(options["processes"], options.get("coordinator"), options.get("index"), 60)
    made = generator(options.get("devices", 2))
    made.seconds = options.get("seconds", 0.0)
    drawing.draw(made, TOLD, options["folder"], options["count"], batch_size=3, npz=options.get("npz"))


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    sys.exit(run_to_exit_code("draw", lambda: main(given)))
