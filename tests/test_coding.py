"""An autoencoder, a tiny decoder for it and a generator on its latents, from the command line: train, encode, decode,
sample and export with either decoder."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from snapgen_jax.cli import main
from snapgen_jax.coding import codec_of_run, codec_of_weights, encode_files
from snapgen_jax.config import from_json, load_experiment, to_json
from snapgen_jax.experiment import Experiment
from snapgen_jax.generation import load, load_recipe
from snapgen_jax.networks.tiny_decoder import TinyDecoderCodec
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.scoring import evaluate
from snapgen_jax.training import loop
from snapgen_jax.training.exits import ConfigError, ExitCode
from snapgen_jax.training.fingerprint import fingerprint
from snapgen_jax.weights.maps import sd3_autoencoder

pytestmark = pytest.mark.usefixtures("quick_to_compile")
GOLDENS = pathlib.Path(__file__).parent / "goldens"
QUIET = ["tensorboard=False", "evaluation.final=()", "train_steps=2"]


def snapgen(*arguments):
    assert main([str(argument) for argument in arguments]) == ExitCode.DONE


def train(spec, workdir, *overrides):
    """As `snapgen train` does, on one of the eight devices."""
    resolved = load_experiment(f"configs/{spec}.py:runlocal", [*QUIET, *overrides])
    experiment = Experiment(resolved, workdir)
    experiment.record()
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    loop.train(experiment.recipe, experiment.data, experiment.config, workdir=workdir, mesh=mesh, quiet=True)
    return workdir


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: workdir}, each trained for two steps by its config."""
    root = tmp_path_factory.mktemp("runs")
    ae = train("shapes/autoencoder", root / "autoencoder")
    tiny = train("shapes/tiny_decoder", root / "tiny", f"inputs.codec.workdir={ae}")
    network = from_json((ae / "config.json").read_text()).autoencoder.to_dict()
    codec = ["kind=autoencoder", f"workdir={ae}", f"autoencoder={network}"]
    codec = [f"inputs.codec.{change}" for change in codec]
    student = train("shapes/quickstart", root / "student", "network.latent_channels=4", *codec)
    return {"autoencoder": ae, "tiny": tiny, "student": student}


@pytest.fixture
def photo(tmp_path):
    """A picture whose sides are odd."""
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (23, 17, 3), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize("name", ["autoencoder", "tiny"])
def test_a_photograph_goes_through_a_run_and_comes_back(runs, photo, tmp_path, name):
    latents, out = tmp_path / "latents.safetensors", tmp_path / "out"
    snapgen("encode", f"--workdir={runs[name]}", f"--out={latents}", photo)
    stored = load_file(latents)["photo"]
    assert stored.shape == (11, 8, 4) and stored.dtype == np.float32
    snapgen("decode", f"--workdir={runs[name]}", latents, f"--out={out}")
    assert np.asarray(Image.open(out / "photo.png")).shape == (22, 16, 3)


def test_both_runs_encode_alike_and_decode_apart(runs, photo):
    large, tiny = (codec_of_run(runs[name]) for name in ("autoencoder", "tiny"))
    latents = [encode_files(codec, [str(photo)])["photo"] for codec in (large, tiny)]
    np.testing.assert_array_equal(*latents)
    assert np.abs(large.decode(latents[0][None]) - tiny.decode(latents[0][None])).max() > 0.01


