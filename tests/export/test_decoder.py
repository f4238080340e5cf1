"""A decoder that is a network: one more file of the bundle, which the client runs and the exporter verifies."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from snapgen_jax.export import verify
from snapgen_jax.export.bundle import export_bundle, generator_of
from snapgen_jax.export.client import LiteRTGenerator
from snapgen_jax.export.flatbuffer import describe
from snapgen_jax.export.program import BundleError, parse
from snapgen_jax.networks.codec import to_uint8
from snapgen_jax.networks.module import apply, build
from snapgen_jax.networks.tiny_decoder import TinyDecoderCodec, TinyDecoderConfig
from snapgen_jax.training.exports import ExportPlan, ExportUnit
from tests.networks.tiny import drawn

from .conftest import PROMPTS, QUICK, ToyRecipe, array


class WithDecoder(ToyRecipe):
    """The toy with a frozen tiny decoder in place of its pixel codec."""

    def __init__(self):
        super().__init__()
        self.decoder, _ = build(
            TinyDecoderConfig.preset("smoke", latent_channels=3, scale=2.0, shift=0.1, depthwise="grouped")
        )
        self.frozen = {"codec": {"decoder": drawn(self.decoder)}}

    def exports(self):
        plan = super().exports()
        unit = ExportUnit(
            "decoder",
            lambda weights, *, latent: {"image": apply(self.decoder, weights["codec/decoder"], latent)},
            ("codec/decoder",),
            {"latent": array(1, 4, 4, 3)},
        )
        codec = {**TinyDecoderCodec(self.decoder).describe(), "unit": "decoder"}
        outputs = {"image": {"shape": [8, 8, 3], "dtype": "uint8"}}
        program = {**plan.program, "decoder": codec, "outputs": outputs}
        return ExportPlan([*plan.units, unit], program, plan.golden)

    def weights(self, params, frozen):
        return {**params, "codec/decoder": frozen["codec"]["decoder"]}

    def generate(self, params, frozen, conditions, keys, options):
        codec = TinyDecoderCodec(self.decoder).bind(frozen["codec"])
        latent = super().generate(params, {}, conditions, keys, options)["latent"]
        return {"image": to_uint8(codec.decode(latent)), "latent": latent}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer_json):
    recipe = WithDecoder()
    params, folder = recipe.params(), tmp_path_factory.mktemp("decoder") / "bundle"
    frozen = recipe.frozen
    reference = generator_of(recipe, params, frozen)
    report = export_bundle(recipe, params, frozen, tokenizer_json, folder, backend=QUICK, reference=reference)
    return recipe, params, report


def test_the_bundle_draws_with_it_what_the_recipe_draws(exported):
    _, _, report = exported
    assert 0 < report.numbers["export.decoder.rel_l2_f32"] <= 1e-5 < report.numbers["export.decoder.rel_l2_f16"] <= 2e-3
    assert report.numbers["export.image.max_grey_to_generator"] <= 1
    assert [check.name for check in verify.checks(report.folder) if not check.passed] == []
    image = LiteRTGenerator(report.folder).generate(PROMPTS[:1])[0]
    assert image.shape == (8, 8, 3) and image.std() > 5
    assert report.operators["decoder"]["DEPTHWISE_CONV_2D"] == 7
    assert describe(report.folder / "decoder_f16.tflite").max_rank == 4


def test_golden_images_notice_another_decoder(exported):
    recipe, _, report = exported
    sampler = LiteRTGenerator(report.folder).sampler
    latent, image = (np.load(report.folder / "golden" / f"{name}.npy") for name in ("latents", "outputs/image"))
    np.testing.assert_array_equal(sampler.decode(latent[0, -1])["image"], image[0])
    other = copy.deepcopy(recipe.frozen["codec"])
    other["decoder"]["conv_out"]["bias"] += 0.05
    shifted = to_uint8(TinyDecoderCodec(recipe.decoder).bind(other).decode(jnp.asarray(latent[:1, -1])))
    assert verify.grey_levels(np.asarray(jax.device_get(shifted))[0], image[0]).max() > 1


def test_a_description_without_the_file_is_refused(exported):
    program = json.loads((exported[2].folder / "program.json").read_text())
    del program["decoder"]["unit"]
    with pytest.raises(BundleError, match="the decoder is a network, and names no `unit`"):
        parse(program)
