"""TextCraftor: rewards of a sampler's own images tune a trained model, prompts alone (arXiv 2403.18978).

    z_T -> ... -> z_K  with the original weights, no gradient;   z_K -> ... -> x_0^  with the tuned ones
    L = - sum_i gamma_i R_i(decode(x_0^), p)                                                  (section 3.2, eq. 7)

What is tuned is the text encoder, or the network once an encoder is; whole, or through adapters. Gradients run through
the last K steps of the sampler, each of which is computed again on the way back, so that a step of K keeps one latent.
Both halves of guidance read the tuned encoder. One reward is the constraint: how well an image fits its prompt in the
eyes of a CLIP of its own, without which all prompts soon lead to one image.

The paper's baseline, `form="direct"`, rewards the image that one step predicts from noised data (section 3.1).
"""

from __future__ import annotations

import functools
import logging
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from snapgen_jax.diffusion.path import expand_like, interpolate
from snapgen_jax.diffusion.schedules import Level
from snapgen_jax.diffusion.stages import Stages
from snapgen_jax.evaluation.interfaces import EvaluatorSpec
from snapgen_jax.inputs.interfaces import Networks, StoredInputs, TokenizerSpec
from snapgen_jax.networks.lora import A, B, adapted, init_adapters, merge
from snapgen_jax.networks.module import Network, Platform, build, init
from snapgen_jax.networks.registry import TextEncoderConfig
from snapgen_jax.recipes._assembly import Specs, specs_of, taken_from
from snapgen_jax.recipes._base import base_tokenizers, load_base
from snapgen_jax.recipes._encoder_mix import ORIGINAL, TUNED, Original, blended, load_tuned, shares_of
from snapgen_jax.recipes._reward_config import RewardSamplingConfig, RewardTuningConfig
from snapgen_jax.recipes._rewards import CONSTRAINT, Rewards
from snapgen_jax.recipes._run import run_config
from snapgen_jax.recipes._sampling import SamplingConfig, first_state, initial_noise, noise_shape, sample_steps
from snapgen_jax.recipes._tuned_export import mixed_plan, switched_plan
from snapgen_jax.recipes.flow_matching import FlowMatching
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.exports import ExportPlan
from snapgen_jax.training.recipe import Metrics, Part, Use
from snapgen_jax.training.state import TrainState

Tree = Any
ADAPTERS = "adapters"
NAME = "reward_tuning"

log = logging.getLogger(__name__)


