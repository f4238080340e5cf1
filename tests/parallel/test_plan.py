"""Plans: a step compiled for chips that are not here, read and judged. Compiling needs libtpu (Linux, x86-64)."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib

import jax
import numpy as np
import pytest

from snapgen_jax.cli import main
from snapgen_jax.config import load_experiment
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.parallel.plan import Plan, _needed, topology, tree_bytes
from snapgen_jax.planning import plan
from snapgen_jax.training import loop, step
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.keys import key

CONFIG = "configs/pretrain/t2i_256.py:runlocal"
LIGHT = "configs/shapes/teacher.py:runlocal"  # compiles in half the time
RECORD = pathlib.Path(__file__).with_name("plan_record.json")
STORED = pathlib.Path(__file__).parents[2] / "benchmarks/results/plan"
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")


@pytest.fixture(scope="module")
def planned() -> Plan:
    """The plan that CI watches: a tiny network on four chips, parameters split over two of them."""
    (found,) = plan(load_experiment(CONFIG, ["batch_size=16", "mesh.fsdp=2"]), "v5e:2x2")
    return found


@needs_libtpu
def test_a_plan_is_the_step_that_would_run(planned):
    assert planned.fits
    assert planned.chips == 4
    assert planned.mesh == {"data": 2, "fsdp": 2, "tensor": 1}
    assert planned.roofline.bound == "links"
    assert set(planned.collectives) >= {"all-gather", "all-reduce"}
    # Parameters, average and the two moments in float32, and a few counters.
    made = load_experiment(CONFIG).build("tpu")
    assert planned.state_bytes == tree_bytes(jax.eval_shape(made.init, key(0, 0, "init")))
    assert planned.peak_bytes > planned.argument_bytes + planned.temporary_bytes
    assert planned.to_json()["chip_hours"] == pytest.approx(4 * 20 * planned.roofline.seconds / 3600)


@needs_libtpu
def test_the_step_costs_no_more_than_it_did(planned):
    """Bytes and operations grow by at most 3% unannounced. A new jax or libtpu is recorded by
    `UPDATE_PLAN_RECORD=1 make test PYTEST_ARGS=tests/parallel/test_plan.py`, in a commit of its own."""
    name = f"jax {jax.__version__}, libtpu {importlib.metadata.version('libtpu')}"
    watched = ("flops", "memory_bytes", "bytes_accessed", "temporary_bytes", "argument_bytes")
    now = {what: getattr(planned, what) for what in watched}
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if os.environ.get("UPDATE_PLAN_RECORD"):
        RECORD.write_text(json.dumps({**record, name: now}, indent=2, sort_keys=True) + "\n")
        return
    assert name in record, f"no record for {name}: make one, see above"
    for what, value in now.items():
        assert value <= 1.03 * record[name][what], f"{what} grew from {record[name][what]:,.0f} to {value:,.0f}"


@needs_libtpu
def test_a_step_that_does_not_fit_says_by_how_much_and_what_would_help(capsys):
    overrides = ["--config.batch_size=8192", "--config.inputs.image_sizes=((512,512),)"]
    assert main(["plan", f"--config={CONFIG}", "--topology=v5e:2x2", *overrides]) == 0
    said = capsys.readouterr().out
    assert "DOES NOT FIT" in said
    assert "of 17.18 GB" in said
    assert "microbatches=2" in said
    assert "mesh.fsdp=4" in said
    assert "at the peaks" not in said


@pytest.mark.parametrize(
    ("refusal", "gibibytes"),
    [
        ("the total memory required for HLO temporaries (2.25T) exceeds available HBM (15.75G).", 2304),
        ("Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm. Exceeded hbm capacity by 4.25G.", 20),
        ("no number at all", 0),
    ],
)
def test_what_a_refused_step_would_need_is_read_off_the_refusal(refusal, gibibytes):
    assert _needed(refusal) == gibibytes * 2**30


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--topology=v9:4x4"], "unknown chip 'v9'; known: v4"),
        (["--topology=v5e:2x2", "--config.mesh.fsdp=3"], "does not fit 4 devices"),
        (["--topology=v5e:2x2", "--config.batch_size=10"], "set batch_size to 8 or 12"),
        pytest.param(["--topology=v5e:3x7"], "no topology 'v5e:3x7'", marks=needs_libtpu),
        (["--topology=two*v5e:2x2"], "'two' is no number of slices"),
        (["--topology=2*tpu7x:2x2x1"], "no bandwidth between slices of tpu7x is published; plan one slice"),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused_in_one_line(arguments, says, capsys):
    if "v9" not in arguments[0] and importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu")
    assert main(["plan", f"--config={CONFIG}", *arguments]) == 78
    assert says in capsys.readouterr().err


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "devices", "chips"), [("v5e:4x4", 16, 16), ("v5p:2x2x2", 8, 8), ("tpu7x:2x2x1", 8, 4)]
)
def test_topologies_know_their_chips(name, devices, chips):
    found = topology(name)
    assert (len(found.devices), found.chips) == (devices, chips)


@needs_libtpu
def test_two_slices_make_one_mesh_with_data_between_them():
    found = topology("2*v5e:2x2")
    mesh = make_mesh(MeshConfig(slices=2, fsdp=4), found.devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert [set(row.ravel()) for row in slices] == [{0}, {1}]


@needs_libtpu
def test_over_slices_each_replica_exchanges_its_part_of_every_sum():
    record = json.loads((STORED / "t2i_256-v5e_4x4-b256.json").read_text())[0]
    one = Plan.from_json(record)
    two, four = one.on(topology("2*v5e:4x4")), one.on(topology("4*v5e:16x16"))
    summed = one.collectives["all-reduce"].bytes
    assert (two.chips, two.global_batch, four.chips) == (32, 512, 1024)
    assert two.collectives["all-reduce"].wire_bytes == one.collectives["all-reduce"].wire_bytes
    assert two.collectives["across slices"].wire_bytes == pytest.approx(summed / 16, rel=1e-6)
    assert four.collectives["across slices"].wire_bytes == pytest.approx(1.5 * summed / 256, rel=1e-6)
    assert two.to_json()["network_seconds"] == pytest.approx(summed / 16 / 3.125e9, rel=1e-6)
    assert "over the network" in two.table() and ", network 15.4 ms" in two.table()
    with pytest.raises(ValueError, match="only a plan for one slice tells of other chips"):
        two.on(topology("v5e:4x4"))


@pytest.mark.usefixtures("quick_to_compile")
def test_what_is_planned_is_the_very_program_that_a_run_compiles():
    """From shapes alone and from a run's arrays: the same text, on eight devices."""
    made = load_experiment(CONFIG).build("cpu")
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    abstract, _ = step.lower_abstract_step(made, 0, mesh, "64x64")
    run = loop.Run(made, loop.LoopConfig(mesh=MeshConfig(data=2, fsdp=4)), mesh, None)
    state, _ = run.start(None)
    real = step.lower_step(made, 0, mesh, step.carry(state, mesh), run.load_frozen(), "64x64")
    assert abstract.as_text() == real.as_text()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v9:4x4", "unknown chip 'v9'; known: v4"),
        ("0*v5e:4x4", "no topology '0*v5e:4x4': '0' is no number of slices"),
        ("-2*v5e:4x4", "'-2' is no number of slices"),
        ("2*tpu7x:2x2x1", "no bandwidth between slices of tpu7x is published; plan one slice"),
        pytest.param("v5e:16x", "no topology 'v5e:16x'", marks=needs_libtpu),
    ],
)
def test_a_topology_that_a_plan_cannot_tell_of_is_blamed_and_not_the_file(name, says, capsys):
    stored = STORED / "t2i_256-v5e_4x4-b256.json"
    assert main(["plan", f"--from={stored}", f"--topology={name}"]) == 78
    said = capsys.readouterr().err
    assert says in said
    assert stored.name not in said


