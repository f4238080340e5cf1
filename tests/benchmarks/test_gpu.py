"""Our networks beside PyTorch on a GPU: rows in order of value, failures that cost one row, the table of a run."""

import json
import math
import os
import subprocess
import sys
import time

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.rows import ROWS, START, chosen, jobs, that_fit
from benchmarks.gpu.side import MARK
from benchmarks.gpu.summary import read, table
from benchmarks.program_size import counts

BY_NAME = {row.name: row for row in ROWS}
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PLATFORMS": "cpu"}
OTHERS = (
    "train_256",
    "forward_1024_b1",
    "sample_b1",
    "self_attention",
    "cross_attention",
    "transformer_1",
    "residual_0",
)
# Reads its task as a side does. A row called for makes a line; "depthwise" ends the process.
SIDE = f"""
import json, os, sys, time
task = json.load(sys.stdin)
print("a library says something")
for row in task["rows"]:
    if row["name"] == "depthwise":
        print("out of memory", file=sys.stderr)
        os._exit(9)
    if row["name"] == "residual_2":
        time.sleep(60)
    print({MARK!r} + json.dumps({{"row": row["name"], "framework": "jax", "ms": 1.0}}))
    print({MARK!r} + json.dumps({{"finished": row["name"]}}), flush=True)
"""


def line(row, framework, ms=None, **more):
    timed = {} if ms is None else {"ms": ms}
    labels = {"card": "NVIDIA H200", "commit": "1cc578d", "run": "second", "versions": {framework: "1.0"}}
    return {**labels, "row": row, "framework": framework, **timed, **more}


def test_rows_that_are_not_known_are_refused_with_those_that_are(capsys):
    assert [row.name for row in chosen("sd35_b2, train_256")] == ["train_256", "sd35_b2"]
    with pytest.raises(SystemExit):
        gpu.arguments(["--tiny", "--rows=train_512"])
    assert "unknown rows train_512; the rows are train_256, forward_1024_b16" in capsys.readouterr().err


def test_what_compiles_long_has_a_process_of_its_own_and_the_operations_share_one():
    groups = [[row.name for row in job] for job in jobs(ROWS)]
    assert groups[0] == ["train_256"] and groups[1] == ["forward_1024_b16"]
    assert groups[-1][0] == "self_attention" and sum(map(len, groups)) == len(ROWS)


def test_the_valuable_rows_come_first_and_a_later_one_may_still_fit():
    operations = [row for row in ROWS if row.kind == "operation"]
    assert that_fit(operations, "jax", START + 8 + 8 + 7) == operations[:2]
    assert that_fit([BY_NAME["train_256"]], "torch", 200) == []
    assert that_fit([BY_NAME["sd35_b1"]], "torch", 200) == [BY_NAME["sd35_b1"]]
    assert that_fit(ROWS, "jax", math.inf) == list(ROWS)


def test_a_process_that_dies_costs_one_row_and_one_that_hangs_ends_with_the_time():
    rows = [BY_NAME[name] for name in ("residual_0", "depthwise", "residual_1", "residual_2", "transformer_0")]
    lines = []
    gpu.measure([sys.executable, "-S", "-c", SIDE], "jax", rows, True, time.monotonic() + 5, lines.append)
    assert [found["row"] for found in lines] == [row.name for row in rows]
    assert lines[0]["ms"] == lines[2]["ms"] == 1.0
    assert lines[1]["error"] == "the process ended with 9: out of memory"
    assert lines[3]["error"] == lines[4]["skipped"] == "the time was up"


