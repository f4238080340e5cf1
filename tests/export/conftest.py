"""Two recipes to export: the real one at its smallest, by jax2tf, and a toy that converts in a moment."""

import dataclasses
import importlib.util
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from filelock import FileLock

from snapgen_jax.config import load_experiment
from snapgen_jax.data.tokenizer import train
from snapgen_jax.diffusion.guidance import with_guidance
from snapgen_jax.diffusion.samplers import sample
from snapgen_jax.diffusion.timesteps import time_grid
from snapgen_jax.export.bundle import BundleReport, Sizes, export_bundle, generator_of
from snapgen_jax.export.manifest import About, fingerprints
from snapgen_jax.inputs.captions import CaptionsConfig
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.codec import CodecConfig, build_codec, to_uint8
from snapgen_jax.networks.module import build
from snapgen_jax.networks.time_features import time_features
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.recipes._sampling import SamplingConfig
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig
from snapgen_jax.training.exports import ExportPlan, ExportUnit, GoldenInputs
from snapgen_jax.training.recipe import NoOptions

from .toys import ClipRecipe, SketchRecipe

# The converter without TensorFlow is published for Linux only.
QUICK = "litert" if importlib.util.find_spec("litert_converter") else "jax2tf"
FRAME = {"file": "tokenizer.json", "begin": [1], "end": [2], "pad": 0}
ABOUT = About("Small quickstart", "apache-2.0", {"config_sha256": "0" * 64, "commit": "1a2b3c4"})
PROMPTS = ("a red circle left of a blue square", "two green stars")


def array(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


class ToyRecipe:
    """A linear denoiser of 4 x 4 x 3 pixels under a one-layer text encoder, with the sampler of the library."""

    LENGTH, WIDTH, GUIDANCE, STEPS = 6, 8, 2.0, 3
    options = NoOptions()

    def __init__(self) -> None:
        self.codec = build_codec(CodecConfig(kind="identity", scale=2.0, shift=0.1))

    def params(self):
        rng = np.random.default_rng(0)

        def draw(*shape):
            return jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), jnp.float32)

        net = {
            "conv": draw(1, 1, 3, 3),
            "time": draw(16, 3),
            "text": draw(self.WIDTH, 3),
            "pooled": draw(self.WIDTH, 3),
        }
        return {"net": net, "text": {"table": draw(300, self.WIDTH)}}

    def weights(self, params, frozen):
        return {**params, **frozen}

    @staticmethod
    def denoise(weights, *, latent, time, sequence, mask, pooled):
        params = weights["net"]
        x = jnp.einsum("bhwc,cd->bhwd", latent, params["conv"][0, 0])
        text = jnp.einsum("bl,bld,dc->bc", mask, sequence, params["text"]) / 6
        return {"prediction": x + (jnp.tanh(time @ params["time"] + text + pooled @ params["pooled"]))[:, None, None]}

    @staticmethod
    def encode(weights, *, tokens, mask):
        sequence = weights["text"]["table"].at[tokens].get(mode="clip") * mask[..., None]
        return {"sequence": sequence, "pooled": sequence.mean(axis=1)}

    def exports(self) -> ExportPlan:
        text = {
            "sequence": array(1, self.LENGTH, self.WIDTH),
            "mask": array(1, self.LENGTH),
            "pooled": array(1, self.WIDTH),
        }
        denoiser = {"latent": array(1, 4, 4, 3), "time": array(1, 16), **text}
        tokens = {"tokens": array(1, self.LENGTH, dtype=jnp.int32), "mask": array(1, self.LENGTH)}
        length = [self.LENGTH]
        program = {
            "schema": 3,
            "kind": "flow",
            "inputs": {
                "tokens": {"shape": length, "dtype": "int32", "null": [1, 2, 0, 0, 0, 0]},
                "mask": {"shape": length, "dtype": "float32", "null": [1, 1, 0, 0, 0, 0]},
            },
            "outputs": {"image": {"shape": [4, 4, 3], "dtype": "uint8"}},
            "tokenizers": [{"tokens": "tokens", "mask": "mask", **FRAME}],
            "latent_shape": [4, 4, 3],
            "times": time_grid(self.STEPS).tolist(),
            "shift": 1.0,
            "step": {
                "unit": "net",
                "rule": "euler",
                "time": {"kind": "features", "dim": 16, "scale": 1000.0, "max_period": 10_000.0, "order": "cos,sin"},
                "prediction": {"kind": "velocity"},
                "context": "text",
                "guidance": self.GUIDANCE,
            },
            "contexts": {"text": ["text"]},
            "decoder": self.codec.describe(),
        }
        units = [
            ExportUnit("net", self.denoise, ("net",), denoiser),
            ExportUnit("text", self.encode, ("text",), tokens),
        ]
        return ExportPlan(units, program, GoldenInputs(prompts=PROMPTS))

    def generate(self, params, frozen, conditions, keys, options):
        def context(tokens, mask):
            return {"mask": mask, **self.encode(params, tokens=tokens, mask=mask)}

        def denoise(x, t, i, carry, condition):
            return self.denoise(params, latent=x, time=time_features(t, 16), **condition)["prediction"], carry

        null = context(jnp.array([[1, 2, 0, 0, 0, 0]]), jnp.array([[1.0, 1, 0, 0, 0, 0]]))
        guided = with_guidance(denoise, context(conditions["tokens"], conditions["mask"]), null, self.GUIDANCE)
        latent, _ = sample(guided, conditions["noise"], time_grid(self.STEPS))
        return {"image": to_uint8(self.codec.decode(latent)), "latent": latent}


