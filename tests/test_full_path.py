"""The way from a folder of photographs to a verified bundle, in its shortest form, and killed on the way."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import snapgen_jax
from snapgen_jax.chain import load_chain
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


def start(workdir: pathlib.Path, **how) -> subprocess.Popen:
    """The chain in a process group of its own, on one device: the tests pretend to have eight."""
    command = [sys.executable, "-m", "snapgen_jax.cli", "chain", f"--config={CONFIG}:shortest", f"--workdir={workdir}"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
    return subprocess.Popen(command, env=environment, start_new_session=True, text=True, **how)


@pytest.mark.slow
def test_photographs_become_a_verified_bundle_though_the_chain_is_killed(tmp_path):
    left = tmp_path / "path"
    process = start(left, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (left / "collected").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"

    said, _ = start(left, stdout=subprocess.PIPE).communicate()
    assert "checks passed" in said, said
    manifest = json.loads((left / "encoded/distilled/manifest.json").read_text())
    assert sum(shard["examples"] for shard in manifest["shards"]) == 16
    assert {"latent", "clip_l_states", "teacher_sequence"} <= manifest["arrays"].keys()
    run, weights = (snapgen_jax.load(left / name) for name in ("distilled", "released/weights"))
    jax.tree.map(np.testing.assert_array_equal, run.params, weights.params)
    bundle = json.loads((left / "released/bundle/manifest.json").read_text())
    assert {"clip_l", "conditioner", "unet", "decoder"} <= set(bundle["units"])
    assert not list(left.rglob(".writing-*"))
