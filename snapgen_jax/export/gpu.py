"""A `.tflite` file on LiteRT's GPU accelerator, ML Drift: the family of Android's GPU delegate, here by Vulkan.

The accelerator comes with `ai-edge-litert`. It needs a Vulkan driver, and one in software will do: Debian's `chromium`
package holds SwiftShader (`apt-get install chromium libvulkan1`). A delegate can compute garbage and report success, so
the outputs are compared with those of the CPU. The file runs in a process of its own with a time limit: a driver that
crashes or hangs is a finding about the driver, and ends nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from snapgen_jax.export.sampler import Arrays

# Where drivers describe themselves, the software driver that is known to work first. VK_ICD_FILENAMES and
# VK_DRIVER_FILES come before both.
DRIVERS = (
    "/usr/lib/chromium/vk_swiftshader_icd.json",
    "/usr/lib/chromium-browser/vk_swiftshader_icd.json",
    "/opt/google/chrome/vk_swiftshader_icd.json",
    "/usr/share/vulkan/icd.d/*.json",
    "/etc/vulkan/icd.d/*.json",
)
SECONDS = 300.0
_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from snapgen_jax.export.gpu import child; child()"
HINT = "Debian's software driver: apt-get install chromium libvulkan1"


class NoGPUError(RuntimeError):
    """There is no accelerator to run on here: no driver, or one that has no device for it. Says what to install."""


class GPURunError(RuntimeError):
    """The driver crashed, or was not done in time: nothing is known of the file."""


class GPURefusedError(RuntimeError):
    """The accelerator does not take the file, not even with the CPU for the operators that it lacks."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What the accelerator gave: the outputs of each case, and whether every operator ran on it."""

    outputs: tuple[Arrays, ...]
    whole: bool


def drivers() -> tuple[str, ...]:
    """Files that describe the Vulkan drivers to use: SwiftShader alone where it is; empty where there is none."""
    for variable in ("VK_DRIVER_FILES", "VK_ICD_FILENAMES"):
        if os.environ.get(variable):
            return tuple(name for name in os.environ[variable].split(os.pathsep) if pathlib.Path(name).is_file())
    found = [str(path) for pattern in DRIVERS for path in sorted(pathlib.Path("/").glob(pattern.lstrip("/")))]
    return tuple(found[:1] if found and "swiftshader" in found[0] else found)


def environment(folder: pathlib.Path) -> dict[str, str]:
    """The environment of a process in which LiteRT finds the driver; `folder` is empty, and outlives the process.

    Raises:
        NoGPUError: no Vulkan driver is found.
    """
    found = drivers()
    if not found:
        raise NoGPUError(f"no Vulkan driver was found ({HINT})")
    shown = os.pathsep.join(found)
    libraries = (os.environ.get("LD_LIBRARY_PATH"), str(_loader(found[0], folder)))
    libraries = {"LD_LIBRARY_PATH": os.pathsep.join(name for name in libraries if name)}
    return {**os.environ, "VK_ICD_FILENAMES": shown, "VK_DRIVER_FILES": shown, **libraries}


def run(path: str | pathlib.Path, signature: str, cases: Sequence[Mapping[str, np.ndarray]]) -> Run:
    """Runs a file on the accelerator, in float32 arithmetic; operators that it does not take run on the CPU.

    Args:
        path: the file.
        signature: its signature.
        cases: the inputs of each call.

    Raises:
        NoGPUError: no Vulkan driver is found, or the accelerator finds no device by it.
        GPURunError: the process crashed or was not done in time.
        GPURefusedError: the accelerator refused the file.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        variables = environment(folder)
        shown = variables["VK_DRIVER_FILES"]
        for i, case in enumerate(cases):
            np.savez(folder / f"in_{i}.npz", **dict[str, Any](case))
        command = [sys.executable, "-c", _CHILD, json.dumps(sys.path), str(path), signature, scratch, str(len(cases))]
        try:
            done = subprocess.run(
                command, env=variables, capture_output=True, text=True, timeout=SECONDS, check=False, errors="replace"
            )
        except subprocess.TimeoutExpired as error:
            raise GPURunError(f"{path}: not done on the GPU after {SECONDS:g} seconds (driver {shown})") from error
        said = folder / "said.json"
        if done.returncode == 0 and said.is_file():
            facts = json.loads(said.read_text("utf-8"))
            return Run(tuple(dict(np.load(folder / f"out_{i}.npz")) for i in range(len(cases))), facts["whole"])
    text = done.stdout + done.stderr
    if any(sign in text for sign in ("No adapters found", "Failed to create WebGPU", "Couldn't load Vulkan")):
        raise NoGPUError(f"the Vulkan driver {shown} gives LiteRT no device ({HINT})")
    last = "\n  ".join(line for line in text.splitlines() if not line.startswith("INFO"))[-800:]
    if done.returncode < 0:
        raise GPURunError(f"{path}: the GPU driver {shown} ended with signal {-done.returncode}:\n  {last}")
    raise GPURefusedError(f"{path}: LiteRT's GPU accelerator refuses it (driver {shown}):\n  {last}")


def _loader(driver: str, folder: pathlib.Path) -> pathlib.Path | str:
    """A folder with the Vulkan loader that lies beside the driver, as Chromium's does; "" where none does."""
    beside = pathlib.Path(driver).parent / "libvulkan.so.1"
    if not beside.is_file():
        return ""
    (folder / "loader").mkdir()
    (folder / "loader" / beside.name).symlink_to(beside)  # alone: Chromium's folder holds other libraries, too
    return folder / "loader"


def child() -> None:
    """The process that `run` starts: reads in_<i>.npz, writes out_<i>.npz, and said.json last."""
    path, signature, scratch, count = sys.argv[2:]
    from ai_edge_litert.compiled_model import CompiledModel, GpuOptions, HardwareAccelerator, Options

    folder = pathlib.Path(scratch)

    def load(accelerators):
        options = Options(hardware_accelerators=accelerators, gpu_options=GpuOptions(enforce_f32=True))
        return CompiledModel.from_file(path, options=options)

    try:
        model = load(HardwareAccelerator.GPU)
    except RuntimeError:  # some operators are not for it
        model = load(HardwareAccelerator.GPU | HardwareAccelerator.CPU)
    signatures = model.get_signature_list()
    index, names = list(signatures).index(signature), signatures[signature]
    inputs, outputs = model.create_input_buffers(index), model.create_output_buffers(index)
    details = model.get_output_tensor_details(signature)
    for i in range(int(count)):
        given = np.load(folder / f"in_{i}.npz")
        for name, buffer in zip(names["inputs"], inputs, strict=True):
            buffer.write(np.ascontiguousarray(given[name]))
        model.run_by_index(index, inputs, outputs)
        made = {}
        for name, buffer in zip(names["outputs"], outputs, strict=True):
            shape, dtype = tuple(details[name]["shape"]), np.dtype(details[name]["dtype"])
            made[name] = np.array(buffer.read(int(np.prod(shape)), dtype.type)).reshape(shape)
        np.savez(folder / f"out_{i}.npz", **made)
    (folder / "said.json").write_text(json.dumps({"whole": bool(model.is_fully_accelerated())}), "utf-8")
    # The driver's own threads may crash while the process ends; nothing of that is a result.
    sys.stdout.flush()
    os._exit(0)
