"""`snapgen bench`: what it measures, what it counts, and what it refuses."""

import json

import numpy as np
import pytest
from PIL import Image

from snapgen_jax.cli import main
from snapgen_jax.export.bench import Asked, bench, macs, table
from snapgen_jax.export.bench_picture import draw
from snapgen_jax.export.flatbuffer import Operator, Tensor


def operator(name: str, out: tuple[int, ...], *inputs: tuple[int, ...]) -> Operator:
    return Operator(
        name,
        tuple(Tensor("x", shape, "float32", False, True) for shape in inputs),
        (Tensor("y", out, "float32", False, True),),
    )


@pytest.mark.parametrize(
    ("node", "count"),
    [
        (operator("CONV_2D", (1, 4, 4, 8), (1, 4, 4, 3), (8, 3, 3, 3), (8,)), 4 * 4 * 8 * 27),
        (operator("DEPTHWISE_CONV_2D", (1, 4, 4, 8), (1, 4, 4, 8), (1, 3, 3, 8), (8,)), 4 * 4 * 8 * 9),
        (operator("FULLY_CONNECTED", (5, 7), (5, 3), (7, 3)), 5 * 7 * 3),
        (operator("BATCH_MATMUL", (2, 5, 7), (2, 5, 3), (2, 3, 7)), 2 * 5 * 7 * 3),
        (operator("TRANSPOSE_CONV", (1, 8, 8, 2), (4,), (2, 3, 3, 6), (1, 4, 4, 6)), 4 * 4 * 6 * 9 * 2),
        (operator("ADD", (5, 7), (5, 7), (5, 7)), 0),
        (operator("SOFTMAX", (5, 7), (5, 7)), 0),
    ],
)
def test_multiplications_are_counted_by_shapes(node, count):
    assert macs(node) == count


@pytest.fixture(scope="module")
def measured(toy) -> dict:
    return bench(toy.folder, Asked(threads=(1,), runs=4, rounds=2, precisions=["f32", "f16"]))


def test_each_unit_and_precision_is_measured_in_every_round(measured, toy):
    rows = {(row["unit"], row["precision"]): row for row in measured["rows"]}
    assert rows.keys() == {(unit, precision) for unit in ("net", "text") for precision in ("f32", "f16")}
    for row in rows.values():
        assert row["calls"] == 8 and 0 < row["ms_least"] <= row["ms_quartiles"][0] <= row["ms"] < 1000
        assert 10e6 < row["process_bytes"] < row["peak_bytes"] < 1e9 and 0 < row["load_ms"] < 10_000
    by_file = {(file["unit"], file["precision"]): file for file in measured["files"]}
    shares = by_file["net", "f32"]["operators"]
    assert sum(row["macs"] for row in shares.values()) == pytest.approx(1)
    assert sum(row["written"] for row in shares.values()) == pytest.approx(1)
    assert by_file["text", "f32"]["macs"] == 0 and "GATHER_ND" in by_file["text", "f32"]["off_gpu"]
    assert "GATHER_ND" in by_file["text", "f32"]["off_cpu_delegate"]


def test_the_table_and_the_picture_have_a_line_for_each(measured):
    text = table(measured)
    assert [line.split()[:3] for line in text.splitlines()[1:5]] == [
        [unit, precision, "cpu"] for unit in ("net", "text") for precision in ("f32", "f16")
    ]
    assert "counted in the graph and not timed" in text and "f32: outside XNNPACK: " in text
    picture = draw(measured)
    colours = {colour for _, colour in picture.getcolors(1 << 20) or ()}
    assert {(0x4C, 0x72, 0xB0), (0x55, 0xA8, 0x68)} <= colours
    many = draw({**measured, "rows": measured["rows"] * 3})
    assert many.height > picture.height
    broken = {**measured, "rows": [{**measured["rows"][0], "error": "no driver"}]}
    assert "no driver" in table(broken) and draw(broken).width == picture.width


def test_without_a_driver_the_gpu_is_a_row_that_says_so(toy, monkeypatch):
    monkeypatch.setattr("snapgen_jax.export.bench.drivers", lambda **_: ())
    found = bench(toy.folder, Asked(accelerators=("gpu",), threads=(1,), runs=1, rounds=1, units=["net"]))
    assert all("no Vulkan driver was found" in row["error"] for row in found["rows"])


def test_the_command_writes_figures_and_picture(toy, tmp_path, capsys):
    figures, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    line = [
        "bench",
        f"--bundle={toy.folder}",
        "--units=net",
        "--precisions=f16",
        "--threads=1",
        "--runs=2",
        "--rounds=1",
    ]
    assert main([*line, f"--json={figures}", f"--picture={picture}"]) == 0
    assert "net   f16        cpu" in capsys.readouterr().out
    assert json.loads(figures.read_text())["rows"][0]["calls"] == 2
    assert np.asarray(Image.open(picture)).std() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precisions=f8"], "no precision 'f8' to measure; there is f32"),
        (["--units=decoder"], "no unit 'decoder' to measure; there is net, text"),
        (["--accelerators=npu"], "no accelerator 'npu' to measure; there is cpu, gpu"),
        (["--threads=two"], "give whole numbers with commas"),
        (["--threads=0"], "--threads is [0]; give 1 or more each"),
        (["--rounds=0"], "--rounds is 0; give 1 or more"),
        (["--picture=bench.svg"], "the picture is a .png"),
        (["--json=/nowhere/bench.json"], "a folder that is not there"),
    ],
)
def test_what_cannot_be_measured_is_refused(toy, options, message, capsys):
    assert main(["bench", f"--bundle={toy.folder}", *options]) == 78
    assert message in capsys.readouterr().err


def test_a_folder_that_is_no_bundle_is_refused(tmp_path, capsys):
    assert main(["bench", f"--bundle={tmp_path}"]) == 78
    assert "not an export bundle" in capsys.readouterr().err
