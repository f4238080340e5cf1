"""A run on latents becomes a bundle: which encoders and which decoder it carries, and it draws what the run draws."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from snapgen_jax import cli
from snapgen_jax.config import load_experiment
from snapgen_jax.data.pretrained_tokenizers import PretrainedTokenizer
from snapgen_jax.export import verify
from snapgen_jax.export.bundle import export_bundle, generator_of
from snapgen_jax.export.client import LiteRTGenerator
from snapgen_jax.export.latents import Carried, load_latents, save_tokenizers
from snapgen_jax.export.program import parse
from snapgen_jax.export.sampler import Sampler
from snapgen_jax.generation import load_weights
from snapgen_jax.networks.context import ENCODERS
from snapgen_jax.networks.module import build
from snapgen_jax.training.checkpoint import Checkpointer
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.keys import key
from snapgen_jax.weights.mapping import reference_shapes
from snapgen_jax.weights.maps import gemma2
from snapgen_jax.workdir import prepare_workdir
from tests.recipes_for_tests import ONE_STAGE
from tests.tiny_tokenizers import write_gemma

from .conftest import QUICK

ROOT = pathlib.Path(__file__).parents[2]
SD35 = ROOT / "tests" / "goldens" / "pipeline"  # tiny checkpoints in the layout of Stable Diffusion 3.5
PROMPTS = ("a photo of a red circle", "two blue squares left of a green star")
CLIP = {"clip_l": str(SD35 / "text_encoder"), "clip_g": str(SD35 / "text_encoder_2")}
CLIP_TOKENIZERS = {"clip_l": str(SD35 / "tokenizer"), "clip_g": str(SD35 / "tokenizer_2")}
VAE = str(SD35 / "vae")
SHAPES = {"image_sizes": "((16,16),)", "reduction": 2, "latent_channels": 4}
ENCODINGS = {
    "clip_l": {"tokens": 77, "width": 8, "pooled": 8},
    "clip_g": {"tokens": 77, "width": 16, "pooled": 16},
    "language": {"tokens": 9, "width": 16},
    "conditioner": {"width": 24, "language_width": 16},
}


def overrides(section, values):
    return [
        line
        for name, value in values.items()
        for line in (
            overrides(f"{section}.{name}", value) if isinstance(value, dict) else [f"{section}.{name}={value}"]
        )
    ]


STORED = ["inputs.kind=stored", "inputs.context_tokens=5", "inputs.context_width=24", "inputs.pooled_width=24"]


def make_config(workdir, *changes, encodings=ENCODINGS):
    """A workdir of the first stage of pretraining in small, without a checkpoint; its recipe."""
    network = {**ONE_STAGE, "latent_channels": 4, "context_width": 24, "pooled_width": 24}
    lines = [*overrides("inputs", SHAPES | encodings), *overrides("network", network), *changes]
    resolved = load_experiment(str(ROOT / "configs/pretrain/t2i_256.py:runlocal"), lines)
    prepare_workdir(resolved.config, workdir)
    return resolved.build("cpu")


def make_run(workdir, *changes, encodings=ENCODINGS):
    """The same with a checkpoint of drawn weights: a fresh UNet's output is zero."""
    state = jax.jit(make_config(workdir, *changes, encodings=encodings).init)(key(0, 0, "init"))
    random = np.random.default_rng(0)

    def draw(x):
        return jnp.asarray((x.ndim == 1) + random.standard_normal(x.shape) / np.sqrt(np.prod(x.shape[:-1])), x.dtype)

    player = state.players["model"]
    params = jax.tree.map(draw, player.params)
    state = state.replace(step=jnp.int32(1), players={"model": player.replace(params=params, ema=params)})
    checkpointer = Checkpointer(workdir)
    checkpointer.save(state, 1, {})
    checkpointer.close()
    return workdir


