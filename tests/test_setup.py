"""The outer frame: what setup.py asks for, what the lock holds, and what `make` does with them."""

import ast
import importlib.metadata
import os
import pathlib
import re
import runpy
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = re.findall(r"^([a-z-]+):", MAKEFILE, flags=re.MULTILINE)

MACHINES = [
    {"sys_platform": system, "platform_machine": chip, "python_version": python, "python_full_version": python + ".0"}
    for system, chip in [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")]
    for python in ["3.11", "3.12", "3.13"]
]

MAKE = shutil.which("make") or ""
needs_make = pytest.mark.skipif(not MAKE, reason="needs make")
needs_timeout = pytest.mark.skipif(not shutil.which("timeout"), reason="needs GNU timeout, as .ci/run does")


@pytest.fixture(scope="module")
def setup_arguments() -> dict:
    """The arguments that setup.py gives to `setuptools.setup`."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: found.update(arguments))
        patch.chdir(ROOT)
        runpy.run_path("setup.py")
    return found


def _lock() -> list[Requirement]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith((" ", "#"))]


def _applies(requirement: Requirement, machine: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({**machine, "extra": ""})


def _unlocked(requirements: list[str], lock: list[Requirement], machine: dict[str, str]) -> list[str]:
    """The requirements that the lock does not fulfil with exactly one version on a machine."""
    versions: dict[str, list[str]] = {}
    for pin in lock:
        if _applies(pin, machine):
            versions.setdefault(canonicalize_name(pin.name), []).append(str(pin.specifier).removeprefix("=="))
    missing = []
    for text in requirements:
        wanted = Requirement(text)
        held = versions.get(canonicalize_name(wanted.name), [])
        fulfilled = len(held) == 1 and wanted.specifier.contains(held[0], prereleases=True)
        if _applies(wanted, machine) and not fulfilled:
            missing.append(f"{text}: the lock has {held or 'nothing'}")
    return missing


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: "-".join(list(m.values())[:3]))
def test_the_lock_fulfils_every_requirement_once(setup_arguments, machine):
    requirements = setup_arguments["install_requires"] + setup_arguments["extras_require"]["dev"]
    assert not _unlocked(requirements, _lock(), machine), "run `make lock`"


def test_a_requirement_that_the_lock_lacks_is_found():
    lock = [Requirement("numpy==2.4.6"), Requirement("jax==0.10.2 ; python_version < '3.12'")]
    machine = MACHINES[0]
    assert not _unlocked(["numpy>=2", "jax", "torch; sys_platform == 'win32'"], lock, machine)
    assert len(_unlocked(["numpy>=2.5", "flax"], lock, machine)) == 2
    assert _unlocked(["jax"], lock, MACHINES[1])


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_holds_libtpu_where_there_are_tpus_and_one_tensorflow_everywhere(python):
    for machine in (m for m in MACHINES if m["python_version"] == python):
        names = {canonicalize_name(pin.name) for pin in _lock() if _applies(pin, machine)}
        x86_linux = machine["sys_platform"] == "linux" and machine["platform_machine"] == "x86_64"
        assert ("libtpu" in names) == x86_linux
        assert names & {"tensorflow", "tensorflow-cpu"} == ({"tensorflow-cpu"} if x86_linux else {"tensorflow"})


def _imported_libraries() -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / "snapgen_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in names:
                top = name.partition(".")[0]
                # The files of a bundle import each other by bare name, noise.py of another folder among them.
                beside = path.parent.name == "export" and (top == "noise" or (path.parent / f"{top}.py").exists())
                if top not in sys.stdlib_module_names and top != "snapgen_jax" and not beside:
                    yield top, f"{path.relative_to(ROOT)}:{node.lineno}"


def test_every_library_that_the_package_imports_is_a_direct_requirement(setup_arguments):
    """Not one that happens to come along with another."""
    extras = setup_arguments["extras_require"]
    used = ("export", "prepare", "hub")
    requirements = [*setup_arguments["install_requires"], *(text for name in used for text in extras[name])]
    direct = {canonicalize_name(Requirement(text).name) for text in requirements}
    owners = importlib.metadata.packages_distributions()
    for library, where in _imported_libraries():
        names = {canonicalize_name(name) for name in owners.get(library, [library])}
        assert names & direct, f"{where} imports {library}, which setup.py does not list"


def test_the_extras_that_the_readme_promises_exist(setup_arguments):
    assert set(setup_arguments["extras_require"]) == {
        "tpu",
        "cuda",
        "export",
        "export-litert",
        "hub",
        "mirrors",
        "oracle",
        "prepare",
        "dev",
    }
    assert setup_arguments["python_requires"] == ">=3.11,<3.14"


def _make(folder: pathlib.Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    outer = ("MAKEFLAGS", "MAKELEVEL", "PYTHON", "WORKDIR", "PYTEST_ARGS", "JOBS")  # of the `make test` that runs this
    environment = {**{k: v for k, v in os.environ.items() if k not in outer}, **variables}
    return subprocess.run([MAKE, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


@needs_make
def test_make_help_has_a_line_for_every_target():
    lines = _make(ROOT, "help").stdout.splitlines()
    assert {line.split()[1] for line in lines} == set(TARGETS)
    assert all(len(line.split()) > 3 for line in lines)
    assert {"quickstart", "test"} <= set(TARGETS)


@needs_make
@pytest.mark.parametrize("target", TARGETS)
def test_every_target_can_be_planned(target):
    done = _make(ROOT, "-n", target)
    assert done.returncode == 0, done.stderr


FAKE_UV = """#!/bin/sh
echo "uv $*" >> {log}
case "$1" in
    venv)
        for folder; do :; done
        mkdir -p $folder/bin $folder/lib/python3.1/site-packages
        for name in python snapgen ruff pyright jupyter-execute; do ln -sf {tool} $folder/bin/$name; done ;;
    --version) exit {status} ;;
