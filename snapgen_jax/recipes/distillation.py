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
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh, PartitionSpec

from snapgen_jax.diffusion.guidance import guided
from snapgen_jax.diffusion.path import expand_like, interpolate, velocity
from snapgen_jax.diffusion.samplers import sample
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
from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.codec import CodecConfig, build_codec, from_uint8
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.module import Network, Platform, apply, build, for_platform, init
from snapgen_jax.networks.module import frozen_spec as spec_of
from snapgen_jax.networks.projector import ProjectorConfig
from snapgen_jax.networks.rules import within
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.recipes.flow_matching import Examined, FlowMatching, FlowMatchingConfig, Prediction, predict
from snapgen_jax.training.accumulate import split_microbatches
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.recipe import Metrics, Part
from snapgen_jax.training.state import TrainState
from snapgen_jax.weights.frozen import draw_stand_ins, load_codec, load_mmdit, load_run

Tree = Any
# Keys of what a teacher adds are folded from here on: `split(key, n)[i]` is `fold_in(key, i)`, and so is the key of a
# network's i-th parameter, so that small numbers are taken by what is drawn without him.
OWN_KEYS = 10_000


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """The network to learn from: what it is, and where its weights are.

    Attributes:
        workdir: a trained run, of which the averaged weights are taken.
        weights: in place of a run, the folder `transformer/` of a published Stable Diffusion 3.5.
        random: in place of either, networks as they are drawn: a run to try speed and memory with. They teach nothing.
        network, unet, mmdit, prediction: as for `flow_matching`; equal to those of the run.
        text: the text encoder that was trained with it in its run; None where it reads the states that the student
            reads.
        codec: its own latents; None where they are the student's. With other latents only features can be compared: the
            same image and the same time, each with noise of its own.
        guidance: scale of classifier-free guidance in the target, so that the student need not be guided.
        rollout_steps: 1 takes the velocity at x_t. More follow the teacher's flow from x_t to the data in so many Euler
            steps, and take their mean velocity, which leads there in one: a target that is sharp even at much noise.
    """

    workdir: str = ""
    weights: str = ""
    random: bool = False
    network: Literal["unet", "mmdit"] = "mmdit"
    unet: UNetConfig = UNetConfig.preset("shapes")
    mmdit: MMDiTConfig = MMDiTConfig.preset("shapes")
    prediction: Prediction = "velocity"
    text: ClipTextConfig | None = None
    codec: CodecConfig | None = None
    guidance: float = 1.0
    rollout_steps: int = 1


