"""A host holds one shard of one parameter at a time, measured on a process of its own."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="reads Linux's memory counters")
def test_loading_adds_no_more_than_two_shards_and_a_window_to_the_arrays_themselves():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "benchmarks" / "weights_load.py", "--megabytes=200", "--files=3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["devices"] == 8
    assert result["arrays_mb"] == pytest.approx(2e-6 * result["parameters"], rel=1e-2)  # only norms are replicated
    assert result["overhead_mb"] <= 100 + 2 * result["largest_shard_mb"], result
