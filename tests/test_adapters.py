"""`snapgen adapters`: a run's adapters as files draw what the run draws, and a network's images become a prior."""

import json

import jax
import numpy as np
import pytest

from snapgen_jax.cli import main
from snapgen_jax.config import load_experiment
from snapgen_jax.data.config import DataConfig, DomainConfig
from snapgen_jax.data.sources import build_source
from snapgen_jax.experiment import Experiment
from snapgen_jax.generation import load
from snapgen_jax.training.checkpoint import Checkpointer
from snapgen_jax.training.exits import ConfigError, ExitCode
from snapgen_jax.training.keys import key
from tests.recipes_for_tests import ONE_STAGE

pytestmark = pytest.mark.usefixtures("quick_to_compile")
SMALL = [
    *(f"network.{name}={value!r}" for name, value in ONE_STAGE.items()),
    "inputs.text.layers=1",
    "data.vocab_size=300",
]


def run(workdir, config, *changes):
    """A run as it is left by training: its records, and a checkpoint of random weights."""
    experiment = Experiment(load_experiment(f"configs/shapes/{config}.py:runlocal", [*SMALL, *changes]), workdir)
    experiment.record()
    random = np.random.default_rng(1)
    state = jax.jit(experiment.recipe.init)(key(0, 0, "init"))
    player = state.players["model"]
    player = player.replace(ema=jax.tree.map(lambda x: x + 0.3 * random.normal(size=x.shape).astype("f"), player.ema))
    checkpointer = Checkpointer(workdir)
    checkpointer.save(state.replace(players={"model": player}), 0, {})
    checkpointer.close()
    return str(workdir)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return run(tmp_path_factory.mktemp("base"), "adapters_base")


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    targets = r"lora.targets=('attention/', 'conv_in', 'text/token_embedding')"
    return run(tmp_path_factory.mktemp("tuned"), "adapters", f"base={base}", targets)


def test_the_files_of_a_run_merged_into_its_base_draw_what_the_run_draws(base, tuned, tmp_path, capsys):
    out = tmp_path / "files"
    assert main(["adapters", "export", f"--workdir={tuned}", f"--out={out}"]) == ExitCode.DONE
    assert capsys.readouterr().out.splitlines() == [f"wrote {out}/text", f"wrote {out}/unet"]
    assert json.loads((out / "unet" / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    drawn = load(tuned).generate(["a moon", "a red circle"])
    merged = load(base, adapters=out)
    np.testing.assert_array_equal(merged.generate(["a moon", "a red circle"]), drawn)
    plain = load(base)
    assert np.abs(drawn.astype(int) - merged.with_weights(plain.params, plain.frozen).generate(["a moon"])).max() > 8
    with pytest.raises(ConfigError, match="a run of Adapters takes no further adapters; give the run that it adapts"):
        load(tuned, adapters=out)


def test_a_network_draws_its_own_prior_which_the_data_source_reads(base, tmp_path, capsys):
    out = tmp_path / "prior"
    command = ["adapters", "prior", f"--workdir={base}", f"--out={out}", "--count=3"]
    assert main([*command, "--prompt=a ring", "--prompt=a blue star"]) == ExitCode.DONE
    lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == ["a ring", "a blue star", "a ring"]
    expected = load(base).generate(["a ring", "a blue star", "a ring"])
    domains = DomainConfig(source="new_object"), DomainConfig(source="folder", path=str(out), validation_share=0.0)
    source = build_source(DataConfig(mixture=domains), "train")
    rng = np.random.default_rng(0)
    for i in range(3):
        np.testing.assert_array_equal(source.example(10 + i, rng)["image"], expected[i])
    assert main(command) == ExitCode.BAD_CONFIG
    assert "holds images already; give --out another folder" in capsys.readouterr().err


def test_what_does_not_fit_is_one_error(base, tuned, tmp_path, capsys):
    for command, message in (
        (["adapters", "export", f"--workdir={base}", f"--out={tmp_path / 'x'}"], "trained no adapters"),
        (["adapters", "export", f"--workdir={tuned}", "--out=gs://bucket/x"], "give --out a local folder"),
        (["adapters", "prior", f"--workdir={base}", f"--out={tmp_path / 'y'}", "--count=0"], "--count is 0"),
        (["sample", f"--workdir={base}", f"--adapters={tmp_path}", "--prompt=a"], "holds no ROLE/adapter_config.json"),
        (["sample", "--bundle=b", "--adapters=a", "--prompt=a"], "--adapters goes with --workdir"),
    ):
        assert main(command) == ExitCode.BAD_CONFIG
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