def test_the_summary_compares_the_fastest_forms_of_the_last_run(tmp_path):
    lines = [
        line("train_256", "jax", 1.0, run="first"),
        line("train_256", "jax", 85.0, share_of_matmul=0.27, compile_cold_s=180.0, compile_warm_s=4.0, peak_gb=24.5),
        line(
            "train_256", "torch", 108.0, share_of_matmul=0.22, compile_cold_s=245.0, compile_warm_s=20.0, peak_gb=18.6
        ),
        line("forward_1024_b1", "jax", 10.0),
        line("forward_1024_b1", "torch", 19.3),
        line("forward_1024_b1", "torch", 7.5, form="CUDA graph"),
        line("sd35_b1", "jax", 73.9),
        line("sd35_b1", "torch", error="OutOfMemoryError: 17 GB |\nasked"),
        line("sd35_b2", "torch", skipped="3 s left were too few"),
    ]
    file = tmp_path / "gpu-h200.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + '\n{"row": "cut o')
    text = table(read(file))
    assert text.startswith("NVIDIA H200, commit 1cc578d, run of second, torch 1.0, jax 1.0\n\n| work | ours |")
    rows = text.splitlines()[4:]
    assert rows == [
        "| UNet, training step, 256 px, batch 64 | 85 ms | 108 ms | **1.27** | 27%, 22% | 180 s, 4 s; 245 s, 20 s | "
        "24.5 GB, 18.6 GB |",
        "| UNet, forward, 1024 px, batch 1 | 10 ms | 7.5 ms, CUDA graph (19.3 ms) | **0.75** |  |  |  |",
        "| SD 3.5 Large, forward, 1024 px, batch 1 | 73.9 ms | failed: OutOfMemoryError: 17 GB / asked |  |  |  |  |",
        "| SD 3.5 Large, forward, 1024 px, batch 2 |  | 3 s left were too few |  |  |  |  |",
    ]


@pytest.mark.parametrize(
    ("pythons", "rows"),
    [
        ({"--torch": "none"}, ("sd35_b1", "depthwise")),
        pytest.param({"--torch": "none"}, OTHERS, marks=pytest.mark.slow),
        pytest.param({"--torch": sys.executable}, ("sd35_b1", "cross_attention"), marks=pytest.mark.oracle),
    ],
)
def test_rows_are_measured_on_a_cpu_and_stored_as_they_are_made(pythons, rows, tmp_path):
    if pythons["--torch"] != "none":
        pytest.importorskip("diffusers")
    options = [f"{name}={value}" for name, value in pythons.items()]
    file = tmp_path / "tiny.jsonl"
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", f"--rows={','.join(rows)}", f"--out={file}", *options]
    done = subprocess.run(command, env={**os.environ, **QUICK}, cwd=gpu.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = read(file)
    frameworks = ("jax",) if pythons["--torch"] == "none" else ("jax", "torch")
    assert {(found["row"], found["framework"]) for found in lines} == {(r, f) for r in rows for f in frameworks}
    for found in lines:
        assert found["ms"] > 0 and found["latency_ms"] > 0 and "tiny" in found["card"]
        assert found["compile_cold_s"] >= 0 and found["compile_warm_s"] >= 0
        assert found["versions"][found["framework"]]
        assert ("share_of_matmul" in found) == (BY_NAME[found["row"]].kind != "operation")
    assert f"| {BY_NAME[rows[0]].title} |" in done.stdout


def test_the_kernels_that_are_tuned_are_counted_once_a_shape():
    product = "stablehlo.dot_general {}, {}, contracting_dims = [1] x [0] : (tensor<2x{n}xf32>, tensor<{n}x4xf32>)"
    text = "\n".join(
        [
            f"%1 = {product.format('%a', '%b', n=3)}",
            f"%2:2 = {product.format('%1#0', '%b', n=3)}",
            f"%3 = {product.format('%1', '%b', n=5)}",
            "%4 = stablehlo.constant dense<1.0> : tensor<f32>",
            "%5 = stablehlo.add %2, %3 : tensor<2x4xf32>",
        ]
    )
    found = counts(text)
    assert (found["operations"], found["products"], found["distinct_products"], found["convolutions"]) == (4, 3, 2, 0)
