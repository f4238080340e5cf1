"""A folder of weights is the run that it came from, bit for bit, wherever a run is named; it is whole or not there."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from snapgen_jax.cli import main
from snapgen_jax.generation import load, load_recipe, load_weights
from snapgen_jax.networks.module import flatten
from snapgen_jax.release import writer
from snapgen_jax.release.writer import export_weights
from snapgen_jax.training.exits import ConfigError, ExitCode
from tests.recipes_for_tests import state_away_from_zero
from tests.released_for_tests import PROMPTS, experiment, rewrite


def assert_same_bits(found, expected):
    found, expected = flatten(jax.device_get(found)), flatten(jax.device_get(expected))
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].dtype == array.dtype and found[path].tobytes() == np.asarray(array).tobytes(), path


@pytest.fixture
def copy(released, tmp_path):
    """Of the student's folder with shards, to spoil."""
    return shutil.copytree(released.folders["student_trained"], tmp_path / "copy")


@pytest.mark.parametrize("name", ["clip", "autoencoder", "student"])
def test_the_averaged_weights_come_back_bit_for_bit(released, name):
    folder = released.folders[name]
    read = load_weights(folder, load_recipe(folder))
    kept = {player: p.params if p.ema is None else p.ema for player, p in released.states[name].players.items()}
    assert any(p.ema is not None for p in released.states[name].players.values())
    assert_same_bits(read, kept)


def test_the_trained_weights_come_back_bit_for_bit_from_shards(released):
    folder = released.folders["student_trained"]
    player = released.states["student"].players["model"]
    read = load_weights(folder, load_recipe(folder))
    assert_same_bits(read, {"model": player.params})
    assert not np.array_equal(read["model"]["unet"]["conv_in"]["kernel"], player.ema["unet"]["conv_in"]["kernel"])
    listed = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2 and {file.name for file in shards} == set(listed["weight_map"].values())
    for file in shards:
        arrays = load_file(file)
        assert all(listed["weight_map"][name] == file.name for name in arrays)
        assert len(arrays) == 1 or sum(array.nbytes for array in arrays.values()) <= 20_000
    assert listed["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(player.params))


def test_it_draws_as_the_run_did_with_no_workdir_left(released):
    np.testing.assert_array_equal(load(released.folders["student"]).generate(PROMPTS, seed=3), released.images)
    np.testing.assert_array_equal(load(released.folders["clip"]).run(PROMPTS)["text"], released.embeddings)


def test_it_is_exported_again_as_it_is(released, tmp_path):
    export_weights(released.folders["student"], tmp_path / "again")
    of_both = [{p.relative_to(f) for p in f.rglob("*")} for f in (released.folders["student"], tmp_path / "again")]
    assert {path for path in of_both[0] ^ of_both[1] if "samples" not in str(path)} == set()
    for name in ("model.safetensors", "config.json", "weights.json", "tokenizer.json", "runs/clip/model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (released.folders["student"] / name).read_bytes(), name
    with pytest.raises(ConfigError, match="holds the weights 'ema' alone"):
        export_weights(released.folders["student"], tmp_path / "other", kept="trained")


def test_a_run_starts_from_it_and_reads_its_frozen_networks_from_others(released, tmp_path):
    folders = released.folders
    places = [f"inputs.text_workdir={folders['clip']}", f"inputs.codec.workdir={folders['autoencoder']}"]
    made = experiment("shapes/quickstart", tmp_path, *released.on_them, *places, f"init_from={folders['student']}")
    state = made.recipe.warm_start(state_away_from_zero(made.recipe), made.earlier_weights())
    assert_same_bits(state.players["model"].params, released.states["student"].players["model"].ema)
    frozen = made.recipe.load_frozen(None)
    assert_same_bits(frozen["text"], released.states["clip"].players["model"].ema["text"])
    assert_same_bits(frozen["codec"], released.states["autoencoder"].players["model"].ema["autoencoder"])
    assert made.own_tokenizer.text == (folders["clip"] / "tokenizer.json").read_text()


@pytest.mark.parametrize("field", ["workdir", "weights"])
def test_a_student_learns_from_it(released, tmp_path, field):
    folders = released.folders
    inner = [f"inputs.text_workdir={folders['student'] / 'runs' / 'clip'}"]
    inner += [f"inputs.codec.workdir={folders['student'] / 'runs' / 'autoencoder'}"]
    network = load_recipe(folders["student"]).config.network
    teacher = ["recipe=distillation", f"teacher.{field}={folders['student']}", "teacher.prediction=x_0"]
    teacher += ["teacher_taps=('up_0',)"]
    shape = {"kind": "unet", "preset": "smoke", "latent_channels": network.latent_channels}
    made = experiment("shapes/quickstart", tmp_path, *released.on_them, *inner, *teacher, f"teacher.network={shape}")
    frozen = made.recipe.load_frozen(None)
    assert_same_bits(frozen["teacher/unet"], released.states["student"].players["model"].ema["unet"])


def test_its_parameters_go_straight_onto_a_mesh(released):
    from snapgen_jax.networks.module import frozen_spec
    from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
    from snapgen_jax.weights.frozen import load_run

    recipe = load_recipe(released.folders["student"])
    network = recipe.networks()["unet"]
    mesh = make_mesh(MeshConfig(data=1, fsdp=4), jax.devices()[:4])
    spec = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, np.float32), frozen_spec(network))
    loaded = load_run(released.folders["student"], {"unet": spec}, mesh=mesh, rules=network.config.rules())
    assert not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(loaded))
    assert_same_bits(loaded["unet"], released.states["student"].players["model"].ema["unet"])