@pytest.fixture(scope="module", autouse=True)
def generators_are_quick_to_compile(quick_to_compile):
    """See `quick_to_compile`."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("latents") / "run")


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """Folder of a tiny Gemma with its tokenizer."""
    folder = write_gemma(tmp_path_factory.mktemp("language") / "gemma")
    sizes = {"vocab_size": 400, "hidden_size": 16, "num_hidden_layers": 3, "intermediate_size": 24, "head_dim": 8}
    values = {**sizes, "num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 12}
    golden = json.loads((ROOT / "tests/goldens/gemma2/config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**golden, **values}))
    config = gemma2.read_config({**golden, **values})
    random = np.random.default_rng(1)
    shapes = reference_shapes(gemma2.weight_map(config), build(config)[1])
    tensors = {name: 0.2 * random.standard_normal(shape).astype("f") for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def everything(gemma):
    """What a bundle with all three encoders carries."""
    return Carried(None, {**CLIP, "language": gemma}, CLIP_TOKENIZERS, VAE)


def clips(**changes):
    return dataclasses.replace(Carried(None, CLIP, CLIP_TOKENIZERS, VAE), **changes)


# --- conditions ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def networks(run, everything):
    """`{role: parameters}` of the run and of all that may stand around it."""
    whole = load_latents(run, everything)
    return {**whole.load_frozen(None, "generate"), **load_weights(run, whole)["model"]}


@pytest.mark.parametrize("used", [("clip_l", "clip_g"), ("clip_g", "language"), ENCODERS])
def test_an_encoder_that_is_left_out_counts_as_dropped(run, everything, networks, used):
    folders = {name: everything.folders[name] for name in used}
    tokenizers = {name: folder for name, folder in CLIP_TOKENIZERS.items() if name in used}
    recipe, whole = load_latents(run, Carried(used, folders, tokenizers, VAE)), load_latents(run, everything)
    tokens = tokens_of(whole)
    kept = {name: jnp.full(2, float(name in used)) for name in ENCODERS}

    def condition(inputs, tokens, kept):
        return inputs.condition(networks, inputs.draw_condition(networks, tokens, jax.random.key(0), kept))

    expected = jax.jit(condition, static_argnums=0)(whole.inputs, tokens, kept)
    given = {name: tokens[name] for name in recipe.conditions()}
    made = jax.jit(condition, static_argnums=0)(recipe.inputs, given, {})
    for array, right in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        assert verify.relative_l2(array, right) <= 1e-6
    # And the units that a client calls in turn: without the language model its masked tokens are not there at all.
    arrays = {name: array[:1] for name, array in given.items()}
    for unit in recipe.inputs.exports().encoders:
        named = {name: jnp.asarray(arrays[name]) for name in unit.inputs}
        arrays |= jax.jit(unit.function)(unit.select(networks), **named)
    length = arrays["sequence"].shape[1]
    assert length == (86 if "language" in used else 77) and not expected.mask[0, length:].any()
    for name in ("sequence", "mask"):
        assert verify.relative_l2(arrays[name][0], getattr(expected, name)[0, :length]) <= 1e-6
    assert verify.relative_l2(arrays["pooled"], expected.pooled[:1]) <= 1e-6


def tokens_of(recipe):
    """Token ids and masks of the prompts, by the published tokenizers."""
    made = {}
    for name, spec in recipe.tokenizers().items():
        ids, mask = PretrainedTokenizer.load(spec.folder).encode(PROMPTS, spec.length)
        made |= {name: ids, f"{name}_mask": mask}
    return {name: jnp.asarray(made[name]) for name in recipe.conditions()}


# --- bundles ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(run, everything, tmp_path_factory):
    """That of all three encoders, compared with the run's own generator on the way."""
    recipe = load_latents(run, everything)
    params, frozen = load_weights(run, recipe), recipe.load_frozen(None, "generate")
    root = tmp_path_factory.mktemp("bundle")
    report = export_bundle(
        recipe, params, frozen, save_tokenizers(recipe, root), root / "bundle",
        backend=QUICK, reference=generator_of(recipe, params, frozen), gpu_check="skip",
    )  # fmt: skip
    return recipe, report


def test_the_bundle_holds_every_network_and_draws_what_the_run_draws(bundle):
    _, report = bundle
    manifest = json.loads((report.folder / "manifest.json").read_text())
    assert set(manifest["units"]) == {"unet", *ENCODERS, "conditioner", "decoder"}
    assert report.numbers["export.image.max_grey_to_generator"] <= 1
    assert [check.name for check in verify.checks(report.folder) if not check.passed] == []
    images = LiteRTGenerator(report.folder, precision="f16").generate(PROMPTS)
    assert images.shape == (2, 16, 16, 3) and (images[0] != images[1]).any() and images.std() > 3


