"""How long the parts of drawing take, on the devices of JAX: what `snapgen sample --time` prints."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax

from snapgen_jax.diffusion.stages import Staged, run_stages

Tree = Any


class DrawsInStages(Protocol):
    """A generator of a run or of a published system."""

    def staged(
        self, prompts: Sequence[str] | None, conditions: Mapping[str, Any] | None, seed: int, **options: Any
    ) -> Staged:
        """The batch that `generate` would draw with the same arguments."""
        ...


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds, medians of several runs.

    Attributes:
        tokenizer: on the host; None where there is no prompt.
        parts: `{stage: ms}`, each a program of its own.
        whole: all stages as one program, with the copy of its results to the host.
        compile_seconds: of that program; little where the cache of compiled programs held it.
        steps, examples: of the batch.
        device: where it ran.
    """

    tokenizer: float | None
    parts: Mapping[str, float]
    whole: float
    compile_seconds: float
    steps: int
    examples: int
    device: str

    def table(self) -> str:
        """Lines of text, a part each."""
        total = sum(self.parts.values())
        lines = [f"{'part':<22}{'ms':>10}{'share':>8}"]
        if self.tokenizer is not None:
            lines.append(f"{'tokenizer':<22}{self.tokenizer:>10.2f}{'':>8}")
        for name, ms in self.parts.items():
            more = f"   {ms / self.steps:.2f} a step" if name == "steps" else ""
            label = f"{self.steps} steps" if name == "steps" else name
            lines.append(f"{label:<22}{ms:>10.2f}{ms / total:>8.0%}{more}")
        lines.append(
            f"{'whole, one program':<22}{self.whole:>10.2f}{'':>8}   {self.whole / self.examples:.2f} an image, of "
            f"{self.examples} at once on {self.device}; compiled in {self.compile_seconds:.1f} s"
        )
        return "\n".join(lines)


def time_generator(
    generator: DrawsInStages,
    prompts: Sequence[str] | None = None,
    conditions: Mapping[str, Any] | None = None,
    seed: int = 0,
    runs: int = 5,
    **options: Any,
) -> Timing:
    """Measures one batch, of all prompts or conditions at once.

    Args:
        generator: of a run, or of a published system.
        prompts, conditions, seed, options: as of its `generate`.
        runs: of each part after the first, which compiles; the median counts.

    Raises:
        ValueError: as `generate`, or what it draws is not made in stages.
    """
    batch = generator.staged(prompts, conditions, seed, **options)
    tokenizer = None if batch.tokenize is None else _median(batch.tokenize, runs)
    parts, value = {}, batch.given
    for name, stage in batch.stages.items():
        program, _ = _compiled(stage, batch.networks, value)
        parts[name] = _median(lambda p=program, v=value: jax.block_until_ready(p(batch.networks, v)), runs)
        value = program(batch.networks, value)
    program, seconds = _compiled(lambda n, given: run_stages(batch.stages, n, given), batch.networks, batch.given)
    whole = _median(lambda: jax.device_get(program(batch.networks, batch.given)), runs)
    device = jax.devices()[0].device_kind
    return Timing(tokenizer, parts, whole, seconds, batch.steps, batch.examples, device)


def _compiled(function: Callable[..., Tree], *arguments: Tree) -> tuple[Callable[..., Tree], float]:
    """The program of a function, and the seconds that it took to compile."""
    began = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    return program, time.perf_counter() - began


def _median(call: Callable[[], Any], runs: int) -> float:
    """Milliseconds of a call, after a first one that is not counted."""
    call()
    taken = []
    for _ in range(runs):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return 1e3 * statistics.median(taken)
