"""Step distillation: one step of a student leads where two steps of its teacher do, with guidance on both sides.

    x_{t'} = x_t + (t' - t) v_T(x_t, t),   x_{t''} = x_{t'} + (t'' - t') v_T(x_{t'}, t')
    L = L_dstl + gamma L_ori,   L_dstl = max(SNR, 1) || x_0^ - x_0* ||^2,   x_0* = x_t - t (x_t - x_{t''}) / (t - t'')

SnapFusion (arXiv 2306.00980, section 4 and appendix D). With probability p an update has the CFG-aware loss: every
velocity, both of the teacher's and the student's, is guided at a scale drawn from a range, and gradients pass through
both of the student's. In the other updates nothing is guided. L_ori, the loss of flow matching at the same point, is
brought to the size of L_dstl before it is weighted.

The student learns at the times of its own sampling alone. Its teacher may be another network, such as a larger one, or
an earlier run of this recipe with twice the steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from snapgen_jax.bounds import SHARE, at_least, check
from snapgen_jax.diffusion.guidance import guided_from, null_like
from snapgen_jax.diffusion.schedules import Level
from snapgen_jax.diffusion.step_target import mean_velocity, nested_grid, truncated_snr
from snapgen_jax.inputs.interfaces import TokenizerSpec
from snapgen_jax.losses.flow_matching import flow_matching_loss
from snapgen_jax.networks.module import Network, Platform
from snapgen_jax.recipes._assembly import Specs
from snapgen_jax.recipes._run import run_config
from snapgen_jax.recipes._sampling import SamplingConfig
from snapgen_jax.recipes._teacher import DISTILLED_RECIPE, Teacher, TeacherConfig
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig, Point
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.recipe import Metrics, Use

Tree = Any


@dataclasses.dataclass(frozen=True)
class StepDistillationConfig(FlowMatchingConfig):
    """Step distillation. The other fields are those of `flow_matching`; the student begins as a trained run by
    `init_from`.

    Attributes:
        sampling: `steps` and `shift` are the student's grid, at whose times it learns.
        teacher: the teacher. Its `guidance` is that of the updates which are not CFG-aware; 1 as a rule.
        teacher_steps: of the teacher, for each step of the student.
        guided_share: probability p of an update with the CFG-aware loss.
        guidance_range: from which the scale of guidance is drawn, one an example.
        original_weight: gamma; 0 leaves the loss of flow matching out.
        original_scale: that loss is first brought to the size of the other ("dynamic"), or taken as it is ("constant").
    """

    sampling: SamplingConfig = SamplingConfig(steps=8)
    teacher: TeacherConfig = TeacherConfig()
    teacher_steps: int = 2
    guided_share: float = 0.1
    guidance_range: tuple[float, float] = (2.0, 14.0)
    original_weight: float = 0.2
    original_scale: Literal["dynamic", "constant"] = "dynamic"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, teacher_steps=at_least(1), guided_share=SHARE, original_weight=at_least(0))
        check(self, guidance_range=at_least(0))
        low, high = self.guidance_range
        if low > high:
            raise ValueError(f"guidance_range={self.guidance_range}; give (low, high) with low <= high")
        if self.sampling.times or self.sampling.method != "euler":
            raise ValueError(
                f"sampling.times={self.sampling.times} and sampling.method={self.sampling.method!r}; a step of the "
                "student is divided into steps of its teacher on an even grid: leave times out, and set method='euler'"
            )


class StepDistillation(FlowMatching):
    """See the top of this file. Implements `training.recipe.Recipe`."""

    Config = StepDistillationConfig

    def __init__(self, config: StepDistillationConfig, platform: Platform):
        """`platform` is the one compiled for.

        Raises:
            ConfigError: the teacher does not fit the student, or has no such steps.
        """
        super().__init__(config, platform)
        self.teacher = Teacher(config.teacher, self.inputs, config.schedule, config.batch_size, platform)
        sampling = config.sampling
        try:
            self.grid = nested_grid(config.schedule, sampling.steps, sampling.shift, config.teacher_steps)
        except ValueError as error:
            raise ConfigError(
                f"sampling.steps={sampling.steps}, teacher_steps={config.teacher_steps}: {error}"
            ) from error
        self.validation_levels: Level = Level(*(value[: -1 : config.teacher_steps] for value in self.grid))
        self._check_teacher()

    def _check_teacher(self) -> None:
        config: StepDistillationConfig = self.config
        if self.teacher.has_own_latents:
            raise ConfigError(
                "the teacher has latents of its own, and the student is to land where the teacher does; leave 'latent' "
                "out of teacher.takes"
            )
        if config.teacher.rollout_steps != 1:
            raise ConfigError(
                f"teacher.rollout_steps={config.teacher.rollout_steps} leads to the data; here teacher_steps says how "
                "many steps of the teacher make one of the student's: leave rollout_steps out"
            )
        self.teacher.check_times(self.grid.t[:-1].tolist())

    # --- networks ---

    def networks(self) -> dict[str, Network]:
        """As for flow matching, and the teacher's."""
        return {**super().networks(), **self.teacher.networks()}

    def load_frozen(self, mesh: Mesh | None, use: Use = "train") -> Tree:
        """What is frozen beside the teacher; and to train the teacher.

        Raises:
            ConfigError: no teacher is named, it is not what the config says, or it was distilled for other steps.
        """
        self._check_teacher_run()
        taught = self.teacher.load(mesh, distilled=True) if use == "train" else {}
        return {**super().load_frozen(mesh, use), **taught}

    def _check_teacher_run(self) -> None:
        """Raises where the teacher is a run of this recipe and would be asked at other times than its own."""
        run = run_config(self.teacher.config.workdir) if self.teacher.config.workdir else {}
        if run.get("recipe") != DISTILLED_RECIPE:
            return
        config, said = self.config, {name: run["sampling"][name] for name in ("steps", "shift")}
        wanted = {"steps": config.sampling.steps * config.teacher_steps, "shift": config.sampling.shift}
        if said != wanted:
            raise ConfigError(
                f"the teacher {self.teacher.config.workdir!r} was distilled for sampling {said}, and would be asked at "
                f"the times of {wanted}; change sampling.steps, sampling.shift or teacher_steps, or name another"
            )

    # --- shapes ---

    def batch_specs(self) -> Specs:
        """Those of the student's inputs, and what the teacher reads beside them."""
        return self.teacher.batch_specs(super().batch_specs())

    def tokenizers(self) -> Mapping[str, TokenizerSpec]:
        """Those of the student and of the teacher."""
        return self.teacher.tokenizers()

    # --- training ---

    def draw(self, networks: Tree, batch: Tree, key: jax.Array, step: int | jax.Array = 0) -> Tree:
        """As for flow matching, at the times of the student's grid.

        Returns:
            Also `step` int32 `[B]`, which step of the sampler; `guidance` float32 `[B]`, the scale; `guided` bool
            `[B]`, whether this update is CFG-aware, the same of all examples; and what the teacher draws.
        """
        drawn = super().draw(networks, batch, key, step)
        size = drawn["x_0"].shape[:1]
        keys = [jax.random.fold_in(key, 10 + i) for i in range(4)]
        which = jax.random.randint(keys[0], size, 0, self.config.sampling.steps)
        low, high = self.config.guidance_range
        return {
            **drawn,
            "level": self._levels(which)[0],
            "step": which,
            "guidance": jax.random.uniform(keys[1], size, minval=low, maxval=high),
            "guided": jnp.broadcast_to(jax.random.bernoulli(keys[2], self.config.guided_share), size),
            "teacher": self.teacher.draw(networks, batch, keys[3], drawn["kept"]),
        }

    def _levels(self, step: jax.Array) -> list[Level]:
        """The levels of the teacher's steps, each `[B]`, in the student's steps `[B]`."""
        inner = self.config.teacher_steps
        return [self.grid.at(step * inner + i) for i in range(inner + 1)]

    def examine(self, networks: Tree, drawn: Tree, extra: Tree) -> tuple[jax.Array, Tree, Point]:
        """The loss of each example `[B]`, its two terms, and what the student predicted without guidance."""
        del extra
        config: StepDistillationConfig = self.config
        point = self.predict(networks, drawn)[0]

        if config.guided_share in (0, 1):
            distilled = self.distance(networks, drawn, point, drawn["guidance"] if config.guided_share else None)
        else:
            distilled = self.distance(networks, drawn, point, drawn["guidance"], drawn["guided"][0])
        original = self.task_loss(drawn, point) * self.time_weight(drawn["level"])
        scale = jnp.float32(1)
        if config.original_scale == "dynamic":
            scale = jax.lax.stop_gradient(jnp.mean(distilled) / (jnp.mean(original) + 1e-8))
        aux = {
            "loss/distillation": jnp.mean(distilled),
            "loss/original": jnp.mean(original),
            "original_scale": scale,
            "guided": jnp.mean(drawn["guided"].astype(jnp.float32)),
        }
        return distilled + config.original_weight * scale * original, aux, point

    def distance(
        self,
        networks: Tree,
        drawn: Tree,
        point: Point,
        guidance: jax.Array | None = None,
        is_guided: jax.Array | None = None,
    ) -> jax.Array:
        """L_dstl of each example `[B]`.

        Args:
            networks, drawn: as for `loss`.
            point: what the student predicts with the condition.
            guidance: scale of each example `[B]`, at which both are guided; None for none.
            is_guided: whether they are, a bool of no axes; None where `guidance` alone says so. Where they are not,
                nobody is asked without the condition, and the teacher is guided as its config says.
        """
        v, own = point.v, self.teacher.config.guidance
        if guidance is not None:
            scales = guidance

            def by_both() -> jax.Array:
                null = null_like(self.inputs.null_condition(networks), point.condition)
                v_null = self.denoiser(networks[self.role], point.x_t, drawn["level"], null)[0]
                return guided_from(point.v, v_null, scales)

            v = by_both() if is_guided is None else jax.lax.cond(is_guided, by_both, lambda: point.v)
            if is_guided is not None and own != 1:
                guidance, is_guided = jnp.where(is_guided, guidance, own), None

        def taught(x_t: jax.Array, level: Level) -> jax.Array:
            drawn_by_it, condition = drawn["teacher"], point.condition
            return self.teacher.ask(networks, drawn_by_it, x_t, level, condition, (), guidance, is_guided)[0]

        target = mean_velocity(taught, jax.lax.stop_gradient(point.x_t), self._levels(drawn["step"]))
        return truncated_snr(drawn["level"]) * flow_matching_loss(v, jax.lax.stop_gradient(target))

    def report(self, extra: Tree, aux: Tree) -> tuple[Tree, Metrics]:
        """The two terms, what the second was multiplied with, and whether the update was CFG-aware."""
        return extra, aux


RECIPE = StepDistillation