# --- what is wrong ---------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_is_refused_and_left_alone(released, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(ConfigError, match="is there already and is no empty folder"):
            export_weights(released.folders["clip"], out)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_fails_midway_leaves_nothing(released, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "model_card", full)  # after the parameters
    with pytest.raises(OSError, match="No space"):
        export_weights(released.folders["clip"], tmp_path / "out" / "clip")
    assert not list((tmp_path / "out").iterdir())


def test_a_run_that_its_inputs_name_must_be_there(released, tmp_path):
    with pytest.raises(ConfigError, match=r"inputs\.(text_workdir|codec\.workdir) names .* no run and no folder"):
        export_weights(released.moved / "student", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_another_step_than_it_holds_is_refused(released):
    with pytest.raises(ConfigError, match="holds the weights of step 2 alone, not of 1"):
        load(released.folders["clip"], step=1)


def test_an_index_or_a_manifest_that_leaves_the_folder_is_refused(copy):
    index = copy / "model.safetensors.index.json"
    text = index.read_text()
    listed = json.loads(text)["weight_map"]
    for escape in ("../clip/model.safetensors", "/etc/passwd", "runs/clip/model.safetensors"):
        rewrite(index, weight_map={**listed, next(iter(listed)): escape})
        with pytest.raises(ConfigError, match="an index may name files of its own folder only"):
            load_weights(copy, load_recipe(copy))
    index.write_text(text)
    for escape in ("../clip", "runs/../../clip", "/etc", "runs", "runs/a/b"):
        rewrite(copy / "weights.json", runs={"inputs.text_workdir": escape})
        with pytest.raises(ConfigError, match=r"a run lies in 'runs/NAME' of the folder"):
            load(copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "has format 2, and this version reads 1"),
        ({"step": None}, r"weights\.json is damaged"),
        ({"runs": {"inputs.text_workdr": "runs/clip"}}, "text_workdr"),
    ],
)
def test_a_manifest_that_is_damaged_is_named(copy, changes, message):
    rewrite(copy / "weights.json", **changes)
    with pytest.raises(ConfigError, match=message):
        load(copy)


def test_parameters_that_the_config_does_not_describe_are_named(copy):
    config = json.loads((copy / "config.json").read_text())
    rewrite(copy / "config.json", network={**config["network"], "ffn_ratio": 2})
    with pytest.raises(ConfigError, match=r"ffn/inner/kernel: \[8, 48\], the config says \[8, 32\]"):
        load(copy)
    (copy / "model-00001-of-00003.safetensors").unlink(missing_ok=True)
    next(iter(sorted(copy.glob("model-00002*")))).unlink()
    rewrite(copy / "config.json", network=config["network"])
    with pytest.raises(ConfigError, match=r"names files that .* does not hold"):
        load(copy)


def test_nothing_trains_in_it(released, capsys):
    folder = released.folders["clip"]
    before = sorted(folder.rglob("*"))
    code = main(["train", "--config=configs/shapes/clip.py:runlocal", f"--workdir={folder}"])
    assert code == ExitCode.BAD_CONFIG and f"--config.init_from={folder}" in capsys.readouterr().err
    assert main(["status", f"--workdir={folder}"]) == ExitCode.BAD_CONFIG
    assert sorted(folder.rglob("*")) == before


# --- the command and the card ----------------------------------------------------------------------------------------


def test_the_command_writes_a_folder_and_says_what(released, tmp_path, capsys):
    out = tmp_path / "w"
    arguments = ["weights", "export", f"--workdir={released.moved / 'clip'}", f"--out={out}", "--license=other"]
    assert main(arguments) == ExitCode.BAD_CONFIG and "has a name" in capsys.readouterr().err
    named = ["--license_name=Mine: 'own' \"one\"", "--license_link=https://example.org/l"]
    assert main([*arguments, *named]) == ExitCode.DONE
    assert f"wrote the weights of step 2 to {out}" in capsys.readouterr().out
    front = front_matter(out)
    assert front["license_name"] == "Mine: 'own' \"one\"" and front["license_link"] == "https://example.org/l"


def front_matter(folder):
    import yaml

    _, matter, _ = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(matter)


def test_the_card_tells_what_the_run_wrote_down(released):
    folder = released.folders["student"]
    card = (folder / "README.md").read_text()
    assert front_matter(folder) == {
        "library_name": "snapgen-jax",
        "license": "apache-2.0",
        "pipeline_tag": "text-to-image",
        "tags": ["jax", "snapgen", "flow_matching"],
    }
    assert "| updates | 2 of 2 |" in card and "| examples seen | 16 (8 an update) |" in card
    assert "| `fid` | 31.25 |" in card and "![grid\\_00000002.png](samples/grid_00000002.png)" in card
    assert (folder / "samples" / "grid_00000002.png").is_file()
    unet = sum(leaf.size for leaf in jax.tree.leaves(released.states["student"].players["model"].params["unet"]))
    assert f"| `model/unet` | {unet:,} |" in card
    assert "<script>" not in card and "frechet\\|<b>" in card  # in a code span, which shows it as it is
    clip = (released.folders["clip"] / "README.md").read_text()
    assert "pipeline_tag" not in clip and "`CLIPTextModelWithProjection.from_pretrained(" in clip
    assert front_matter(released.folders["clip"])["license"] == "unknown"