@dataclasses.dataclass(frozen=True)
class TeachingConfig:
    """What is taken from a teacher, and how much.

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


@dataclasses.dataclass(frozen=True)
class DistillationConfig(TeachingConfig, FlowMatchingConfig):
    """Distillation of a network for pixels and captions: the fields of `flow_matching` and of `TeachingConfig`."""


class Distilled(FlowMatching):
    """What a teacher adds to a flow matching recipe, on pixels or on stored latents. Mixed in before that recipe."""

    config: Any

    def __init__(self, config: Any, platform: Platform):
        """`platform` is the one compiled for.

        Raises:
            ConfigError: the teacher and what is asked of him do not fit each other or the student.
        """
        super().__init__(config, platform)
        asked: TeachingConfig = config
        teacher = asked.teacher
        self.weights = {
            name: weight
            for name, weight in (("output", asked.output_weight), ("feature", asked.feature_weight))
            if weight
        }
        self.teacher_config = getattr(teacher, teacher.network)
        self.teacher, _ = build(for_platform(self.teacher_config, platform))
        self.teacher_spec = spec_of(self.teacher)
        self.teacher_text = None if teacher.text is None else build(for_platform(teacher.text, platform))[0]
        self.teacher_codec = None if teacher.codec is None else build_codec(teacher.codec, platform)
        self._check()
        self.projectors = {
            f"projector_{i}": build(for_platform(pair, platform))[0] for i, pair in enumerate(self._projectors())
        }

    def _check(self) -> None:
        config: TeachingConfig = self.config
        teacher = config.teacher
        if config.output_weight < 0 or config.feature_weight < 0:
            raise ConfigError(
                f"output_weight={config.output_weight} and feature_weight={config.feature_weight}; give 0 or more, "
                "since less leads away from the teacher"
            )
        if bool(teacher.workdir) + bool(teacher.weights) + teacher.random > 1:
            raise ConfigError(
                "teacher.workdir, teacher.weights and teacher.random each name a teacher; give one of them"
            )
        if teacher.weights and teacher.network != "mmdit":
            raise ConfigError("teacher.weights holds an MMDiT; set teacher.network to 'mmdit'")
        if teacher.weights and teacher.text is not None:
            raise ConfigError("teacher.weights holds an MMDiT alone; leave teacher.text out")
        if config.output_weight and self.has_own_latents:
            raise ConfigError(
                "the teacher has latents of its own, so that velocities cannot be compared; set output_weight=0 and "
                "distil features alone, or give the teacher the student's latents"
            )
        ours, his = self.network_config.latent_channels, self.teacher_config.latent_channels
        if not self.has_own_latents and ours != his:
            raise ConfigError(
                f"the student's latents have {ours} channels and the teacher's {his}; they must be the same latents, "
                "or teacher.codec must say which the teacher's are"
            )
        if config.scaling.ratio == "batch" and self.config.microbatches > 1:
            raise ConfigError(
                f"scaling.ratio='batch' would be that of a microbatch, and there are {self.config.microbatches}; set "
                "microbatches=1, or scaling.ratio to 'running'"
            )
        if teacher.rollout_steps < 1:
            raise ConfigError(f"teacher.rollout_steps={teacher.rollout_steps}; give 1, or more to follow his flow")
        if len(config.student_taps) != len(config.teacher_taps):
            raise ConfigError(
                f"student_taps {config.student_taps} and teacher_taps {config.teacher_taps} are compared pair by pair; "
                "give as many of one as of the other"
            )
        if config.feature_weight and not config.student_taps:
            raise ConfigError("there are no features to compare; name student_taps, or set feature_weight=0")

    @property
    def has_own_latents(self) -> bool:
        """Whether the teacher's latents are not the student's."""
        return self.teacher_codec is not None

    def _projectors(self) -> list[ProjectorConfig]:
        """One for each pair of features, by their shapes, which every image size must agree upon."""
        config: TeachingConfig = self.config
        if not config.feature_weight:
            return []

        def at(size: tuple[int, int]) -> list[ProjectorConfig]:
            ours = tap_shapes(self.network, self.network_spec, self.latent_shape(size), config.student_taps)
            his = tap_shapes(self.teacher, self.teacher_spec, self.teacher_latent_shape(size), config.teacher_taps)
            pairs = zip(config.student_taps, config.teacher_taps, strict=True)
            return [ProjectorConfig.between(ours[a], his[b], config.projector_hidden) for a, b in pairs]

        first, *others = self.config.image_sizes
        pairs = at(first)
        for size in others:
            if at(size) != pairs:
                raise ConfigError(
                    f"the features of the student and of the teacher have another ratio of sizes at {size} than at "
                    f"{first}, and one projector serves both; change image_sizes"
                )
        return pairs

    def teacher_latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """`(h, w, c)` of the teacher's latent of an image size."""
        return self.latent_shape(size) if self.teacher_codec is None else self.teacher_codec.latent_shape(size)

    # --- the state, and what is not in it ---

    def init(self, key: jax.Array) -> TrainState:
        """As without a teacher, and the projectors and running means."""
        state = super().init(key)
        if not self.weights:
            return state
        projectors = {
            name: init(network, jax.random.fold_in(key, OWN_KEYS + i))
            for i, (name, network) in enumerate(self.projectors.items())
        }
        player = self._new_player({**state.players["model"].params, **projectors})
        means = {"means": new_means(tuple(self.weights), self.config.scaling)} if self._has_means else {}
        return state.replace(players={"model": player}, extra=means)

    @property
    def _has_means(self) -> bool:
        scaling = self.config.scaling
        return bool(self.weights) and scaling.alpha != "none" and scaling.ratio == "running"

    def warm_start(self, state: TrainState, earlier: Tree) -> TrainState:
        """As without a teacher; projectors begin anew unless the earlier stage had such of the same shapes."""
        new, old = state.players["model"].params, dict(earlier["model"])
        for name in self.projectors:
            if jax.tree.map(jnp.shape, old.get(name)) != jax.tree.map(jnp.shape, new[name]):
                old[name] = new[name]
        return super().warm_start(state, {"model": old})

    def frozen_spec(self) -> Tree:
        """As without a teacher, and `{"teacher": {his network, "text", "codec"}}`."""
        if not self.weights:
            return super().frozen_spec()
        teacher = {self.config.teacher.network: self.teacher_spec}
        if self.teacher_text is not None:
            teacher["text"] = spec_of(self.teacher_text)
        if self.teacher_codec is not None and (codec := self.teacher_codec.spec()):
            teacher["codec"] = codec
        return {**super().frozen_spec(), "teacher": teacher}

    def load_frozen(self, mesh: Mesh | None) -> Tree:
        """Reads the teacher, from a run or from published files, and what is frozen beside him."""
        spec, teacher = self.frozen_spec(), self.config.teacher
        if "teacher" in spec and teacher.workdir:
            self._check_run(_run_config(teacher.workdir))
        frozen = super().load_frozen(mesh)
        if "teacher" not in spec:
            return frozen
        wanted = dict(spec["teacher"])
        codec = {}
        if wanted.pop("codec", None) and self.teacher_codec is not None:
            codec = {"codec": load_codec(teacher.codec, self.teacher_codec, mesh)}
        rules = self._teacher_rules()
        if teacher.random:
            networks = {teacher.network: self.teacher, "text": self.teacher_text}
            found = draw_stand_ins({name: networks[name] for name in wanted}, rules, mesh)
        elif teacher.weights:
            found = {"mmdit": load_mmdit(teacher.weights, self.teacher_config, wanted["mmdit"], mesh)}
        elif teacher.workdir:
            found = load_run(teacher.workdir, wanted, mesh=mesh, rules=rules)
        else:
            raise ConfigError("there is no teacher: set teacher.workdir to a trained run, or teacher.weights")
        return {**frozen, "teacher": {**found, **codec}}

    def _check_run(self, run: Mapping[str, Any]) -> None:
        """Raises where the teacher's run, of which `run` is the config, is not what is said of him."""
        teacher = self.config.teacher
        if run.get("prediction", teacher.prediction) != teacher.prediction:
            raise ConfigError(
                f"the run {teacher.workdir!r} predicts {run['prediction']!r}; set teacher.prediction to that"
            )
        self._check_inputs(run)

    def _check_inputs(self, run: Mapping[str, Any]) -> None:
        """Raises where the teacher was trained on other latents or text states than he is given here."""
        config, teacher = self.config, self.config.teacher
        ours = dataclasses.asdict(teacher.codec or config.codec)
        if "codec" in run and _latents_of(run["codec"]) != _latents_of(ours):
            raise ConfigError(
                f"the run {teacher.workdir!r} has the latents {_latents_of(run['codec'])}, and here are "
                f"{_latents_of(ours)}; make them equal, or set teacher.codec to his and distil features alone"
            )
        if teacher.text is not None or "text_workdir" not in run:
            return
        if not run["text_workdir"]:
            raise ConfigError(
                f"the run {teacher.workdir!r} has trained a text encoder of its own; set teacher.text to its 'text'"
            )
        if not config.text_workdir or not _same_tokens(teacher.workdir, config.text_workdir):
            raise ConfigError(
                f"the run {teacher.workdir!r} reads the text encoder of {run['text_workdir']!r} and the student "
                f"{config.text_workdir or 'its own'!r}; set text_workdir to the same"
            )

    def load_for_generation(self, mesh: Mesh | None) -> Tree:
        """What is frozen beside the teacher, who is not asked when the student draws."""
        return super().load_frozen(mesh)

    @property
    def tokenizer_workdir(self) -> str:
        """A run's tokenizer goes with its text encoder; the teacher's, where he has one and the student's is new."""
        return super().tokenizer_workdir or (self.config.teacher.workdir if self.teacher_text is not None else "")

    def rules(self) -> Sequence[tuple[str, PartitionSpec]]:
        """Those of the teacher and, if it is to be split, of the student."""
        ours = super().rules() if self.config.shard_student else []
        return [*within("teacher", self._teacher_rules()), *ours]

    def _teacher_rules(self) -> list[tuple[str, PartitionSpec]]:
        text = [] if self.teacher_text is None else within("text", self.teacher_text.config.rules())
        return [*within(self.config.teacher.network, self.teacher_config.rules()), *text]

    # --- training ---

    def draw(self, frozen: Tree, batch: Tree, key: jax.Array, step: int | jax.Array = 0) -> Tree:
        """As without a teacher, and the teacher's latents and noise where they are not the student's."""
        drawn = super().draw(frozen, batch, key, step)
        if not self.weights or not self.has_own_latents:
            return drawn
        x_0 = self.teacher_latents(frozen, batch)
        eps = jax.random.normal(jax.random.fold_in(key, OWN_KEYS), x_0.shape)
        return {**drawn, "teacher_x_0": x_0, "teacher_eps": eps}

    def teacher_latents(self, frozen: Tree, batch: Tree) -> jax.Array:
        """The teacher's own clean latents of a batch."""
        assert self.teacher_codec is not None
        codec = self.teacher_codec.bind(frozen["teacher"].get("codec", {}))
        return codec.encode(from_uint8(batch["image"]))

    def teacher_context(self, params: Tree, drawn: Tree, context: TextContext) -> TextContext:
        """What the teacher attends to: `context`, the student's, unless he has a text encoder."""
        if self.teacher_text is None:
            return context
        return apply(self.teacher_text, params["teacher"]["text"], drawn["tokens"], drawn["mask"])

    def teacher_null_context(self, params: Tree) -> TextContext:
        """The same of the empty caption, `[1, ...]`."""
        null = {name: jnp.asarray(x)[None] for name, x in self._null_caption().items()}
        return self.teacher_context(params, null, self.condition(params, null))

    def ask_teacher(
        self, params: Tree, drawn: Tree, x_t: jax.Array, context: TextContext, taps: Sequence[str]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The teacher's velocity `[B, h, w, c]` at `x_t` (at his own latents, if he has such), and his features. No
        gradient passes."""
        teacher, t = self.config.teacher, drawn["t"]
        if self.has_own_latents:
            x_t = interpolate(drawn["teacher_x_0"], drawn["teacher_eps"], t)
        condition = self.teacher_context(params, drawn, context)

        def ask(
            x: jax.Array, t: jax.Array, c: TextContext, taps: Sequence[str] = ()
        ) -> tuple[jax.Array, dict[str, jax.Array]]:
            return predict(self.teacher, params["teacher"][teacher.network], x, t, c, teacher.prediction, taps)

        def steered(x: jax.Array, t: jax.Array, v: jax.Array) -> jax.Array:
            if teacher.guidance == 1:
                return v
            null = jax.tree.map(
                lambda empty, c: jnp.broadcast_to(empty, c.shape), self.teacher_null_context(params), condition
            )
            return guided(ask(x, t, null)[0], v, teacher.guidance)

        # Once for both: XLA does not see what two scans have in common.
        v, found = ask(x_t, t, condition, taps)
        if teacher.rollout_steps == 1:
            v = steered(x_t, t, v)
        else:
            # Along u in [1, 0] with time t u, an example begins at its own t: dx/du = t v. The mean of v on the way is
            # (x_t - x_0) / t, without the division.
            def slope(x: jax.Array, u: jax.Array, i: jax.Array, mean: jax.Array) -> tuple[jax.Array, jax.Array]:
                v = steered(x, t * u, ask(x, t * u, condition)[0])
                return expand_like(t, x) * v, mean + v / teacher.rollout_steps

            times = jnp.linspace(1.0, 0.0, teacher.rollout_steps + 1)
            _, v = sample(slope, x_t, times, carry=jnp.zeros_like(v))
        return jax.lax.stop_gradient((v, found))

    def examine(self, params: Tree, drawn: Tree) -> tuple[jax.Array, Tree, Examined]:
        """S of the flow matching loss and what the teacher says, `[B]`."""
        if not self.weights:
            return super().examine(params, drawn)
        config, t = self.config, drawn["t"]
        ours, his = (config.student_taps, config.teacher_taps) if "feature" in self.weights else ((), ())
        context = self.condition(params, drawn)
        x_t = interpolate(drawn["x_0"], drawn["eps"], t)
        v, features = self.predict_with_taps(params, x_t, t, context, ours)
        taught_v, taught = self.ask_teacher(params, drawn, x_t, context, his)
        losses = {TASK: flow_matching_loss(v, velocity(drawn["x_0"], drawn["eps"]))}
        if "output" in self.weights:
            losses["output"] = flow_matching_loss(v, taught_v)
        if "feature" in self.weights:
            pairs = zip(self.projectors.items(), ours, his, strict=True)
            distances = [
                feature_loss(apply(network, params[name], features[a], taught[b].shape[1:3]), taught[b])
                for (name, network), a, b in pairs
            ]
            losses["feature"] = sum(distances[1:], distances[0]) / len(distances)
        losses = {name: loss * self.time_weight(t) for name, loss in losses.items()}
        total = scaled(losses, self.weights, t, params.get("means", {}), config.scaling)
        found: dict[str, Any] = {"metrics": {f"loss/{name}": jnp.mean(loss) for name, loss in losses.items()}}
        if self._has_means:
            found["sums"] = bin_sums(losses, t, config.scaling)
        return total, found, Examined(x_t, v, context)

    def parts(self) -> Mapping[str, Part]:
        """Also "teacher": what he says of a batch, in as many parts as the student learns from."""

        def teacher(state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> Tree:
            params = {**frozen, **state.extra, **state.players["model"].params}
            taps = self.config.teacher_taps if "feature" in self.weights else ()

            def ask(drawn: Tree) -> Tree:
                x_t = interpolate(drawn["x_0"], drawn["eps"], drawn["t"])
                said = self.ask_teacher(params, drawn, x_t, self.condition(params, drawn), taps)
                return jax.tree.map(lambda x: jnp.mean(jnp.square(x)), said)

            drawn = self.draw(frozen, batch, key, state.step)
            return jax.lax.map(ask, split_microbatches(drawn, self.config.microbatches))

        return {**super().parts(), **({"teacher": teacher} if self.weights else {})}

    def report(self, extra: Tree, found: Tree) -> tuple[Tree, Metrics]:
        """The running means after this batch, and each loss by itself."""
        if self._has_means:
            # A mean over microbatches came back of what each had summed.
            sums = jax.tree.map(lambda x: self.config.microbatches * x, found["sums"])
            extra = {**extra, "means": update_means(extra["means"], sums, self.config.scaling)}
        return extra, found.get("metrics", {})


class Distillation(Distilled):
    """See the top of this file. Implements `training.recipe.Recipe`."""

    Config = DistillationConfig


def _run_config(workdir: epath.PathLike) -> dict[str, Any]:
    """The config of a run, as it was when trained; `{}` if it was trained without one, by `training.loop` alone."""
    path = epath.Path(workdir) / "config.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _latents_of(codec: Mapping[str, Any]) -> dict[str, Any]:
    """What a codec's config says of its latents, as JSON has it. Folders of weights are left out: runs are moved."""
    named = {"identity": ("scale", "shift"), "patch": ("patch", "scale", "shift", "frequency_scale")}
    return json.loads(json.dumps({name: codec.get(name) for name in ("kind", *named.get(codec["kind"], ()))}))


def _same_tokens(*workdirs: epath.PathLike) -> bool:
    """Whether runs have one tokenizer, as those with one text encoder do wherever they were moved to; where it cannot
    be told they do."""
    files = [epath.Path(workdir) / "tokenizer.json" for workdir in workdirs]
    return not all(file.exists() for file in files) or len({file.read_bytes() for file in files}) == 1


def tap_shapes(
    network: Network, spec: Tree, latent: tuple[int, ...], taps: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """`{tap: [1, h, w, C]}` of a UNet or an MMDiT at a latent of shape `(h, w, c)`."""
    inputs = network.config.input_spec(1, *latent[:2])
    _, found = jax.eval_shape(lambda params, *args: apply(network, params, *args, taps=taps), spec, *inputs)
    return {tap: leaf.shape for tap, leaf in found.items()}


RECIPE = Distillation