esac
"""
FAKE_TOOL = """#!/bin/sh
echo "$(basename "$0") $*" >> {log}
case "$*" in
    *"pip install"*" uv") mkdir -p .uv/bin; cp uv-from-pip .uv/bin/uv ;;
    *sysconfig*) echo "import site; site.addsitedir('...')" ;;
esac
"""


class Clone:
    """A fresh clone in which uv, Python and snapgen only write down that they were called."""

    def __init__(self, folder: pathlib.Path, has_uv: bool):
        self.folder, self.log, self.path = folder, folder / "log", folder / "path"
        self.path.mkdir()
        for name in ("Makefile", "requirements.lock", "setup.py"):
            shutil.copy(ROOT / name, folder)
        (folder / "tests").mkdir()
        (folder / "tests" / "test_live.py").write_text("@pytest.mark.oracle")
        (folder / "tests" / "test_other.py").write_text("@pytest.mark.slow")
        # And no Python, no pip, no uv.
        for name in ("sh", "mkdir", "ln", "cp", "mv", "rm", "touch", "basename", "env", "grep"):
            (self.path / name).symlink_to(shutil.which(name))
        tool = self._script(self.path / "python3", FAKE_TOOL)
        self._script(self.path / "uv" if has_uv else folder / "uv-from-pip", FAKE_UV, tool=tool, status=0)

    def _script(self, path: pathlib.Path, text: str, **values) -> pathlib.Path:
        path.write_text(text.format(log=self.log, **values))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def make(self, *arguments: str) -> list[str]:
        """Runs make and returns what it called, but for questions about versions."""
        self.log.write_text("")
        done = _make(self.folder, *arguments, PATH=str(self.path))
        assert done.returncode == 0, done.stderr
        lines = [" ".join(line.split()) for line in self.log.read_text().splitlines()]
        return [line for line in lines if "--version" not in line]


VENV_CALL = "uv venv --python >=3.11,<3.14 .venv"
USED = "uv pip install --python .venv/bin/python --constraint requirements.lock --editable .[export]"
ALL = "uv pip install --python .venv/bin/python --no-deps --requirements requirements.lock --editable ."
QUICKSTART = "snapgen quickstart --workdir quickstart"
TEST = "python -m pytest --numprocesses=2 --dist=loadfile"


@needs_make
def test_the_quickstart_installs_what_it_uses_and_the_tests_add_the_rest_once(tmp_path):
    clone = Clone(tmp_path, has_uv=True)
    assert clone.make("quickstart") == [VENV_CALL, USED, QUICKSTART]
    assert clone.make("quickstart") == [QUICKSTART]
    assert clone.make("test") == [ALL, TEST]
    assert clone.make("quickstart", "test") == [QUICKSTART, TEST]


@needs_make
def test_after_the_tests_the_quickstart_has_what_it_uses(tmp_path):
    clone = Clone(tmp_path, has_uv=True)
    assert clone.make("test") == [VENV_CALL, ALL, TEST]
    assert clone.make("quickstart", "test") == [QUICKSTART, TEST]


@needs_make
@pytest.mark.parametrize("target", ["lint", "format", "types", "notebooks", "dev"])
def test_what_the_quickstart_does_not_use_is_there_for_those_who_do(tmp_path, target):
    clone = Clone(tmp_path, has_uv=True)
    clone.make("install")
    assert clone.make(target)[0] == ALL


@needs_make
def test_a_changed_lock_is_installed_into_the_environment_there_is(tmp_path):
    clone = Clone(tmp_path, has_uv=True)
    clone.make("install", "dev")
    ready = (tmp_path / ".venv" / ".dev").stat().st_mtime
    os.utime(tmp_path / "requirements.lock", (ready + 10, ready + 10))
    assert clone.make("install") == [USED]
    assert clone.make("dev") == [ALL]


@needs_make
def test_the_oracle_environment_adds_to_the_one_there_is(tmp_path):
    clone = Clone(tmp_path, has_uv=True)
    calls = clone.make("oracle")
    assert calls[:3] == [VENV_CALL, ALL, "uv venv --seed --python .venv/bin/python .venv-oracle"]
    assert calls[4] == "python -m pip install --constraint requirements.lock --editable .[oracle]"
    link = tmp_path / ".venv-oracle" / "lib" / "python3.1" / "site-packages" / "venv.pth"
    assert "site.addsitedir" in link.read_text()
    assert calls[5:] == ["python -m pytest -m oracle --numprocesses=2 tests/test_live.py"]
    assert clone.make("oracle", "PYTEST_ARGS=-k x") == ["python -m pytest -m oracle --numprocesses=2 -k x"]


@needs_make
def test_without_uv_pip_fetches_it_into_a_folder_of_its_own(tmp_path):
    clone = Clone(tmp_path, has_uv=False)
    calls = clone.make("install")
    assert calls[0] == "python3 -m pip install --quiet --upgrade --target .uv uv"
    assert calls[1].startswith("uv venv")
    assert clone.make("install") == []


@needs_make
def test_without_uv_and_without_pip_it_says_what_to_install(tmp_path):
    clone = Clone(tmp_path, has_uv=False)
    (clone.path / "python3").unlink()
    done = _make(tmp_path, "test", PATH=str(clone.path))
    assert done.returncode != 0
    assert "Needs uv" in done.stderr
    assert "python3-pip" in done.stderr


FAKE_MAKE = """#!/bin/sh
echo "make $*"
case "$*" in
    {target}) echo "{output}"; exit {status} ;;