def test_each_tokenizer_of_the_bundle_gives_the_ids_of_the_published_one(bundle):
    recipe, report = bundle
    client = LiteRTGenerator(report.folder).bundle
    prompts = [*PROMPTS, "", "TWO  Blue\tcircles, naïve ★", "a ring above a cross " * 30]
    made = client.tokenize(prompts)
    for name, spec in recipe.tokenizers().items():
        ids, mask = PretrainedTokenizer.load(spec.folder).encode(prompts, spec.length)
        np.testing.assert_array_equal(made[name], ids)
        if name == "language":
            np.testing.assert_array_equal(made["language_mask"], mask)
    pads = {entry.tokens: (entry.kind, entry.pad, len(entry.end)) for entry in client.program.tokenizers}
    assert pads == {"clip_l": ("BPE", 309, 1), "clip_g": ("BPE", 0, 1), "language": ("BPE", 0, 0)}


def test_the_calls_without_a_condition_run_no_encoder(bundle):
    _, report = bundle
    sampler = LiteRTGenerator(report.folder).sampler
    tokens = {n: np.load(report.folder / "golden" / "inputs" / f"{n}.npy")[0] for n in sampler.program.inputs}
    called = []
    units = {name: lambda name=name, **arrays: called.append(name) for name in sampler.units}
    null = dataclasses.replace(sampler, units=units).null_contexts(sampler.given(tokens))["text"]
    assert not called and null["sequence"].shape == (1, 86, 24)
    assert not any(null[name].any() for name in ("sequence", "mask", "pooled"))


def test_units_that_are_loaded_in_turn_draw_the_same_and_never_two_at_once(bundle, monkeypatch):
    from snapgen_jax.export import client

    _, report = bundle
    plain, alive, most, load = LiteRTGenerator(report.folder).generate(PROMPTS[:1]), [0], [0], client.litert_unit

    class Counted:
        def __init__(self, *arguments):
            self.unit = load(*arguments)
            alive[0] += 1
            most[0] = max(most[0], alive[0])

        def __call__(self, **arrays):
            return self.unit(**arrays)

        def __del__(self):
            alive[0] -= 1

    monkeypatch.setattr(client, "litert_unit", Counted)
    generator = LiteRTGenerator(report.folder, residency="in turn")
    assert alive == [0], "nothing is loaded before it is called"
    np.testing.assert_array_equal(generator.generate(PROMPTS[:1]), plain)
    assert most == [1]
    with pytest.raises(ValueError, match="'together' or 'in turn'; got 'now'"):
        LiteRTGenerator(report.folder, residency="now")


def test_the_manifest_says_how_much_memory_each_way_of_loading_takes(bundle):
    _, report = bundle
    manifest = json.loads((report.folder / "manifest.json").read_text())
    memory = manifest["memory"]
    peaks = [unit["peak_bytes"]["f32"] for unit in manifest["units"].values()]
    assert all(memory["process"] < peak < 2**30 for peak in peaks)
    assert memory["process"] < memory["f32"]["in_turn"] < 1.5 * max(peaks)
    assert report.numbers["export.peak_bytes_together_f16"] == memory["f16"]["together"]
    page = (report.folder / "README.md").read_text()
    assert f"peaks at {memory['f32']['in_turn'] / 1e6:.0f} MB (f32)" in page
    assert "| `tokenizers/clip_g.json` | BPE | `clip_g` |  | 77 | [308] | [309] | 0 |" in page