@pytest.mark.parametrize("text", ["[]", "{}", "not a plan", '[{"config": "", "overrides": [], "collectives": null}]'])
def test_a_file_without_plans_is_refused_in_one_line(text, tmp_path, capsys):
    file = tmp_path / "plan.json"
    file.write_text(text)
    assert main(["plan", f"--from={file}", "--topology=v5e:4x4"]) == 78
    assert "give a file that `snapgen plan --json` wrote" in capsys.readouterr().err


@needs_libtpu
def test_a_plan_for_one_device_tells_nothing_of_others():
    record = json.loads((STORED / "t2i_256-v5e_4x4-b256.json").read_text())[0]
    alone = dataclasses.replace(Plan.from_json(record), mesh={"data": 1, "fsdp": 1, "tensor": 1})
    with pytest.raises(ValueError, match="only a plan for several devices"):
        alone.on(topology("v5e:4x4"))


def test_an_unknown_topology_is_a_config_error():
    with pytest.raises(ConfigError, match="unknown chip"):
        plan(load_experiment(CONFIG), "gpu:8")


@needs_libtpu
def test_a_plan_tells_of_more_chips_and_of_others(tmp_path, capsys):
    (four,) = plan(load_experiment(LIGHT, ["batch_size=16"]), "v5e:2x2")
    (sixteen,) = plan(load_experiment(LIGHT, ["batch_size=64"]), "v5e:4x4")
    derived = four.on(topology("v5e:4x4"))
    assert (derived.global_batch, derived.mesh) == (sixteen.global_batch, sixteen.mesh)
    derived_json, sixteen_json = derived.to_json(), sixteen.to_json()
    for name in ("flops", "bytes_accessed", "temporary_bytes", "argument_bytes", "link_seconds"):
        assert derived_json[name] == pytest.approx(sixteen_json[name], rel=0.03), name
    file = tmp_path / "plan.json"
    file.write_text(json.dumps([{"config": LIGHT, "overrides": [], **four.to_json()}]))
    assert main(["plan", f"--from={file}", "--topology=v6e:16x16", f"--json={tmp_path / 'other.json'}"]) == 0
    assert "derived" in capsys.readouterr().out
    (other,) = json.loads((tmp_path / "other.json").read_text())
    assert (other["derived_from"], other["chips"], other["global_batch"]) == ("v5e:2x2", 256, 1024)
    assert other["hbm_seconds"] == pytest.approx(four.roofline.times["hbm"] * 819 / 1638)


