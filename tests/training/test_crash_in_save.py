"""A process killed in the middle of a save leaves the newest whole checkpoint, and nothing torn is ever offered."""

import json
import os
import subprocess
import sys

from benchmarks import crash_in_save


def test_killed_at_twenty_moments_of_a_save_the_newest_whole_checkpoint_restores(tmp_path):
    # In a process of its own: it forks, which a process with JAX's threads must not.
    code = (
        "import json, pathlib, sys\n"
        "from benchmarks.crash_in_save import kills, rehearse\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "print(json.dumps([str(w) for w in kills(folder, 20, rehearse(folder))]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    workdirs = [tmp_path / name for name in json.loads(done.stdout)]
    assert len(workdirs) == 20
    torn = [workdir for workdir in workdirs if crash_in_save.is_torn(workdir)]
    assert len(torn) >= 5, "most of these moments are within a save"
    steps = [crash_in_save.restore(workdir)[0] for workdir in workdirs]  # compares every number with what was saved
    assert set(steps) <= {1, 2} and 1 in steps
    assert all(crash_in_save.restore(workdir)[0] == 1 for workdir in torn)