def test_a_run_whose_text_states_were_joined_leaves_with_the_decoder_alone(tmp_path):
    make_run(tmp_path, *STORED, encodings={})
    plain, decoded = load_latents(tmp_path, Carried()), load_latents(tmp_path, Carried(decoder=VAE))
    assert list(plain.exports().program["outputs"]) == ["latent"]
    params, frozen, plan = load_weights(tmp_path, decoded), decoded.load_frozen(None, "generate"), decoded.exports()
    weights = decoded.weights(params, frozen)
    units = {unit.name: functools.partial(jax.jit(unit.function), unit.select(weights)) for unit in plan.units}
    shapes = {unit.name: {name: x.shape for name, x in unit.inputs.items()} for unit in plan.units}
    given = {name: array[:1] for name, array in plan.golden.arrays.items()}
    noise = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype("f")
    made = Sampler(parse(json.loads(json.dumps(plan.program))), units, shapes).run(
        {name: array[0] for name, array in given.items()}, noise[0]
    )
    drawn = generator_of(decoded, params, frozen)(given, noise)["image"]
    assert made["image"].shape == (16, 16, 3) and verify.grey_levels(made["image"], drawn[0]).max() <= 1
    with pytest.raises(ConfigError, match="reads text states that were joined beforehand"):
        load_latents(tmp_path, clips())


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("carried", "says"),
    [
        (Carried(decoder=VAE), "a bundle needs a text encoder to read prompts"),
        (clips(encoders=("clip_l", "t5")), "was not trained with a text encoder 't5'; its encoders are clip_l, clip_g"),
        (clips(encoders=("clip_l",)), "--clip_g names a folder, and --encoders=clip_l leaves that encoder out"),
        (clips(encoders=ENCODERS), "--encoders names language, and no folder has its weights: give --language=FOLDER"),
        (clips(folders={"clip_l": "gone"}, tokenizers={}), "--clip_l: gone is no folder"),
        (clips(tokenizers={}), "holds no tokenizer of clip_l .*give --clip_l_tokenizer=FOLDER"),
        (
            clips(folders={**CLIP, "clip_l": CLIP["clip_g"]}),
            r"was not trained with .*\(77, 16, 16\).*clip_l \(77, 8, 8\)",
        ),
        (clips(decoder=""), "holds no decoder: give --decoder"),
        (clips(decoder="gone"), "gone is neither a run nor a published autoencoder"),
    ],
)
def test_what_a_bundle_cannot_carry_is_named(run, carried, says):
    with pytest.raises(ConfigError, match=says):
        load_latents(run, carried)


def test_a_decoder_of_other_latents_is_named(tmp_path):
    make_config(tmp_path / "run", "inputs.latent_channels=8", "network.latent_channels=8")
    with pytest.raises(ConfigError, match="decodes latents of channels 4, and the run was trained on channels 8"):
        load_latents(tmp_path / "run", clips())


def test_a_decoder_of_another_normalisation_is_named(tmp_path):
    """The config of the run describes the autoencoder that made its latents."""
    other = pathlib.Path(shutil.copytree(VAE, tmp_path / "vae"))
    values = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**values, "scaling_factor": 0.18215}))
    described = {"channels": (8, 16), "latent_channels": 4, "groups": 4}
    made = overrides("inputs.encoders.codec", {"autoencoder": described})
    make_config(tmp_path / "run", *made)
    load_latents(tmp_path / "run", clips())
    with pytest.raises(
        ConfigError, match=r"decodes latents of scale 0\.18215, and the run was trained on scale 1\.5305"
    ):
        load_latents(tmp_path / "run", clips(decoder=str(other)))


def test_what_the_config_of_a_run_names_need_not_be_named_again(tmp_path):
    folders = {f"{name}_folder": folder for name, folder in CLIP.items()}
    folders |= {f"{name}_tokenizer": folder for name, folder in CLIP_TOKENIZERS.items()}
    make_config(tmp_path, *overrides("inputs.encoders", {**folders, "codec": {"workdir": VAE}}))
    inputs = load_latents(tmp_path, Carried()).config.inputs
    assert inputs.use == ("clip_l", "clip_g") and inputs.codec.workdir == VAE
    assert inputs.clip_g_tokenizer == CLIP_TOKENIZERS["clip_g"]


def test_encoders_that_were_never_left_out_or_never_there_are_named(tmp_path):
    make_config(tmp_path / "run", "inputs.encoder_dropout=(0.5,0.5,0.0)")
    with pytest.raises(
        ConfigError, match=r"never trained with the text encoders clip_l, clip_g alone.*leaving out lang"
    ):
        load_latents(tmp_path / "run", clips())


def test_the_command_writes_nothing_where_it_is_refused_and_a_bundle_where_it_is_not(run, tmp_path, capsys):
    out = tmp_path / "bundle"
    line = ["export", f"--workdir={run}", f"--out={out}", f"--decoder={VAE}", "--backend", QUICK, "--gpu=skip"]
    line += [f"--clip_l={CLIP['clip_l']}", "--precisions=f16"]
    assert cli.main(line) == 78
    assert "holds no tokenizer of clip_l" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert cli.main([*line, f"--clip_l_tokenizer={CLIP_TOKENIZERS['clip_l']}", "--encoders=clip_l"]) == 0
    assert json.loads((out / "manifest.json").read_text())["precisions"] == ["f16"]
    assert {path.name for path in (out / "tokenizers").iterdir()} == {"clip_l.json"}
    assert LiteRTGenerator(out, precision="f16").generate(PROMPTS[:1]).shape == (1, 16, 16, 3)
