"""A `.tflite` file on LiteRT's GPU accelerator, ML Drift: the family of Android's GPU delegate, here by Vulkan.

The accelerator comes with `ai-edge-litert`. It needs a Vulkan driver, and one in software will do: Debian's `chromium`
package holds SwiftShader (`apt-get install chromium libvulkan1`). A delegate can compute garbage and report success, so
the outputs are compared with those of the CPU.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from snapgen_jax.export.runtime import CompiledUnit, GPURefusedError, GPURunError, NoGPUError
from snapgen_jax.export.sampler import Arrays

__all__ = ["GPURefusedError", "GPURunError", "NoGPUError", "Run", "run"]


@dataclasses.dataclass(frozen=True)
class Run:
    """What the accelerator gave: the outputs of each case, and whether every operator ran on it."""

    outputs: tuple[Arrays, ...]
    whole: bool


def run(path: str | pathlib.Path, signature: str, cases: Sequence[Mapping[str, np.ndarray]]) -> Run:
    """Runs a file on the accelerator, in float32 arithmetic; operators that it does not take run on the CPU.

    The driver is SwiftShader where it is installed, so that every machine finds the same.

    Args:
        path: the file.
        signature: its signature.
        cases: the inputs of each call.

    Raises:
        NoGPUError: no Vulkan driver is found, or the accelerator finds no device by it.
        GPURunError: the process crashed or was not done in time.
        GPURefusedError: the accelerator refused the file.
    """
    unit = CompiledUnit(path, signature, "gpu", software_first=True)
    return Run(tuple(unit(**case) for case in cases), unit.whole)
