"""The bundle that tests of clients share is what they expect: a guided flow on patches, from prompts."""

import numpy as np

from snapgen_jax.export.client import LiteRTGenerator
from snapgen_jax.export.program import Flow
from snapgen_jax.export.verify import grey_levels

from .conftest import PROMPTS


def test_the_shared_bundle_draws_from_prompts(small_bundle):
    generator = LiteRTGenerator(small_bundle)
    program = generator.program
    assert isinstance(program, Flow) and program.steps[0].guided and len(program.times) == 5
    assert program.steps[0].prediction["kind"] == "x_0" and program.decoder["kind"] == "patch"
    images = generator.generate(PROMPTS)
    assert images.shape == (2, 32, 32, 3) and images.std() > 10
    assert grey_levels(images, np.load(small_bundle / "golden" / "outputs" / "image.npy")).max() <= 1