@pytest.mark.parametrize("file", sorted(STORED.glob("*.json")), ids=lambda file: file.stem)
def test_a_stored_plan_says_what_follows_from_its_fields(file):
    """Its times and rates are those at the peaks that the table of chips has now."""
    for record in json.loads(file.read_text()):
        again = Plan.from_json(record).to_json()
        for name in again.keys() & record.keys():
            assert record[name] == (pytest.approx(again[name]) if isinstance(again[name], float) else again[name]), name


@needs_libtpu
def test_a_part_of_the_step_is_planned_by_itself(tmp_path, capsys):
    """The teacher's share of a distillation: the same work in one part or in four."""
    config, file = "configs/distill/t2i_512_sd35l.py:runlocal", tmp_path / "teacher.json"
    large = ["batch_size=32", "teacher.network.head_dim=64", "teacher.network.depth=4"]
    command = ["plan", f"--config={config}", "--topology=v5e:2x2", "--part=teacher", f"--json={file}"]
    assert main([*command, *(f"--config.{change}" for change in large)]) == 0
    assert "'teacher' alone, not the whole step" in capsys.readouterr().out
    (stored,) = json.loads(file.read_text())
    teacher = Plan.from_json(stored)
    (parted,) = plan(load_experiment(config, [*large, "microbatches=4"]), "v5e:2x2", "teacher")
    (drawn,) = plan(load_experiment(config, large), "v5e:2x2", "draw")
    assert (teacher.part, drawn.part) == ("teacher", "draw")
    assert drawn.flops < 0.2 * teacher.flops
    assert parted.flops == pytest.approx(teacher.flops, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([f"--config={CONFIG}", "--part=teacher"], "no part 'teacher' of this recipe's step; its parts are: draw"),
        (["--from=plan.json", "--part=draw"], "--from compiles nothing"),
    ],
)
def test_a_part_that_cannot_be_planned_is_refused_in_one_line(arguments, says, capsys):
    if "--part=teacher" in arguments and importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu")
    assert main(["plan", "--topology=v5e:2x2", *arguments]) == 78
    assert says in capsys.readouterr().err


@needs_libtpu
def test_a_plan_with_split_parameters_tells_nothing_of_others(planned, tmp_path, capsys):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps([{"config": CONFIG, "overrides": [], **planned.to_json()}]))
    assert main(["plan", f"--from={file}", "--topology=v5e:4x4"]) == 78
    assert "mesh of replicas" in capsys.readouterr().err
    assert main(["plan", f"--from={tmp_path / 'none.json'}", "--topology=v5e:4x4"]) == 78
    assert "snapgen plan --json" in capsys.readouterr().err
