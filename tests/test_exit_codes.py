"""A path that the user gave and that cannot be used is 78, to be corrected; what a file system fails at is 69, not."""

import errno
import gc
import os
import signal
import time

import pytest

from snapgen_jax.cli import COMMANDS, main
from snapgen_jax.cli_exit import run_to_exit_code
from snapgen_jax.training.exits import ExitCode

QUICKSTART = "--config=configs/shapes/quickstart.py:runlocal"


@pytest.fixture
def file(tmp_path):
    (tmp_path / "file").write_text("text")
    return tmp_path / "file"


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config=FILE/no.py", "--workdir=W"],
        ["train", QUICKSTART, "--workdir=FILE/run"],
        ["train", QUICKSTART, "--workdir=W", "--config.data.source=folder", "--config.data.path=FILE/photographs"],
        ["train", QUICKSTART, "--workdir=W", "--config.data.tokenizer=FILE/tokenizer.json"],
        ["sample", "--bundle=W", "--prompt=a"],
        ["sample", "--workdir=FILE", "--prompt=a"],
        ["encode", "--weights=W", "W/image.png"],
        ["decode", "--weights=W", "W/latents"],
        ["plan", QUICKSTART, "--topology=v5e:1x1", "--json=FILE/plan.json"],
        ["status", "--workdir=FILE/run"],
    ],
    ids=lambda arguments: f"{arguments[0]} {arguments[-1]}",
)
def test_a_mistyped_path_is_one_line_and_78(arguments, file, monkeypatch, capsys):
    if arguments[0] == "plan":  # its figures are not asked for here
        monkeypatch.setattr("snapgen_jax.planning.plan", lambda *_: [])
    replaced = [a.replace("FILE", str(file)).replace("=W", f"={file.parent / 'none'}") for a in arguments]
    assert main([a.replace("W/", f"{file.parent}/none/") for a in replaced]) == ExitCode.BAD_CONFIG
    said = capsys.readouterr().err
    assert "Traceback" not in said and str(file.parent) in said
    assert not (file.parent / "none").exists() and file.read_text() == "text"


@pytest.mark.parametrize(
    ("number", "name", "code"),
    [
        (errno.ENOENT, "W/config.json", ExitCode.BAD_CONFIG),
        (errno.EACCES, "W", ExitCode.BAD_CONFIG),
        (errno.ENOENT, "W/run/checkpoints/7", ExitCode.INFRASTRUCTURE),
        (errno.EIO, "W/config.json", ExitCode.INFRASTRUCTURE),
        (errno.ENOSPC, "W/checkpoints", ExitCode.INFRASTRUCTURE),
        (errno.ESTALE, "W", ExitCode.INFRASTRUCTURE),
        (errno.ENOENT, "/elsewhere/library.so", ExitCode.INFRASTRUCTURE),
        (errno.ECONNREFUSED, None, ExitCode.INFRASTRUCTURE),
    ],
)
def test_only_what_is_wrong_with_a_given_path_is_78(number, name, code, tmp_path, monkeypatch, capsys):
    def fail(options):
        raise OSError(number, os.strerror(number), name and name.replace("W", str(tmp_path)))

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    workdir = tmp_path / "run" if name and "run" in name else tmp_path
    monkeypatch.setitem(COMMANDS, "status", fail)
    assert main(["status", f"--workdir={workdir}"]) == code
    assert ("Traceback" in capsys.readouterr().err) == (code == ExitCode.INFRASTRUCTURE)


def test_a_ctrl_c_that_lands_in_a_garbage_collectors_callback_ends_the_command(capsys):
    interrupts = iter([KeyboardInterrupt])

    def callback(phase, info):
        for interrupt in interrupts:
            raise interrupt

    def work():
        gc.callbacks.append(callback)
        gc.collect()
        for _ in range(100):
            time.sleep(0.01)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins without
    try:
        assert run_to_exit_code("export", work) == 130
    finally:
        gc.callbacks.remove(callback)
        signal.signal(signal.SIGINT, before)
    assert "snapgen export: interrupted" in capsys.readouterr().err