def test_published_weights_encode_as_the_reference_does(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    codec = codec_of_weights(GOLDENS / "autoencoder")
    np.testing.assert_allclose(
        encode_files(codec, [str(tmp_path / "a.png")])["a"], codec.encode(image[None] / 127.5 - 1)[0], atol=1e-4
    )
    with pytest.raises(ConfigError, match="is no folder of a published autoencoder"):
        codec_of_weights(tmp_path)


def test_a_generator_on_latents_draws_with_either_decoder_and_trains_neither(runs, tmp_path):
    frozen = load(runs["student"]).frozen
    assert fingerprint(frozen["codec"]) == fingerprint(load(runs["tiny"]).frozen["codec"])
    saved = json.loads(next((runs["student"] / "checkpoints").glob("2/meta/metadata")).read_text())
    assert not [name for name in saved["shapes"] if "autoencoder" in name or "codec" in name]
    images = [load(runs["student"], decoder=decoder).generate(["a red circle"]) for decoder in (None, runs["tiny"])]
    assert images[0].shape == images[1].shape == (1, 32, 32, 3)
    assert (images[0] != images[1]).any()
    out = tmp_path / "s.png"
    snapgen(
        "sample", f"--workdir={runs['student']}", f"--decoder={runs['tiny']}", "--prompt=a red circle", f"--out={out}"
    )
    assert out.is_file()


def test_the_bundle_of_a_generator_decodes_with_the_tiny_decoder(runs, tmp_path):
    bundle = tmp_path / "bundle"
    snapgen("export", f"--workdir={runs['student']}", f"--decoder={runs['tiny']}", f"--out={bundle}")
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["units"].keys() == {"unet", "text_encoder", "decoder"}
    assert manifest["measured"]["export.decoder.rel_l2_f32"] <= 1e-5
    assert manifest["measured"]["export.image.max_grey_to_generator"] <= 1  # against the JAX sampler, decoder included
    snapgen("sample", f"--bundle={bundle}", "--prompt=a red circle", f"--out={tmp_path / 's.png'}")


def test_a_tiny_decoder_is_kept_apart_from_its_encoder(runs):
    generator = load(runs["tiny"])
    codec = generator.recipe.codec(generator.params, generator.frozen)
    assert isinstance(codec, TinyDecoderCodec)
    assert generator.params["model"].keys() == {"decoder"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "--workdir={autoencoder}", "{photo}", "{photo}"], "two images are called 'photo'"),
        (["decode", "--workdir={autoencoder}", "{photo}"], "is no file of `snapgen encode`"),
        (["decode", "--workdir={autoencoder}", "{wide}"], "this codec's latents are [h, w, 4]"),
        (["decode", "--workdir={autoencoder}", "{escaping}"], "would leave the folder"),
        (["sample", "--workdir={student}", "--decoder={student}", "--prompt=a"], "a decoder is trained by"),
        (["sample", "--workdir={tiny}", "--prompt=a"], "takes no prompts"),
        (["sample", "--bundle={tiny}", "--decoder={tiny}", "--prompt=a"], "--decoder goes with --workdir"),
        (["export", "--workdir={tiny}"], "--decoder=THIS"),
    ],
)
def test_what_does_not_fit_gets_one_clear_line(runs, photo, tmp_path, arguments, message, capsys):
    save_file({"a": np.zeros((2, 2, 9), np.float32)}, tmp_path / "wide.safetensors")
    save_file({"../a": np.zeros((2, 2, 4), np.float32)}, tmp_path / "escaping.safetensors")
    names = {**runs, "photo": photo, **{name: tmp_path / f"{name}.safetensors" for name in ("wide", "escaping")}}
    code = main([argument.format(**names) for argument in arguments])
    captured = capsys.readouterr()
    assert code == ExitCode.BAD_CONFIG, captured
    assert message in captured.err and "Traceback" not in captured.err


def test_an_autoencoder_of_another_size_is_refused_by_name(runs, tmp_path):
    config = from_json((runs["tiny"] / "config.json").read_text())
    with config.unlocked():
        config.inputs.codec.autoencoder.channels = (8, 24)
    (tmp_path / "config.json").write_text(to_json(config))
    with pytest.raises(ConfigError, match=r"decoder/conv_in/bias: \[16\], the config says \[24\]"):
        load_recipe(tmp_path).load_frozen(None)


def test_the_full_size_config_runs_in_small_on_a_folder_of_images(tmp_path, runs):
    """`configs/decoder/sd3_tiny.py`: images without captions, and an autoencoder in the published layout."""
    for n in range(4):
        image = np.random.default_rng(n).integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / f"{n}.png")
    weights = GOLDENS / "autoencoder"
    network = sd3_autoencoder.read_config(json.loads((weights / "config.json").read_text()))
    codec = [f"inputs.codec.workdir={weights}", f"inputs.codec.autoencoder={dataclasses.asdict(network)}"]
    decoder = "decoder={'preset': 'smoke', 'channels': (16, 8, 8), 'blocks': (1, 1, 1)}"
    workdir = train("decoder/sd3_tiny", tmp_path / "run", f"data.path={tmp_path}", *codec, decoder)
    assert not (workdir / "tokenizer.json").exists()
    numbers = json.loads((workdir / "metrics" / "train.jsonl").read_text().splitlines()[-1])
    assert numbers["finite"] and {"l1", "perceptual"} <= numbers.keys()
    evaluated = evaluate(workdir, ["reconstruction"])
    assert evaluated["reconstruction.large.psnr"] > 0 < evaluated["reconstruction.tiny.ssim"] + 1
    assert (workdir / "samples" / "reconstruction.png").is_file()
