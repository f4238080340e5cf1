"""Traces of a few updates, for TensorBoard's profiler or XProf."""

from __future__ import annotations

import re
from typing import Any

import jax
from etils import epath

from snapgen_jax.training.exits import ConfigError


class Profiler:
    """Records updates first to last - 1 of "first:last" into a folder; an empty text records none."""

    def __init__(self, steps: str, folder: epath.Path | None):
        """Raises `ConfigError` where the text is no range of steps, or there is no folder to write to."""
        self._folder, self._running = folder, False
        self._first, self._last = _range(steps)
        if steps and folder is None:
            raise ConfigError(f"profile_steps={steps} needs a workdir, where the trace goes")

    def before(self, step: int, state: Any) -> None:
        """Starts or ends the trace before update number `step`; either waits for the device."""
        if step == self._first and self._folder is not None and not self._running:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        elif step >= self._last:
            self.stop(state)

    def stop(self, state: Any = None) -> None:
        """Ends a trace that is running."""
        if self._running:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._running = False
            print(f"wrote the trace of updates {self._first} to {self._last - 1} to {self._folder}", flush=True)


def _range(steps: str) -> tuple[int, int]:
    if not steps:
        return 0, 0
    match = re.fullmatch(r"(\d+):(\d+)", steps)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise ConfigError(f"profile_steps is {steps!r}; give the first update and the one after the last, 100:110 say")
    return int(match[1]), int(match[2])