esac
"""


def _ci(folder: pathlib.Path, target: str, output: str, status: int) -> subprocess.CompletedProcess:
    """Runs .ci/run with a `make` that says what it was asked for, and fails at one target."""
    for name, text in [("make", FAKE_MAKE.format(target=target, output=output, status=status)), ("uv", "#!/bin/sh\n")]:
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run([ROOT / ".ci" / "run"], env=environment, capture_output=True, text=True, timeout=60)


def _asked(done: subprocess.CompletedProcess) -> list[str]:
    return [line.removeprefix("make ") for line in done.stdout.splitlines() if line.startswith("make ")]


@needs_timeout
def test_ci_runs_lint_types_the_oracle_and_the_tests_last(tmp_path):
    done = _ci(tmp_path, "none", "", 0)
    assert done.returncode == 0
    assert _asked(done) == ["lint", "types", "oracle", "test"]
    assert done.stdout.splitlines()[-1] == "make test"


@needs_timeout
@pytest.mark.parametrize("target", ["lint", "types", "oracle", "test"])
def test_ci_ends_where_something_fails(tmp_path, target):
    done = _ci(tmp_path, target, "broken", 3)
    assert done.returncode != 0
    assert _asked(done)[-1] == target


@needs_timeout
def test_ci_skips_the_oracle_where_its_packages_cannot_be_fetched_and_says_so(tmp_path):
    reason = "ERROR: No matching distribution found for torch==2.13.0"
    done = _ci(tmp_path, ".venv-oracle/.ready", reason, 2)
    assert done.returncode == 0
    assert _asked(done) == ["lint", "types", "test"]
    assert reason in done.stdout and "Skipped: make oracle" in done.stdout


@needs_timeout
def test_ci_fails_where_the_oracle_cannot_be_installed_for_another_reason(tmp_path):
    reason = "ERROR: Cannot install snapgen-jax[oracle] because these package versions have conflicting dependencies."
    done = _ci(tmp_path, ".venv-oracle/.ready", reason, 2)
    assert done.returncode != 0
    assert reason in done.stdout
