"""The way from a folder of photographs to a verified bundle, in its shortest form, and killed on the way."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

import snapgen_jax
from snapgen_jax.chain import load_chain
from snapgen_jax.cli import main
from snapgen_jax.config import load_experiment

CONFIG = "configs/full_path.py"
RUNS = ("t2i_256", "t2i_512", "t2i_1024", "distilled", "four_steps", "tiny_decoder")


def test_every_run_of_the_whole_chain_is_the_method_of_the_config_that_a_pod_trains():
    chain, _ = load_chain(f"{CONFIG}:runlocal")
    assert [stage.name for stage in chain.stages if stage.config] == list(RUNS)
    on_pods = ("pretrain/t2i_256", "pretrain/t2i_512", "pretrain/t2i_1024", "distill/t2i_1024_sd35l")
    on_pods += ("fewstep/t2i_1024_4step", "decoder/sd3_tiny")
    for stage, pod in zip(RUNS, on_pods, strict=True):
        small, full = (load_experiment(name).recipe for name in (f"{CONFIG}:runlocal.{stage}", f"configs/{pod}.py"))
        assert type(small) is type(full) and type(small.inputs) is type(full.inputs)


@pytest.mark.slow
def test_photographs_become_a_verified_bundle_though_the_chain_is_killed(tmp_path, capfd):
    chain = ["chain", f"--config={CONFIG}:shortest", f"--workdir={tmp_path}/path"]
    begun = tmp_path / "path/collected"
    process = subprocess.Popen([sys.executable, "-m", "snapgen_jax.cli", *chain], start_new_session=True)
    while process.poll() is None and not begun.exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"

    assert main(chain) == 0
    said = capfd.readouterr().out
    assert "checks passed" in said
    left = tmp_path / "path"
    manifest = json.loads((left / "encoded/distilled/manifest.json").read_text())
    assert sum(shard["examples"] for shard in manifest["shards"]) == 16
    assert {"latent", "clip_l_states", "teacher_sequence"} <= manifest["arrays"].keys()
    run, weights = (snapgen_jax.load(left / name) for name in ("distilled", "released/weights"))
    equal = snapgen_jax.generation.jax.tree.map(lambda a, b: bool((a == b).all()), run.params, weights.params)
    assert all(snapgen_jax.generation.jax.tree.leaves(equal))
    bundle = json.loads((left / "released/bundle/manifest.json").read_text())
    assert {"clip_l", "clip_g", "conditioner", "unet", "decoder"} <= set(bundle["units"])
    assert not list(pathlib.Path(left).rglob(".writing-*"))