@dataclasses.dataclass(frozen=True)
class Exported:
    """What a test needs of one export."""

    recipe: Any
    params: dict
    report: BundleReport

    @property
    def folder(self) -> pathlib.Path:
        return self.report.folder


class TallToy(ToyRecipe):
    """The toy at 6 x 4 pixels, over the same weights."""

    def exports(self):
        plan = super().exports()
        net, text = plan.units
        program = {**plan.program, "latent_shape": [6, 4, 3], "outputs": {"image": {"shape": [6, 4, 3]}}}
        program["outputs"]["image"]["dtype"] = "uint8"
        net = dataclasses.replace(net, inputs={**net.inputs, "latent": array(1, 6, 4, 3)})
        return dataclasses.replace(plan, units=[net, text], program=program)


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train(PROMPTS * 3, 300).save(path)
    return path


@pytest.fixture(scope="session")
def toy(tmp_path_factory, tokenizer_json) -> Exported:
    """The toy's bundle, float32 and float16, by the quicker backend."""
    recipe = ToyRecipe()
    params, folder = recipe.params(), tmp_path_factory.mktemp("toy") / "bundle"
    return Exported(recipe, params, export_bundle(recipe, params, {}, tokenizer_json, folder, backend=QUICK))


@pytest.fixture(scope="session")
def two_sizes(tmp_path_factory, tokenizer_json):
    """The folder of the toy's bundle at 4 x 4 and at 6 x 4."""
    if QUICK != "litert":
        pytest.skip("litert-converter, which writes several signatures to a file, is published for Linux only")
    recipe, folder = ToyRecipe(), tmp_path_factory.mktemp("two") / "bundle"
    reference, sizes = generator_of(recipe, recipe.params(), {}), Sizes("4x4", {"6x4": TallToy()})
    options = {"backend": "litert", "gpu_check": "skip", "reference": reference, "sizes": sizes}
    report = export_bundle(recipe, recipe.params(), {}, tokenizer_json, folder, **options)
    assert report.numbers["export.6x4.image.max_grey_to_generator"] <= 1
    return folder


@pytest.fixture(scope="session")
def sketch(tmp_path_factory) -> Exported:
    """A picture in, a picture out, in one call."""
    return _exported(SketchRecipe(), tmp_path_factory.mktemp("sketch") / "bundle")


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Exported:
    """A clip by two denoisers that share a state, decoded in chunks."""
    return _exported(ClipRecipe(), tmp_path_factory.mktemp("clip") / "bundle")


def _exported(recipe, folder: pathlib.Path) -> Exported:
    params, reference = recipe.params(), generator_of(recipe, recipe.params(), {})
    return Exported(recipe, params, export_bundle(recipe, params, {}, None, folder, backend=QUICK, reference=reference))


@pytest.fixture(scope="session")
def smoke(tmp_path_factory, tokenizer_json) -> Exported:
    """The flow matching recipe at its smallest, through jax2tf, compared with the recipe's own generator."""
    config = FlowMatchingConfig(
        prediction="x_0",
        network=UNetConfig.preset("smoke", latent_channels=12, absolute_positions=True),
        inputs=CaptionsConfig(
            image_sizes=((16, 16),),
            text=ClipTextConfig.preset("smoke", vocab_size=300, max_tokens=12),
            codec=CodecConfig(patch=2, scale=1.5, shift=0.1, frequency_scale=(1.0, 1.5, 1.5, 2.0)),
        ),
        sampling=SamplingConfig(steps=4, guidance=2.0, shift=1.5),
        sample_prompts=PROMPTS,
    )
    recipe = FlowMatching(config, "cpu")
    params = random_params(recipe)
    folder = tmp_path_factory.mktemp("smoke") / "bundle"
    report = export_bundle(recipe, params, {}, tokenizer_json, folder, reference=generator_of(recipe, params, {}))
    return Exported(recipe, params, report)


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory) -> pathlib.Path:
    """The folder of the quickstart's bundle with its smallest networks, random weights and four steps. All test
    processes of a session share it: copy it before you change it."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    folder = shared / "small_bundle" / "bundle"
    with FileLock(shared / "small_bundle.lock"):
        if not folder.exists():
            changes = ["sampling.steps=4", f"sample_prompts={PROMPTS!r}"]
            recipe = load_experiment("configs/shapes/quickstart.py:runlocal", changes).build("cpu")
            params, tokenizer_json = random_params(recipe), shared / "small_bundle" / "tokenizer.json"
            tokenizer_json.parent.mkdir(exist_ok=True)
            train(PROMPTS * 3, 512).save(tokenizer_json)
            options = {"backend": QUICK, "reference": generator_of(recipe, params, {}), "about": ABOUT}
            export_bundle(recipe, params, {}, tokenizer_json, folder, **options)
    return folder


def random_params(recipe) -> dict:
    """Weights of a recipe of one player. (A fresh UNet's output is zero.)"""
    rng, networks = np.random.default_rng(0), recipe.networks()
    spec = {role: build(networks[role].config)[1] for role in recipe.trains["model"]}
    return {"model": jax.tree.map(lambda leaf: _draw(rng, leaf.shape), spec)}


def _draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    offset = 1.0 if len(shape) == 1 else 0.0  # gains about one
    return (offset + rng.standard_normal(shape) / np.sqrt(np.prod(shape[:-1]) or 1)).astype(np.float32) * 0.7


def resign(folder: pathlib.Path) -> None:
    """Makes the manifest say what is there, as one would who changed a file on purpose."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {n: f for n, f in fingerprints(folder).items() if n != "manifest.json"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
