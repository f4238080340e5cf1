"""The image is the README's commands: they are run here in an empty directory. The image itself is not built."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
RUN_LINES = re.findall(r"^RUN (.*)$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)


def test_every_command_of_the_image_stands_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for line in RUN_LINES:
        assert line.replace('".[${EXTRAS}]"', "'.[tpu]'") in readme


@pytest.mark.slow
def test_the_commands_of_the_image_install_a_working_program(tmp_path):
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "notebooks/", "benchmarks/")):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    environment = {**os.environ, "EXTRAS": "tpu"}
    for line in RUN_LINES:
        ended = subprocess.run(
            ["sh", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, f"{line}\n{ended.stderr[-2000:]}"
    config = subprocess.run(
        [".venv/bin/snapgen", "config", "--config=configs/pretrain/t2i_1024.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert '"recipe": "flow_matching"' in config.stdout and '"kind": "stored_encodings"' in config.stdout
