"""How far eight bits take a velocity, and what the stored plans say that they save."""

import json

import pytest

from benchmarks import eight_bits, plan_eight_bits
from snapgen_jax.networks.counting import parameters
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.parallel.chips import chip_of
from snapgen_jax.recipes.flow_matching import VALIDATION_TIMES

TINY = MMDiTConfig.preset("smoke", depth=1, dual=0)
STORED = plan_eight_bits.RESULTS.parent / "eight_bits-cpu2.jsonl"


def test_errors_are_measured_by_time_and_kept(monkeypatch, capsys):
    monkeypatch.setattr(eight_bits, "DRAWN", {"tiny": TINY})
    eight_bits.main([])
    line = json.loads(capsys.readouterr().out)
    assert (line["parameters"], line["weights"]) == (parameters(TINY), "stand-ins") and line["machine"]
    assert list(line["times"]) == [*(f"t={t:.2f}" for t in VALIDATION_TIMES), "all"]
    for row in line["times"].values():
        assert 2**-9 / 3 < row["bfloat16, float32"] < row["int8, float32"] < row["fp8, float32"] < 0.15
        assert row["int8, float32"] < row["int8"] + row["bfloat16, float32"] and row["int8"] < row["fp8"]
    assert line["times"]["all"]["int8"] == pytest.approx(0.01, abs=0.01)


def test_the_stored_errors_of_int8_are_about_two_percent():
    """Below two where there are twelve blocks or fewer; of thirty-eight, as in Stable Diffusion 3.5, a little above,
    beside bfloat16's own error of nearly as much."""
    lines = [json.loads(line) for line in STORED.read_text().splitlines()]
    drawn = {line["network"]: line["parameters"] for line in lines if line["weights"] == "stand-ins"}
    assert drawn == {name: parameters(config) for name, config in eight_bits.DRAWN.items()}
    assert all(config.width >= 512 for config in eight_bits.DRAWN.values())
    assert any("updates" in line["weights"] for line in lines)
    for line in lines:
        rows = line["times"]["all"]
        assert rows["int8"] < (0.025 if line["network"] == "MMDiT of 38 blocks" else 0.02)
        assert rows["int8, float32"] < 1.6 * rows["bfloat16, float32"] and line["machine"] and line["commit"]


def test_the_stored_blocks_multiply_tokens_in_int8_and_the_rest_as_before():
    plans = {(p["bucket"], p["precision"]): p for p in json.loads(plan_eight_bits.BLOCKS.read_text())}
    assert plans.keys() == {(b, p) for b in plan_eight_bits.SIZES for p in plan_eight_bits.PRECISIONS}
    kernel = 2432**2
    for bucket, side in plan_eight_bits.SIZES.items():
        before, after = (plans[bucket, precision] for precision in plan_eight_bits.PRECISIONS)
        tokens, text = side**2 // 4, 333
        # Twelve kernels for each image token and block; as many for a text token of the first, two of the last.
        assert after["int8_flops"] == 2 * kernel * (24 * tokens + 14 * text) and before["int8_flops"] == 0
        assert after["flops"] == pytest.approx(before["flops"], rel=0.01)
        chip = chip_of(after["chip"])
        in_bfloat16 = after["flops"] - after["int8_flops"]
        expected = in_bfloat16 / chip.flops + after["int8_flops"] / chip.int8_flops
        assert after["compute_seconds"] == pytest.approx(expected) and after["memory_bytes"] < before["memory_bytes"]


def test_the_stored_ratios_follow_from_the_stored_plans():
    stored = {one["bucket"]: one for one in json.loads(plan_eight_bits.RATIOS.read_text())}
    assert stored["512x512"] == plan_eight_bits.ratio("512x512")
    assert stored["512x512"]["step_ratio"] > 1.5 and stored["1024x1024"]["step_ratio"] > 1.35
