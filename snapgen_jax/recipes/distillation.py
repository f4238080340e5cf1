"""Multi-level knowledge distillation: a student learns from data and from a larger, different network.

    L = S(L_task, L_out + L_feat)
    L_out = || v_theta(x_t, t, c) - v_T(x_t, t, c_T) ||^2,   L_feat = || phi(f_theta) - LN(f_T) ||^2

SnapGen (arXiv 2412.09619, section 3.3). v_T is the velocity of the teacher at the same point of the path, f are
features at one or more depths and phi is a projector that is dropped afterwards; S, which weighs the data against the
teacher at every time, is that of `losses/distillation.py`. The teacher is an argument of the step: never
differentiated, never in a checkpoint. One player, "model", holds the student and the projectors; the running means of S
are in `extra`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from snapgen_jax.bounds import at_least, check
from snapgen_jax.diffusion.path import interpolate
from snapgen_jax.inputs.interfaces import TokenizerSpec
from snapgen_jax.losses.distillation import (
    TASK,
    ScalingConfig,
    bin_sums,
    feature_loss,
    new_means,
    scaled,
    update_means,
)
from snapgen_jax.losses.flow_matching import flow_matching_loss
from snapgen_jax.networks.module import Network, Platform, apply, build, for_platform, init
from snapgen_jax.networks.projector import ProjectorConfig
from snapgen_jax.networks.rules import rules_of
from snapgen_jax.recipes._assembly import Specs
from snapgen_jax.recipes._teacher import Teacher, TeacherConfig, tap_shapes
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig, Point
from snapgen_jax.training.accumulate import split_microbatches
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.recipe import Metrics, Part, Use
from snapgen_jax.training.state import TrainState

Tree = Any
# Keys of what a teacher adds are folded from here on: `split(key, n)[i]` is `fold_in(key, i)`, and so is the key of a
# network's i-th parameter, so that small numbers are taken by what is drawn without it.
OWN_KEYS = 10_000


@dataclasses.dataclass(frozen=True)
class DistillationConfig(FlowMatchingConfig):
    """Flow matching, and what is taken from a teacher, and how much.

    Attributes:
        teacher: the teacher.
        output_weight: of the distance of velocities; 0 leaves it out.
        feature_weight: of the distance of features; 0 leaves it, and the projectors, out.
        student_taps, teacher_taps: names of the features that are compared, pair by pair.
        projector_hidden: width of a middle layer of the projectors; None for linear ones.
        scaling: the operator S.
        shard_student: whether the student is split over `fsdp` as the teacher is, or whole on every device.
    """

    teacher: TeacherConfig = TeacherConfig()
    output_weight: float = 1.0
    feature_weight: float = 1.0
    student_taps: tuple[str, ...] = ("up_0",)
    teacher_taps: tuple[str, ...] = ("block_05",)
    projector_hidden: int | None = None
    scaling: ScalingConfig = ScalingConfig()
    shard_student: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        weight = at_least(0, "less leads away from the teacher")
        check(self, output_weight=weight, feature_weight=weight, projector_hidden=at_least(1))


class Distillation(FlowMatching):
    """See the top of this file. Implements `training.recipe.Recipe`."""

    Config = DistillationConfig

    def __init__(self, config: DistillationConfig, platform: Platform):
        """`platform` is the one compiled for.

        Raises:
            ConfigError: the teacher and what is asked of it do not fit each other or the student.
        """
        super().__init__(config, platform)
        self.loss_weights = {
            name: weight
            for name, weight in (("output", config.output_weight), ("feature", config.feature_weight))
            if weight
        }
        self.teacher = Teacher(config.teacher, self.inputs, config.schedule, config.batch_size, platform)
        self._check()
        self.projectors = {
            f"projector_{i}": build(for_platform(pair, platform))[0] for i, pair in enumerate(self._projectors())
        }
        if self.loss_weights:
            self.trains = {"model": (*self.trains["model"], *self.projectors)}

    def _check(self) -> None:
        config: DistillationConfig = self.config
        if self.loss_weights:
            self.teacher.check_times(self.times())
        if config.output_weight and self.teacher.has_own_latents:
            raise ConfigError(
                "the teacher has latents of its own, so that velocities cannot be compared; set output_weight=0 and "
                "distil features alone, or give the teacher the student's latents"
            )
        if config.scaling.ratio == "batch" and config.microbatches > 1:
            raise ConfigError(
                f"scaling.ratio='batch' would be that of a microbatch, and there are {config.microbatches}; set "
                "microbatches=1, or scaling.ratio to 'running'"
            )
        if len(config.student_taps) != len(config.teacher_taps):
            raise ConfigError(
                f"student_taps {config.student_taps} and teacher_taps {config.teacher_taps} are compared pair by pair; "
                "give as many of one as of the other"
            )
        if config.feature_weight and not config.student_taps:
            raise ConfigError("there are no features to compare; name student_taps, or set feature_weight=0")

    def _projectors(self) -> list[ProjectorConfig]:
        """One for each pair of features, by their shapes, which every image size must agree upon."""
        config: DistillationConfig = self.config
        if not config.feature_weight:
            return []

        def at(size: tuple[int, int]) -> list[ProjectorConfig]:
            student = tap_shapes(self.denoiser, self.inputs.latent_shape(size), config.student_taps)
            teacher = tap_shapes(self.teacher.denoiser, self.teacher.latent_shape(size), config.teacher_taps)
            pairs = zip(config.student_taps, config.teacher_taps, strict=True)
            return [ProjectorConfig.between(student[a], teacher[b], config.projector_hidden) for a, b in pairs]

        first, *others = self.inputs.config.image_sizes
        pairs = at(first)
        for size in others:
            if at(size) != pairs:
                raise ConfigError(
                    f"the features of the student and of the teacher have another ratio of sizes at {size} than at "
                    f"{first}, and one projector serves both; change image_sizes"
                )
        return pairs

    def times(self) -> Sequence[float] | None:
        """The times at which the student learns, where they are few; None for any."""
        return None

    # --- networks ---

    @property
    def has_teacher(self) -> bool:
        """Whether anything asks the teacher."""
        return bool(self.loss_weights)

    def networks(self) -> dict[str, Network]:
        """As without a teacher, the projectors, and the teacher's."""
        return {**super().networks(), **self.projectors, **(self.teacher.networks() if self.has_teacher else {})}

    def init(self, key: jax.Array) -> TrainState:
        """As without a teacher, and the projectors and running means."""
        state = super().init(key)
        means = {"means": new_means(tuple(self.loss_weights), self.config.scaling)} if self._has_means else {}
        return state.replace(extra=means)

    def first_params(self, key: jax.Array) -> dict[str, Tree]:
        """As without a teacher, and the projectors, from keys of their own."""
        projectors = {
            name: init(network, jax.random.fold_in(key, OWN_KEYS + i))
            for i, (name, network) in enumerate(self.projectors.items())
        }
        return {**super().first_params(key), **projectors}

    @property
    def _has_means(self) -> bool:
        scaling = self.config.scaling
        return bool(self.loss_weights) and scaling.alpha != "none" and scaling.ratio == "running"

    def warm_start(self, state: TrainState, earlier: Tree) -> TrainState:
        """As without a teacher; projectors begin anew unless the earlier stage had such of the same shapes."""
        new, old = state.players["model"].params, dict(earlier["model"])
        for name in self.projectors:
            if jax.tree.map(jnp.shape, old.get(name)) != jax.tree.map(jnp.shape, new[name]):
                old[name] = new[name]
        return super().warm_start(state, {"model": old})

    def load_frozen(self, mesh: Mesh | None, use: Use = "train") -> Tree:
        """What is frozen beside the teacher; and to train the teacher, which is not asked when the student draws."""
        taught = self.teacher.load(mesh) if use == "train" and self.has_teacher else {}
        return {**super().load_frozen(mesh, use), **taught}

    def rules(self) -> Sequence[tuple[str, PartitionSpec]]:
        """Those of the teacher and, if it is to be split, of the student."""
        return super().rules() if self.config.shard_student else rules_of(self.teacher.networks())

    # --- shapes ---

    def batch_specs(self) -> Specs:
        """Those of the student's inputs, and what the teacher reads beside them."""
        return self.teacher.batch_specs(super().batch_specs())

    def tokenizers(self) -> Mapping[str, TokenizerSpec]:
        """Those of the student and of the teacher."""
        return self.teacher.tokenizers()

    # --- training ---

    def draw(self, networks: Tree, batch: Tree, key: jax.Array, step: int | jax.Array = 0) -> Tree:
        """As without a teacher, and `teacher`, what the teacher is given of its own."""
        drawn = self.draw_untaught(networks, batch, key, step)
        return {**drawn, **self.draw_taught(networks, batch, key, drawn["kept"])}

    def draw_untaught(self, networks: Tree, batch: Tree, key: jax.Array, step: int | jax.Array = 0) -> Tree:
        """What is drawn without a teacher."""
        return super().draw(networks, batch, key, step)

    def draw_taught(self, networks: Tree, batch: Tree, key: jax.Array, kept: Tree) -> Tree:
        """What is drawn for a teacher alone; `kept` says which conditions the student keeps."""
        if not self.has_teacher:
            return {}
        return {"teacher": self.teacher.draw(networks, batch, jax.random.fold_in(key, OWN_KEYS), kept)}

    def examine(self, networks: Tree, drawn: Tree, extra: Tree) -> tuple[jax.Array, Tree, Point]:
        """S of the flow matching loss and of the distances to the teacher, `[B]`."""
        if not self.loss_weights:
            return super().examine(networks, drawn, extra)
        config, level = self.config, drawn["level"]
        compares = "feature" in self.loss_weights
        student_taps, teacher_taps = (config.student_taps, config.teacher_taps) if compares else ((), ())
        point, features = self.predict(networks, drawn, student_taps)
        taught_v, taught = self.teacher.ask(networks, drawn["teacher"], point.x_t, level, point.condition, teacher_taps)
        losses = {TASK: self.task_loss(drawn, point)}
        if "output" in self.loss_weights:
            losses["output"] = flow_matching_loss(point.v, taught_v)
        if compares:
            pairs = zip(self.projectors.items(), student_taps, teacher_taps, strict=True)
            distances = [
                feature_loss(apply(network, networks[name], features[a], taught[b].shape[1:3]), taught[b])
                for (name, network), a, b in pairs
            ]
            losses["feature"] = sum(distances[1:], distances[0]) / len(distances)
        losses = {name: loss * self.time_weight(level) for name, loss in losses.items()}
        total = scaled(losses, self.loss_weights, level.t, extra.get("means", {}), config.scaling)
        aux: dict[str, Any] = {"metrics": {f"loss/{name}": jnp.mean(loss) for name, loss in losses.items()}}
        if self._has_means:
            aux["sums"] = bin_sums(losses, level.t, config.scaling)
        return total, aux, point

    def report(self, extra: Tree, aux: Tree) -> tuple[Tree, Metrics]:
        """The running means after this batch, and each loss by itself."""
        if self._has_means:
            # A mean over microbatches came back of what each had summed.
            sums = jax.tree.map(lambda x: self.config.microbatches * x, aux["sums"])
            extra = {**extra, "means": update_means(extra["means"], sums, self.config.scaling)}
        return extra, aux.get("metrics", {})

    def parts(self) -> Mapping[str, Part]:
        """Also "teacher": what it computes for a batch, in as many parts as the student learns from."""

        def teacher(state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> Tree:
            networks = self.current(state, frozen)
            taps = self.config.teacher_taps if "feature" in self.loss_weights else ()

            def ask(drawn: Tree) -> Tree:
                x_t = interpolate(drawn["x_0"], drawn["eps"], drawn["level"].t)
                condition = self.inputs.condition(networks, drawn["condition"])
                taught = self.teacher.ask(networks, drawn["teacher"], x_t, drawn["level"], condition, taps)
                return jax.tree.map(lambda x: jnp.mean(jnp.square(x)), taught)

            drawn = self.draw(networks, batch, key, state.step)
            return jax.lax.map(ask, split_microbatches(drawn, self.config.microbatches))

        return {**super().parts(), **({"teacher": teacher} if self.loss_weights else {})}


RECIPE = Distillation
