"""A `.tflite` file as a function, on LiteRT's CPU or its GPU accelerator. Copied into every bundle.

`litert_unit` is LiteRT's interpreter in this process. `CompiledUnit` is LiteRT's CompiledModel, on which phones run, in
a process of its own: a GPU driver that crashes or hangs ends that process alone, and what LiteRT prints there becomes
the reason of an error. This file, run as a script, is that process.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping, MutableMapping
from typing import IO, Any, Literal, NoReturn

import numpy as np

Unit = Callable[..., Mapping[str, np.ndarray]]
Accelerator = Literal["cpu", "gpu"]

# Where Vulkan drivers describe themselves; VK_DRIVER_FILES and VK_ICD_FILENAMES come before both.
SOFTWARE = (
    "/usr/lib/chromium/vk_swiftshader_icd.json",
    "/usr/lib/chromium-browser/vk_swiftshader_icd.json",
    "/opt/google/chrome/vk_swiftshader_icd.json",
)
HARDWARE = ("/usr/share/vulkan/icd.d/*.json", "/etc/vulkan/icd.d/*.json")
SECONDS = 300.0
HINT = "Debian's software driver: apt-get install chromium libvulkan1"
_NO_DEVICE = ("No adapters found", "Failed to create WebGPU", "Couldn't load Vulkan")
_COMMAND = (sys.executable, str(pathlib.Path(__file__).absolute()))


class AcceleratorError(RuntimeError):
    """A file does not run on the accelerator. Says why."""


class NoGPUError(AcceleratorError):
    """There is no accelerator to run on here: no driver, or one that has no device for it. Says what to install."""


class GPURunError(AcceleratorError):
    """The process crashed, or was not done in time: nothing is known of the file."""


class GPURefusedError(AcceleratorError):
    """The accelerator does not take the file, not even with the CPU for the operators that it lacks."""


def litert_unit(
    path: pathlib.Path,
    signature: str,
    num_threads: int | None = None,
    loaded: MutableMapping[pathlib.Path, Any] | None = None,
) -> Unit:
    """The function of one signature of a `.tflite` file on LiteRT's CPU, in this process.

    `loaded`: interpreters by their files, which is added to: the signatures of a file that share one hold its weights
    once. They are for one thread at a time.
    """
    from ai_edge_litert.interpreter import Interpreter

    interpreter = None if loaded is None else loaded.get(path)
    if interpreter is None:
        interpreter = Interpreter(model_path=str(path), num_threads=num_threads)
        if loaded is not None:
            loaded[path] = interpreter
    return interpreter.get_signature_runner(signature)


def drivers(*, software_first: bool) -> tuple[str, ...]:
    """Files that describe the Vulkan drivers to use; empty where there is none.

    Args:
        software_first: SwiftShader alone where it is, as a check that is the same on all machines needs it; else it is
            the last: drivers are installed for hardware that is not there.
    """
    for variable in ("VK_DRIVER_FILES", "VK_ICD_FILENAMES"):
        if os.environ.get(variable):
            return tuple(name for name in os.environ[variable].split(os.pathsep) if pathlib.Path(name).is_file())
    software, hardware = _found(SOFTWARE)[:1], _found(HARDWARE)
    return (software or hardware) if software_first else hardware + software


def _found(patterns: tuple[str, ...]) -> tuple[str, ...]:
    root = pathlib.Path("/")
    return tuple(str(path) for pattern in patterns for path in sorted(root.glob(pattern.lstrip("/"))))


def see_drivers(environment: dict[str, str], found: tuple[str, ...], stack: contextlib.ExitStack) -> str:
    """Lets a process find these Vulkan drivers, and the loader beside the first, as Chromium's has one.

    Args:
        environment: of the process, which is changed.
        found: what `drivers` returned.
        stack: is closed when the process has ended.

    Returns:
        The drivers, for messages.

    Raises:
        NoGPUError: there is none.
    """
    if not found:
        raise NoGPUError(f"no Vulkan driver was found ({HINT})")
    shown = os.pathsep.join(found)
    environment |= {"VK_ICD_FILENAMES": shown, "VK_DRIVER_FILES": shown}
    beside = pathlib.Path(found[0]).parent / "libvulkan.so.1"
    if beside.is_file():
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / beside.name).symlink_to(beside)  # alone: Chromium's folder holds other libraries, too
        before = environment.get("LD_LIBRARY_PATH")
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(name for name in (before, str(folder)) if name)
    return f" (driver {shown})"


class CompiledUnit:
    """The function of one file by LiteRT's CompiledModel, in a process of its own that ends with this object.

    A GPU computes in float32 arithmetic; operators that it does not take run on the CPU.

    Attributes:
        whole: whether every operator runs on the accelerator. (LiteRT does not say so of the CPU.)
        software: whether the GPU is a driver in software.

    Raises:
        NoGPUError, GPURunError, GPURefusedError: when made or called.
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        signature: str,
        accelerator: Accelerator,
        num_threads: int | None = None,
        *,
        software_first: bool = False,
    ) -> None:
        self._name = f"{path} on LiteRT's {accelerator.upper()}"
        self._stack = contextlib.ExitStack()
        self._driver, environment = "", dict(os.environ)
        if accelerator == "gpu":
            self._driver = see_drivers(environment, drivers(software_first=software_first), self._stack)
        self._log: IO[bytes] = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 (`_end` closes it)
        self._process = subprocess.Popen(
            [*_COMMAND, str(path), signature, accelerator, str(num_threads or 0)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=environment,
        )  # fmt: skip
        weakref.finalize(self, _end, self._process, self._stack)
        facts = json.loads(self._receive())
        self.whole: bool = facts["whole"]
        self.software = "adapterType=CPU" in self._said()

    def __call__(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs of one call."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its end is found out below
            _send(self._process.stdin, _packed(inputs))
        return _unpacked(self._receive())

    def _receive(self) -> bytes:
        """What the process says next. Raises where it ends instead, or takes too long."""
        assert self._process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        watch = threading.Timer(SECONDS, stop)
        watch.start()
        try:
            message = _received(self._process.stdout)
        finally:
            watch.cancel()
        return self._fail(late.is_set()) if message is None else message

    def _said(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def _fail(self, late: bool) -> NoReturn:
        code, text = self._process.wait(), self._said()
        if late:
            raise GPURunError(f"{self._name}: not done after {SECONDS:g} seconds{self._driver}")
        if any(sign in text for sign in _NO_DEVICE):
            raise NoGPUError(f"there is no device for LiteRT{self._driver}; {HINT}")
        last = "\n  ".join(line for line in text.splitlines() if not line.startswith("INFO"))[-800:]
        if code < 0:
            raise GPURunError(f"{self._name}: its process ended with signal {-code}{self._driver}:\n  {last}")
        raise GPURefusedError(f"{self._name}: LiteRT refuses it{self._driver}:\n  {last}")


def _end(process: subprocess.Popen[bytes], stack: contextlib.ExitStack) -> None:
    """Ends the process of a unit that is no longer used."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            assert pipe is not None
            pipe.close()
    stack.close()


def _packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **dict[str, Any](arrays))
    return buffer.getvalue()


def _unpacked(message: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(message), allow_pickle=False) as arrays:
        return dict(arrays)


def _send(pipe: IO[bytes], message: bytes) -> None:
    pipe.write(struct.pack("<Q", len(message)))
    pipe.write(message)
    pipe.flush()


def _received(pipe: IO[bytes]) -> bytes | None:
    """The next message; None where there is none, or no whole one."""
    head = pipe.read(8)
    if len(head) < 8:
        return None
    (size,) = struct.unpack("<Q", head)
    message = pipe.read(size)
    return message if len(message) == size else None


def compiled(path: str, accelerator: Accelerator, num_threads: int | None = None) -> Any:
    """The CompiledModel of a file. On a GPU in float32 arithmetic, and on the CPU what that does not take."""
    from ai_edge_litert.compiled_model import CompiledModel, GpuOptions, HardwareAccelerator, Options
    from ai_edge_litert.options import CpuOptions

    def load(accelerators: Any) -> Any:
        threads = CpuOptions(num_threads=num_threads) if num_threads else None
        options = Options(accelerators, cpu_options=threads, gpu_options=GpuOptions(enforce_f32=True))
        return CompiledModel.from_file(path, options=options)

    if accelerator == "cpu":
        return load(HardwareAccelerator.CPU)
    try:
        return load(HardwareAccelerator.GPU)
    except RuntimeError:  # some operators are not for it
        return load(HardwareAccelerator.GPU | HardwareAccelerator.CPU)


def serve(path: str, signature: str, accelerator: Accelerator, num_threads: str) -> None:
    """The process of a `CompiledUnit`: says what it is, then answers calls until there are no more."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what LiteRT prints is no answer
    model = compiled(path, accelerator, int(num_threads))
    signatures = model.get_signature_list()
    index, names = list(signatures).index(signature), signatures[signature]
    inputs, outputs = model.create_input_buffers(index), model.create_output_buffers(index)
    details = model.get_output_tensor_details(signature)
    _send(answers, json.dumps({"whole": bool(model.is_fully_accelerated())}).encode())
    while (message := _received(sys.stdin.buffer)) is not None:
        given = _unpacked(message)
        for name, buffer in zip(names["inputs"], inputs, strict=True):
            buffer.write(np.ascontiguousarray(given[name]))
        model.run_by_index(index, inputs, outputs)
        made = {}
        for name, buffer in zip(names["outputs"], outputs, strict=True):
            shape, dtype = tuple(details[name]["shape"]), np.dtype(details[name]["dtype"])
            made[name] = np.array(buffer.read(int(np.prod(shape)), dtype.type)).reshape(shape)
        _send(answers, _packed(made))
    os._exit(0)  # a driver's own threads may crash while a process ends; nothing of that is a result


if __name__ == "__main__":
    serve(*sys.argv[1:])  # type: ignore[arg-type]