class RewardTuning(FlowMatching):
    """See the top of this file. Implements `training.recipe.Recipe`.

    Attributes:
        rewards: those that count.
        encoders: the roles of the text encoders of the inputs.
        encoder: that of the one that is tuned, or may be.
        tuned: the roles whose weights learn.
        differing: the roles that tuned and original model have each in a form of its own.
    """

    Config = RewardTuningConfig

    def __init__(self, config: RewardTuningConfig, platform: Platform):
        """`platform` is the one compiled for.

        Raises:
            ConfigError: the inputs make no images or read no text, or a reward does not fit them.
            ValueError: the network does not fit what it is fed, or a target of the adapters finds nothing.
        """
        super().__init__(config, platform)
        self.encoders = self._encoders()
        self.encoder = config.encoder or self.encoders[0]
        self.tuned = (self.encoder,) if config.tunes_text else (self.role,)
        self.differing = (*self.tuned, *([self.encoder] if config.tuned_text else []))
        self.trains: Mapping[str, tuple[str, ...]] = {"model": (ADAPTERS,) if config.by_adapters else self.tuned}
        self.rewards = Rewards(config.used(), self.inputs.tokenizers(), platform)
        if config.by_adapters:
            adapted(config.lora, self._tuned_shapes())
        if config.form == "sampled" and "validation_loss" in config.evaluation.names:
            raise ConfigError(
                "evaluation names validation_loss, which reads images, and this run reads prompts alone; name 'rewards'"
            )
        if CONSTRAINT in config.leave_out and jax.process_index() == 0:
            log.warning(
                "the constraint is left out: rewards rise while images may lose what their prompts say, and each "
                "other's variety. Compare compositional and diversity before and after"
            )

    def _encoders(self) -> list[str]:
        """The roles of the text encoders, the one that is tuned among them."""
        inputs, config = self.inputs, self.config
        if isinstance(inputs, StoredInputs):
            raise ConfigError(
                f"inputs of the kind {inputs.config.kind!r} decode no latents and may hold no text encoder; name "
                "'captions', 'clip_captions' or 'encoders', which run them inside the step"
            )
        kinds = typing.get_args(TextEncoderConfig)
        known = [role for role, network in inputs.networks().items() if isinstance(network.config, kinds)]
        if not known:
            raise ConfigError(f"inputs of the kind {inputs.config.kind!r} bring no text encoder")
        if config.encoder and config.encoder not in known:
            raise ConfigError(f"encoder={config.encoder!r}; the inputs bring {', '.join(known)}")
        return known

    def _tuned_shapes(self) -> dict[str, Tree]:
        networks = super().networks()
        return {role: build(networks[role].config)[1] for role in self.tuned}

    # --- networks ---

    def networks(self) -> dict[str, Network]:
        """As for flow matching; the original ones of those that are tuned; the rewards; and the other encoders."""
        own = super().networks()
        return {
            **own,
            **{original(role): own[role] for role in self.differing},
            **self.rewards.networks(),
            **{other(name): own[self.encoder] for name in self.config.others},
        }

    def weights(self, params: Tree, frozen: Tree) -> dict[str, Tree]:
        """The networks, tuned ones by their names, the originals beside them; and the adapters."""
        model = params["model"]
        if not self.config.by_adapters:
            return {**frozen, **model}
        kept = {role: frozen[original(role)] for role in self.tuned}
        return {**frozen, **merge(kept, model[ADAPTERS], self.config.lora.scale), ADAPTERS: model[ADAPTERS]}

    def original(self, networks: Networks) -> dict[str, Tree]:
        """The networks before they were tuned."""
        return {**networks, **{role: networks[original(role)] for role in self.differing}}

    def first_params(self, key: jax.Array) -> dict[str, Tree]:
        """What "model" holds before its first update: drawn, until `warm_start`; adapters that change nothing."""
        if self.config.by_adapters:
            return {ADAPTERS: init_adapters(self.config.lora, self._tuned_shapes(), key)}
        networks = super().networks()
        return {role: init(networks[role], jax.random.fold_in(key, i)) for i, role in enumerate(self.tuned)}

    def warm_start(self, state: TrainState, earlier: Tree) -> TrainState:
        """Starts from the weights of the trained run, or from those or the adapters of an earlier run of this recipe.

        Raises:
            ConfigError: it holds other weights, or is an earlier run of this recipe that tuned something else.
        """
        self._check_start()
        new, old = state.players["model"].params, earlier.get("model", {})
        if self.config.by_adapters and ADAPTERS not in old:
            return state
        params = taken_from(new, {role: old[role] for role in new if role in old})
        return state.replace(players={"model": self.new_player(params)})

    def _check_start(self) -> None:
        """Raises where the run to start from tuned what this one does not go on with: it would be lost unsaid."""
        config = self.config
        run = run_config(config.init_from) if config.init_from else {}
        if run.get("recipe") != NAME:
            return
        was = run.get("trains", "text")
        encoder = run.get("encoder") or self.encoders[0]
        if was == config.trains and (not config.tunes_text or encoder == self.encoder):
            return
        base = config.base or run.get("base") or run.get("init_from")
        text = was in ("text", "text_adapters")
        if text and not config.tunes_text:
            advice = f"set tuned_text to it and init_from to the base, {base!r}"
        else:
            same = f"set trains={was!r}" + (f" and encoder={encoder!r}" if text else "")
            advice = f"{same} to go on with it, or set init_from to the base, {base!r}, to begin anew"
        held = f"a tuned text encoder, {encoder!r}" if text else "a tuned network"
        raise ConfigError(
            f"init_from={config.init_from!r} holds {held} (trains={was!r}), which trains={config.trains!r} does not go "
            f"on with; {advice}"
        )

    def _frozen_roles(self) -> list[str]:
        return [role for role in self.networks() if role not in self.tuned]

    def frozen_spec(self) -> Tree:
        """`{role: shapes}`: the original networks, the rewards, and the other encoders."""
        return specs_of(self.networks(), self._frozen_roles())

    def load_frozen(self, mesh: Mesh | None, use: Use = "train") -> Tree:
        """Reads the original networks from `base`, what the inputs bring from where they say, an encoder that was tuned
        before, and to train the rewards.

        Raises:
            ConfigError: there is no base, or it is not what the config says; nothing to start from; or a reward has no
                weights.
        """
        config, base = self.config, self._base()
        if use == "train" and not (config.init_from or config.by_adapters):
            raise ConfigError("there are no weights to tune: set init_from to the trained run")
        if base and run_config(base).get("recipe") == NAME:
            raise ConfigError(
                f"{base!r} is a run of this recipe, which holds what it tuned alone: set base to the run that it tuned"
            )
        read = load_base(base, FlowMatching(config, self.platform), mesh)
        frozen = {role: tree for role, tree in read.items() if role not in self.tuned}
        frozen |= {original(role): read[role] for role in self.differing}
        if config.tuned_text:
            frozen[self.encoder] = self._load_tuned(config.tuned_text, read, mesh)
        frozen |= {other(name): self._load_tuned(run, read, mesh) for name, run in config.others.items()}
        if use == "train":
            frozen |= self.rewards.load(mesh, self.tokenizers())
        return frozen

    def _load_tuned(self, workdir: str, read: Mapping[str, Tree], mesh: Mesh | None) -> Tree:
        network = super().networks()[self.encoder]
        spec = specs_of({self.encoder: network}, [self.encoder])[self.encoder]
        own = base_tokenizers(self._base(), self.inputs.tokenizers()).values()
        trained = [tokenizer.workdir for tokenizer in own if tokenizer.kind == "trained"]
        original = Original(read[self.encoder], trained[0] if trained else "")
        return load_tuned(workdir, self.encoder, spec, original, mesh, network.config.rules())

    def _base(self) -> str:
        return self.config.base or self.config.init_from

    def rules(self) -> Sequence[tuple[str, PartitionSpec]]:
        """Adapters are replicated; the networks lie as they say."""
        return [(f"/({A}|{B})$", PartitionSpec()), *super().rules()]

    # --- shapes ---

    def batch_specs(self) -> Specs:
        """The prompts of the inputs and of rewards that have a tokenizer of their own, one bucket of the first image
        size; for the direct form those of the inputs beside them."""
        own, more = self.inputs.batch_specs(), self.rewards.specs(self.config.batch_size)
        if self.config.form == "direct":
            return {bucket: {**specs, **more} for bucket, specs in own.items()}
        bucket, specs = next(iter(own.items()))
        read = dict.fromkeys((*self.inputs.conditions(), *self.rewards.arrays()))
        return {bucket: {**{name: specs[name] for name in read if name in specs}, **more}}

    def tokenizers(self) -> Mapping[str, TokenizerSpec]:
        """Those of the inputs, where the base run trained one, that; and those of rewards."""
        return base_tokenizers(self._base(), {**super().tokenizers(), **self.rewards.tokenizers()})

    # --- training ---

    def draw(self, networks: Tree, batch: Tree, key: jax.Array, step: int | jax.Array = 0) -> Tree:
        """Everything random about one global batch, beside its token ids: `keys` `[B]`, and from these `noise` `[B,
        *noise_shape]`; or for the direct form `x_0` and `eps` `[B, ...]` and `level`, a `Level` of `[B]`."""
        told = {name: batch[name] for name in next(iter(self.batch_specs().values())) if name != "image"}
        size = next(iter(told.values())).shape[0]
        keys_key, time_key = jax.random.split(key)
        keys = jax.random.split(keys_key, size)
        if self.config.form == "sampled":
            sampling = self.config.sampling
            shape = noise_shape(self.inputs.latent_shape(sampling.image_size), sampling)
            return {"batch": told, "keys": keys, "noise": initial_noise(keys, shape)}
        x_0 = self.inputs.clean(networks, batch)
        level, eps = self.draw_level(time_key, (size,), step), initial_noise(keys, x_0.shape[1:])
        return {"batch": told, "keys": keys, "x_0": x_0, "eps": eps, "level": level}

    def loss(self, networks: Tree, drawn: Tree, extra: Tree) -> tuple[jax.Array, Tree]:
        """Minus the weighted sum of the rewards, in the mean; and each of them."""
        del extra
        latent = self._predicted(networks, drawn) if self.config.form == "direct" else self.roll_out(networks, drawn)
        rewards = self.rewards(networks, self.pictures(networks, latent), drawn["batch"])
        total = jnp.mean(self.rewards.total(rewards))
        return -total, {"reward": total, **{f"reward/{name}": jnp.mean(value) for name, value in rewards.items()}}

    def roll_out(self, networks: Tree, drawn: Tree, tuned_steps: int | None = None) -> jax.Array:
        """The latents `[B, ...]` that drawn noise leads to, with gradients to the tuned weights of the last K steps.

        Args:
            networks: `{role: parameters}`, as from `weights`.
            drawn: as from `draw`.
            tuned_steps: K; None for that of the config.
        """
        last = self.config.backprop_steps if tuned_steps is None else tuned_steps
        before, after = (
            self._encoded(model, drawn["batch"], drawn["keys"]) for model in (self.original(networks), networks)
        )
        return self._switched(networks, drawn["noise"], before, after, self.config.sampling, last, remat="steps")

    def _encoded(self, networks: Networks, conditions: Tree, keys: jax.Array) -> tuple[Any, Any]:
        """What a model attends to of prompts and of none; inside of the loss, since encoders are trained."""
        told = self.inputs.draw_condition(networks, conditions, keys[0], {})  # drops nothing, so it draws nothing
        return self.inputs.condition(networks, told), self.inputs.null_condition(networks)

    def _switched(
        self,
        networks: Networks,
        noise: jax.Array,
        before: tuple[Any, Any],
        after: tuple[Any, Any],
        options: SamplingConfig,
        last: int,
        remat: Literal["none", "steps"] = "none",
    ) -> jax.Array:
        """The latents `[B, ...]` of a sampler that leads by the original model and, in its last steps, by the tuned
        one; `before` and `after` are what each attends to, with a prompt and without."""
        schedule, first = self.config.schedule, options.steps - last
        x = first_state(schedule, noise, options)
        if first:
            call = functools.partial(self._call, self.original(networks))
            x, _ = sample_steps(call, schedule, x, (0, first), noise, *before, options)
        x = jax.lax.stop_gradient(x)
        if last:
            call = functools.partial(self._call, networks)
            x, _ = sample_steps(call, schedule, x, (first, options.steps), noise, *after, options, remat=remat)
        return x

    def _call(
        self, networks: Networks, x_t: jax.Array, level: Level, i: jax.Array, carry: Any, condition: Any
    ) -> tuple[jax.Array, Any]:
        # Before the conversion to a velocity, so that steps are joined by the sum of the velocities alone.
        seen = jax.lax.stop_gradient(x_t) if self.config.stop_input_gradient else x_t
        return self.denoise(networks, seen, level, i, carry, condition, None)

    def parts(self) -> Mapping[str, Part]:
        """ "draw", as for flow matching; and "roll_out", the sampler without the way back."""
        if self.config.form == "direct":
            return super().parts()

        def roll_out(state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> Tree:
            networks = self.current(state, frozen)
            return self.roll_out(networks, self.draw(networks, batch, key, state.step))

        return {**super().parts(), "roll_out": roll_out}

    def _predicted(self, networks: Tree, drawn: Tree) -> jax.Array:
        """The latents that one step predicts from noised data, `x_t - t v`."""
        x_t = interpolate(drawn["x_0"], drawn["eps"], drawn["level"].t)
        condition, _ = self._encoded(networks, drawn["batch"], drawn["keys"])
        v, _ = self.denoiser(networks[self.role], x_t, drawn["level"], condition)
        return x_t - expand_like(drawn["level"].t, x_t) * v

    def pictures(self, networks: Networks, latent: jax.Array) -> jax.Array:
        """Images `[B, H, W, 3]` float32 in [0, 1]. What is cut off passes its gradient: an area that is too white
        would otherwise never be told so."""
        codec = self.inputs.codec(networks)
        images = jax.checkpoint(codec.decode)(latent).astype(jnp.float32) / 2 + 0.5
        return images + jax.lax.stop_gradient(jnp.clip(images, 0, 1) - images)

    def report(self, extra: Tree, aux: Tree) -> tuple[Tree, Metrics]:
        """The weighted sum, and each reward."""
        return extra, aux

    # --- use ---

    def stages(self, options: RewardSamplingConfig) -> Stages:
        """As for flow matching, by the tuned model; by the original one up to a step, and with several encoders, as the
        options say.

        Raises:
            ConfigError: an encoder is not known.
        """
        shares = self._shares(options)
        stages = super().stages(options)
        if self._is_original(options, shares):
            return {
                name: lambda networks, given, stage=stage: stage(self.original(networks), given)
                for name, stage in stages.items()
            }
        if options.last_steps == options.steps and set(shares) == {TUNED}:
            return stages

        def encoders(networks: Tree, given: Tree) -> Tree:
            told, keys = given["conditions"], given["keys"]
            parts = {name: self._encoded(self._with_encoder(networks, name), told, keys) for name in shares}
            condition, null = (blended({name: pair[i] for name, pair in parts.items()}, shares) for i in (0, 1))
            before = self._encoded(self.original(networks), told, keys)
            begun = stages["encoders"](networks, given)
            return {"noise": begun["noise"], "condition": condition, "null": null, "before": before}

        def steps(networks: Tree, given: Tree) -> Tree:
            after, noise = (given["condition"], given["null"]), given["noise"]
            latent = self._switched(networks, noise, given["before"], after, options, options.last_steps)
            return {"latent": latent, "noise": noise}

        return {"encoders": encoders, "steps": steps, "decoder": stages["decoder"]}

    def _shares(self, options: RewardSamplingConfig) -> dict[str, float]:
        """`{encoder: its share}` of the options."""
        shares = shares_of(options.encoder_mix)
        if self.encoder not in self.differing and (named := set(shares) & {ORIGINAL}):
            raise ConfigError(
                f"encoder_mix={options.encoder_mix!r} names {named.pop()!r}, and this run tuned the network with the "
                "original encoder; leave encoder_mix out. tuned_steps=0 draws by the original network"
            )
        if unknown := [name for name in shares if name not in (ORIGINAL, TUNED, *self.config.others)]:
            known = ", ".join((ORIGINAL, TUNED, *self.config.others))
            raise ConfigError(
                f"encoder_mix={options.encoder_mix!r}: there is no encoder {unknown[0]!r}, only {known}; add it by "
                "`others` of the config, or --encoder=NAME=WORKDIR"
            )
        return shares

    def _is_original(self, options: RewardSamplingConfig, shares: Mapping[str, float]) -> bool:
        """Whether the options ask for the images of the original model."""
        return not options.last_steps or (set(shares) == {ORIGINAL} and self.differing == (self.encoder,))

    def _place(self, name: str) -> str:
        """The role of an encoder that a mix names."""
        return {TUNED: self.encoder, ORIGINAL: original(self.encoder)}.get(name) or other(name)

    def _with_encoder(self, networks: Networks, name: str) -> dict[str, Tree]:
        return {**networks, self.encoder: networks[self._place(name)]}

    # --- measuring and leaving ---

    def score(self, params: Tree, frozen: Tree, batch: Tree) -> dict[str, jax.Array]:
        """`{name: [B]}` of given images: each reward, and "total", their weighted sum.

        Args:
            params: of all players.
            frozen: with the rewards, as to train.
            batch: `image` uint8 `[B, H, W, 3]`, and the token ids of a batch.
        """
        images = batch["image"].astype(jnp.float32) / 255
        rewards = self.rewards(self.weights(params, frozen), images, batch)
        return {**rewards, "total": self.rewards.total(rewards)}

    def evaluators(self) -> Sequence[EvaluatorSpec]:
        """Those that `config.evaluation` names; and "unchanged", which at the end holds every frozen network to the
        files that it was read from."""
        named = [spec for spec in super().evaluators() if spec.name != "unchanged"]
        return [*named, EvaluatorSpec("unchanged", function=self.load_frozen)]

    def exports(self) -> ExportPlan:
        """As for flow matching, by the tuned weights; with a mix of encoders in one file, and with two contexts where
        the original encoder leads up to a step.

        Raises:
            ConfigError: the options ask for the original model, for two networks, or for a change of contexts under
                Heun's method.
        """
        options: RewardSamplingConfig = self.config.sampling
        shares = self._shares(options)
        if self._is_original(options, shares):
            raise ConfigError(
                f"tuned_steps={options.tuned_steps} and encoder_mix={options.encoder_mix!r} are the original model; "
                f"export that run, {self._base()!r}"
            )
        switches = options.last_steps < options.steps
        if switches and self.role in self.differing:
            raise ConfigError(
                f"tuned_steps={options.tuned_steps} of {options.steps} steps needs two networks in a bundle; export "
                f"with --tuned_steps={options.steps}, where the tuned one leads in all steps"
            )
        if switches and options.method == "heun":
            raise ConfigError(
                f"sampling.method='heun' calls the network at the end of a step too, there still with the condition of "
                f"that step, and a bundle has one for each time: it would follow another path where tuned_steps="
                f"{options.tuned_steps} of {options.steps} changes between them. Export with --method=euler or "
                f"--method=renoise, or with --tuned_steps={options.steps}"
            )
        plan = super().exports()
        if set(shares) != {TUNED}:
            plan = mixed_plan(plan, self.encoder, {self._place(name): share for name, share in shares.items()})
        if switches:
            plan = switched_plan(super().exports(), plan, self.encoder, original(self.encoder), options)
        return plan


def original(role: str) -> str:
    """The role of a network as it was before it was tuned."""
    return f"original/{role}"


def other(name: str) -> str:
    """The role of a further tuned encoder."""
    return f"other/{name}"


RECIPE = RewardTuning
