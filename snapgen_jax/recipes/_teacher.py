"""A network to learn from: frozen, an argument of the step, never differentiated and never in a checkpoint.

A full-step teacher knows the velocity at any time. A few-step one, such as Stable Diffusion 3.5 Large Turbo, was
trained to jump to the data from a few times: there alone it knows something, and its velocity is no score.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from snapgen_jax.bounds import FINITE, at_least, check
from snapgen_jax.diffusion.guidance import guided, guided_from, null_like
from snapgen_jax.diffusion.path import expand_like, interpolate
from snapgen_jax.diffusion.samplers import sample
from snapgen_jax.diffusion.schedules import FlowSchedule, Level, Schedule
from snapgen_jax.inputs.captions import same_tokens
from snapgen_jax.inputs.interfaces import Inputs, Networks, TokenizerSpec
from snapgen_jax.inputs.registry import InputsConfig
from snapgen_jax.networks.eight_bit_network import as_trained, in_precision
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.module import Network, Platform, build, for_platform, frozen_spec
from snapgen_jax.networks.registry import DenoiserConfig
from snapgen_jax.networks.rules import rules_of
from snapgen_jax.recipes._assembly import Specs, merged_specs, merged_tokenizers, specs_of, trained_roles
from snapgen_jax.recipes._run import check_output, run_config
from snapgen_jax.recipes._sampling import SamplingConfig, sampling_grid
from snapgen_jax.systems.denoiser import Denoiser, Prediction
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.weights.folder import is_weights_folder
from snapgen_jax.weights.frozen import draw_stand_ins, in_eight_bits, load_mmdit, load_run

Tree = Any
TEACHER = "teacher"
FEW_STEP_RECIPE = "adversarial"  # whose runs are few-step generators
DISTILLED_RECIPE = "step_distillation"  # whose runs know their velocity at the times of their own sampling alone
SAME_TIME = 1e-3  # times that differ by less are one
FP8_CAPABILITY = 8.9  # of NVIDIA GPUs, from which on they multiply e4m3: Ada, Hopper and later
Taken = Literal["condition", "latent"]
Precision = Literal["compute", "int8", "fp8"]


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """The network to learn from: what it is, and where its weights are.

    Attributes:
        workdir: a trained run, of which the averaged weights are taken.
        weights: in place of a run, the folder `transformer/` of a published Stable Diffusion 3.5, or one that `snapgen
            weights export` made of a run.
        random: in place of either, networks as they are drawn: a run to try speed and memory with. They teach nothing.
        network, prediction, schedule: as for `flow_matching`; equal to those of the run.
        inputs: what the teacher is fed, where that differs from the student's: another text encoder, stored states of
            its own encoders, other latents. They read the same batch, and drop the conditions of the same examples.
            None for the student's. A text encoder that was trained in the teacher's run (`text_workdir=""`) is read
            from there. Their `image_sizes` are the student's.
        takes: what of its own `inputs` the teacher takes; the rest is the student's. With latents of its own only
            features can be compared: the same image and the same time, each with noise of its own.
        guidance: scale of classifier-free guidance in the target, so that the student need not be guided.
        rollout_steps: 1 takes the velocity at x_t. More follow the teacher's flow from x_t to the data in so many Euler
            steps, and take their mean velocity, which leads there in one: a target that is sharp even at much noise.
        precision: of the products of its tokens with its weights: "compute" is the dtype in which all networks compute,
            "int8" and "fp8" are eight bits (see `networks/eight_bits.py`). Its weights are rounded when they are read.
            Attention, norms, modulation, embeddings and output stay as they are.
        few_step_times: of a few-step teacher: the times at which its own sampler asks it, from noise down; () for a
            full-step one. Weights do not tell which they are. A run does: it is held to what is said here.
    """

    workdir: str = ""
    weights: str = ""
    random: bool = False
    network: DenoiserConfig = MMDiTConfig.preset("shapes")
    prediction: Prediction = "velocity"
    schedule: Schedule = FlowSchedule()
    inputs: InputsConfig | None = None
    takes: tuple[Taken, ...] = ("condition",)
    guidance: float = 1.0
    rollout_steps: int = 1
    precision: Precision = "compute"
    few_step_times: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check(self, guidance=FINITE, rollout_steps=at_least(1))


class Teacher:
    """A teacher beside a student.

    Attributes:
        name: of its field of the recipe's config, and the beginning of its roles.
        places: `{its network: role}`: where among all networks each of `networks()` is.
    """

    def __init__(
        self,
        config: TeacherConfig,
        student: Inputs,
        schedule: Schedule,
        batch_size: int,
        platform: Platform,
        name: str = TEACHER,
        beside: Teacher | None = None,
    ):
        """
        Args:
            config: what it is.
            student: what the student is fed.
            schedule: the student's noise schedule.
            batch_size: examples in a global batch.
            platform: the one compiled for.
            name: see the attribute.
            beside: another teacher of the same student; the networks that both have are held once, as that one's.

        Raises:
            ConfigError: the fields do not fit each other.
        """
        config = _of_run(config, name)
        self.config, self.student, self.name = config, student, name
        self.knows_levels = config.schedule == schedule
        self.role = config.network.kind
        self._check_precision(platform)
        network = in_precision(for_platform(config.network, platform), config.precision)
        self.denoiser = Denoiser(build(network)[0], config.prediction, config.schedule)
        self.inputs: Inputs | None = None
        if config.inputs is not None:
            sizes = {"image_sizes": student.config.image_sizes}
            self.inputs = dataclasses.replace(config.inputs, **sizes).build(batch_size, platform)
        self.places = {role: f"{name}/{role}" for role in self._own_networks()}
        if beside is not None:
            self._check_beside(beside)
            self.places |= {
                role: beside.places[role]
                for role in self.places
                if role in beside.places and self._origin(role) == beside._origin(role)
            }
        self._check()

    def _check_precision(self, platform: Platform) -> None:
        """Raises where its network cannot compute in the precision that is asked for, or the platform cannot."""
        precision, network = self.config.precision, self.config.network
        if precision == "fp8" and platform == "tpu":
            raise ConfigError(
                f"{self.name}.precision='fp8' is for NVIDIA GPUs (Ada, Hopper and later): XLA for TPU multiplies e4m3 "
                f"as bfloat16. Set {self.name}.precision to 'int8', at which v5e, v5p and v6e multiply twice as fast"
            )
        if precision != "compute" and not network.EIGHT_BITS:
            raise ConfigError(
                f"{self.name}.precision={precision!r} is of linear layers of tokens, of which a network of the kind "
                f"{network.kind!r} names none; set {self.name}.precision to 'compute'"
            )

    def _check_devices(self, mesh: Mesh | None) -> None:
        """Raises where the GPUs at hand do not multiply e4m3."""
        device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
        capability = getattr(device, "compute_capability", None)
        if self.config.precision == "fp8" and capability is not None and float(capability) < FP8_CAPABILITY:
            raise ConfigError(
                f"{self.name}.precision='fp8' needs a GPU of compute capability {FP8_CAPABILITY} or more; "
                f"{device.device_kind} has {capability}; set {self.name}.precision to 'int8' or 'compute'"
            )

    def _check(self) -> None:
        config, name = self.config, self.name
        if config.weights and self.role != "mmdit":
            raise ConfigError(f"{name}.weights holds an MMDiT; set {name}.network.kind to 'mmdit'")
        if config.weights and self.inputs is not None and trained_roles(self.inputs):
            roles = ", ".join(trained_roles(self.inputs))
            raise ConfigError(
                f"{name}.weights holds an MMDiT alone, and no {roles}; let {name}.inputs name a run of it"
            )
        if config.few_step_times and config.rollout_steps > 1:
            raise ConfigError(
                f"{name}.rollout_steps={config.rollout_steps} follows a flow, which a few-step teacher has none of; "
                f"set it to 1, or {name}.few_step_times to ()"
            )
        if config.inputs is None and "latent" in config.takes:
            raise ConfigError(f"{name}.takes names latents, and there are no {name}.inputs to take them from; set them")
        channels = self.latent_shape()[-1]
        if channels != config.network.latent_channels:
            raise ConfigError(
                f"the teacher's latents have {channels} channels and {name}.network.latent_channels is "
                f"{config.network.latent_channels}; they must be the student's latents, or {name}.inputs must say "
                f"which the teacher's are and {name}.takes must name them"
            )

    def _check_beside(self, other: Teacher) -> None:
        for where in ("workdir", "weights"):
            said, same = getattr(self.config, where), getattr(other.config, where)
            if said and said == same and self.config.few_step_times != other.config.few_step_times:
                raise ConfigError(
                    f"{self.name}.{where} and {other.name}.{where} are both {said!r}, which {self.name}.few_step_times="
                    f"{self.config.few_step_times} and {other.name}.few_step_times={other.config.few_step_times} take "
                    "for two networks; name the other one's, or let both say the same"
                )

    def check_times(self, times: Sequence[float] | None) -> None:
        """Raises `ConfigError` where it is a few-step teacher and is to be asked at other times than its own.

        Args:
            times: those at which the student learns; None for any in [0, 1].
        """
        own = self.config.few_step_times
        if not own:
            return
        foreign = [t for t in times or () if min(abs(t - u) for u in own) > SAME_TIME]
        if times is None or foreign:
            asked = "any time" if times is None else ", ".join(f"{t:.3f}" for t in foreign)
            raise ConfigError(
                f"{self.name} is a few-step teacher, which knows the times {own} and would be asked at {asked}; use "
                f"recipe 'adversarial' with sampling.times of these, or a full-step teacher"
            )

    @property
    def has_own_latents(self) -> bool:
        """Whether the teacher's latents are not the student's."""
        return self.inputs is not None and "latent" in self.config.takes

    @property
    def _own_condition(self) -> Inputs | None:
        return self.inputs if "condition" in self.config.takes else None

    # --- shapes and networks ---

    def latent_shape(self, size: tuple[int, int] | None = None) -> tuple[int, ...]:
        """Shape of the teacher's latent of an image size."""
        assert self.inputs is not None or not self.has_own_latents
        source = self.inputs if self.inputs is not None and self.has_own_latents else self.student
        return source.latent_shape(size)

    def batch_specs(self, student: Specs) -> Specs:
        """Those of the student, and what the teacher reads beside them."""
        return student if self.inputs is None else merged_specs(student, self.inputs.batch_specs())

    def tokenizers(self) -> Mapping[str, TokenizerSpec]:
        """Those of the student, and of a text encoder of its own: where that was trained in the teacher's run, the
        run's tokenizer goes with it."""
        if self._own_condition is None:
            return self.student.tokenizers()
        own = {
            name: dataclasses.replace(spec, workdir=self.config.workdir)
            if spec.kind == "trained" and not spec.workdir
            else spec
            for name, spec in self._own_condition.tokenizers().items()
        }
        return merged_tokenizers(self.student.tokenizers(), own)

    def _own_networks(self) -> dict[str, Network]:
        brought = {} if self.inputs is None else self.inputs.networks()
        latent = self.has_own_latents
        wanted = {
            role: network
            for role, network in brought.items()
            if (latent if role.partition("/")[0] == "codec" else self._own_condition is not None)
        }
        return {self.role: self.denoiser.network, **wanted}

    def _origin(self, role: str) -> Any:
        """Of a network of its own: where two teachers agree on it, the weights are the same."""
        config, network = self.config, self._own_networks()[role].config
        if self.inputs is not None and role in self.inputs.pretrained():
            return network, self.inputs.config
        return network, config.workdir, config.weights, config.random, config.few_step_times

    def networks(self) -> dict[str, Network]:
        """`{role: network}`: its network, and what its inputs bring."""
        return {self.places[role]: network for role, network in self._own_networks().items()}

    def _of(self, networks: Networks) -> dict[str, Tree]:
        """The parameters of its networks by the names they have among themselves, as far as they are given."""
        return {role: networks[place] for role, place in self.places.items() if place in networks}

    def params(self, networks: Networks) -> Tree:
        """The parameters of its denoiser."""
        return networks[self.places[self.role]]

    def load(self, mesh: Mesh | None, held: Collection[str] = (), distilled: bool = False) -> dict[str, Tree]:
        """Reads all of `networks()` onto the mesh, from a run or from published files, or draws them: `{role:
        parameters}` without the roles that are `held` already. It may be a run of step distillation where it is
        `distilled`: the caller then asks it at the times of its own sampling alone.

        Raises:
            ConfigError: no teacher is named, or it is not what the config says.
        """
        config = self.config
        networks = {role: n for role, n in self._own_networks().items() if self.places[role] not in held}
        self._check_tokenizers()
        if config.workdir:
            self._check_run(run_config(config.workdir), distilled)
        elsewhere = () if self.inputs is None else tuple(r for r in self.inputs.pretrained() if r in networks)
        own = {role: network for role, network in networks.items() if role not in elsewhere}
        rules = rules_of(networks)
        rounded = own.get(self.role) if config.precision != "compute" else None
        if rounded is not None:
            self._check_devices(mesh)
            own[self.role] = as_trained(rounded)
        if not own:
            read = {}
        elif config.random:
            read = draw_stand_ins(own, rules, mesh)
        elif config.weights and isinstance(config.network, MMDiTConfig):
            spec = specs_of(own, own)[self.role]
            read = {self.role: load_mmdit(config.weights, config.network, spec, mesh)}
        elif config.workdir:
            read = load_run(config.workdir, specs_of(own, own), mesh=mesh, rules=rules)
        else:
            raise ConfigError(f"there is no {self.name}: set {self.name}.workdir to a trained run, or its weights")
        if rounded is not None:
            read[self.role] = in_eight_bits(read[self.role], rounded, mesh)
        brought = {} if self.inputs is None else self.inputs.load(elsewhere, mesh)
        return {self.places[role]: tree for role, tree in {**read, **brought}.items()}

    def _check_tokenizers(self) -> None:
        """Raises where a text encoder of its own would read the token ids of another tokenizer than it knows."""
        if self._own_condition is None:
            return
        merged = self.tokenizers()
        for name, spec in self._own_condition.tokenizers().items():
            known, used = spec.workdir or self.config.workdir, merged[name].workdir
            if known and used and not same_tokens(known, used):
                raise ConfigError(
                    f"the teacher's text encoder knows the tokenizer of {known!r} and the student's that of {used!r}, "
                    f"and both read {name!r}; use text encoders that were trained with one tokenizer"
                )

    def _check_run(self, run: Mapping[str, Any], distilled: bool) -> None:
        """Raises where the teacher's run, of which `run` is the config, is not what the config here says of it."""
        config = self.config
        check_output(config.workdir, run, config.prediction, config.schedule, f"{self.name}.")
        if run.get("recipe") == DISTILLED_RECIPE and not distilled:
            raise ConfigError(
                f"the run {config.workdir!r} is of {DISTILLED_RECIPE!r} and knows the times of its own sampling alone, "
                f"and {self.name} is asked at others; set {self.name}.workdir to the run that it was distilled from"
            )
        self._check_steps(run)
        if not isinstance(inputs := run.get("inputs"), Mapping):
            return
        own = () if self.inputs is None else config.takes
        self.student.check_run(config.workdir, inputs, [part for part in ("latent", "condition") if part not in own])
        if self.inputs is not None:
            # A text encoder that comes from the run itself fits it.
            given = trained_roles(self.inputs)
            self.inputs.check_run(config.workdir, inputs, [part for part in own if part == "latent" or not given])

    def _check_steps(self, run: Mapping[str, Any]) -> None:
        """Raises where a run is a few-step generator and the config here does not say so, or the other way round."""
        if "recipe" not in run:
            return
        config, times = self.config, ()
        if run["recipe"] == FEW_STEP_RECIPE:
            sampling = {name: run["sampling"][name] for name in ("steps", "shift", "times") if name in run["sampling"]}
            sampling["times"] = tuple(sampling.get("times", ()))
            grid = sampling_grid(config.schedule, SamplingConfig(**sampling))
            times = tuple(round(t, 6) for t in grid.t[:-1].tolist())
        said = config.few_step_times
        if len(said) != len(times) or any(abs(a - b) > SAME_TIME for a, b in zip(said, times, strict=True)):
            what = f"a few-step generator of the times {times}" if times else "a full-step network"
            raise ConfigError(
                f"the run {config.workdir!r} is {what}, and {self.name}.few_step_times is {said}; set it to {times}"
                + (", which a score cannot have, or name another run" if times else "")
            )

    # --- in the step ---

    def draw(self, networks: Networks, batch: Tree, key: jax.Array, kept: Tree) -> Tree:
        """Latents and noise of its own, and its own condition, where it has such. `kept` is the student's."""
        drawn: dict[str, Any] = {}
        if self.inputs is None:
            return drawn
        own = self._of(networks)
        if self.has_own_latents:
            x_0 = self.inputs.clean(own, batch)
            drawn |= {"x_0": x_0, "eps": jax.random.normal(key, x_0.shape)}
        if self._own_condition is not None:
            drawn["condition"] = self.inputs.draw_condition(own, batch, jax.random.fold_in(key, 1), kept)
        return drawn

    def condition(self, networks: Networks, drawn: Tree, student: Any) -> Any:
        """What the teacher attends to: what the student does, unless it has a condition of its own."""
        inputs = self._own_condition
        return student if inputs is None else inputs.condition(self._of(networks), drawn["condition"])

    def _null_condition(self, networks: Networks) -> Any:
        if self._own_condition is None:
            return self.student.null_condition(networks)
        return self._own_condition.null_condition(self._of(networks))

    def ask(
        self,
        networks: Networks,
        drawn: Tree,
        x_t: jax.Array,
        level: Level,
        student: Any,
        taps: Sequence[str] = (),
        guidance: jax.Array | None = None,
        is_guided: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The teacher's velocity `[B, ...]` and features at a point of the path. No gradient passes.

        Args:
            networks: `{role: parameters}`.
            drawn: of `draw`.
            x_t: where; with latents of its own, the point of those at the same time is asked instead.
            level: the time, of the student's schedule; under another schedule the teacher is asked at the same t.
            student: what the student attends to.
            taps: names of the features.
            guidance: scale of each example `[B]`, in place of the config's.
            is_guided: whether it is guided at all, a bool of no axes; None where `guidance` alone says so. Where it is
                not, nobody is asked without the condition.
        """
        config, t = self.config, jnp.asarray(level.t)
        if self.has_own_latents:
            x_t = interpolate(drawn["x_0"], drawn["eps"], t)
        condition = self.condition(networks, drawn, student)
        params = self.params(networks)
        # A level's native time is that of the student's schedule.
        where: Any = level if self.knows_levels else t

        def steered(x: jax.Array, where: Any, v: jax.Array) -> jax.Array:
            if guidance is None and config.guidance == 1:
                return v

            def by_both() -> jax.Array:
                v_null = self.denoiser(params, x, where, null_like(self._null_condition(networks), condition))[0]
                return guided(v_null, v, config.guidance) if guidance is None else guided_from(v, v_null, guidance)

            return by_both() if is_guided is None else jax.lax.cond(is_guided, by_both, lambda: v)

        # Once for both: XLA does not see what two scans have in common.
        v, features = self.denoiser(params, x_t, where, condition, taps=taps)
        if config.rollout_steps == 1:
            v = steered(x_t, where, v)
        else:
            # Along u in [1, 0] with time t u, an example begins at its own t: dx/du = t v. The mean of v on the way is
            # (x_t - x_0) / t, without the division.
            def slope(x: jax.Array, u: jax.Array, i: jax.Array, mean: jax.Array) -> tuple[jax.Array, jax.Array]:
                del i
                v = steered(x, t * u, self.denoiser(params, x, t * u, condition)[0])
                return expand_like(t, x) * v, mean + v / config.rollout_steps

            times = jnp.linspace(1.0, 0.0, config.rollout_steps + 1)
            _, v = sample(slope, x_t, times, carry=jnp.zeros_like(v))
        return jax.lax.stop_gradient((v, features))


def _of_run(config: TeacherConfig, name: str) -> TeacherConfig:
    """The config, in which a folder of a run's weights stands where a run does.

    Raises:
        ConfigError: it names several teachers.
    """
    if bool(config.workdir) + bool(config.weights) + config.random > 1:
        raise ConfigError(f"{name}.workdir, {name}.weights and {name}.random each name a teacher; give one of them")
    if config.weights and is_weights_folder(config.weights):
        return dataclasses.replace(config, workdir=config.weights, weights="")
    return config


def tap_shapes(denoiser: Denoiser, size: tuple[int, ...], taps: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """`{tap: [1, h, w, C]}` of a network at a latent of height and width `size[:2]`."""
    spec = frozen_spec(denoiser.network)
    inputs = denoiser.network.config.input_spec(1, *size[:2])

    def features(params: Tree, x: jax.Array, time: jax.Array, context: Any) -> dict[str, jax.Array]:
        del time
        return denoiser(params, x, jnp.zeros(1), context, taps=taps)[1]

    return {tap: leaf.shape for tap, leaf in jax.eval_shape(features, spec, *inputs).items()}
