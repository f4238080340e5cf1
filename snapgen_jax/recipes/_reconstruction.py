"""What the recipes of decoders share: images made again, against a perceptual distance and a patch discriminator.

    L = w_1 |x - y| + w_2 (x - y)^2 + w_p LPIPS(x, y) + w_a a L_G(y) + terms of the recipe's own

y is the image that the networks under training make, x the image they should have made, and a the adaptive weight of
VQGAN (Esser et al. 2021, eq. 7). Two players: "model", whose networks make y, and "discriminator", which joins after a
delay, and is not there at all where w_a is 0.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from snapgen_jax.evaluation.interfaces import EvaluationConfig, EvaluatorSpec
from snapgen_jax.losses.adversarial import adaptive_weight, hinge_discriminator_loss, hinge_generator_loss
from snapgen_jax.networks.autoencoder import AutoencoderConfig
from snapgen_jax.networks.codec import Codec, from_uint8, to_uint8
from snapgen_jax.networks.lpips import LPIPSConfig
from snapgen_jax.networks.module import Platform, apply, build, for_platform, frozen_spec, init
from snapgen_jax.networks.patch_discriminator import PatchDiscriminatorConfig
from snapgen_jax.networks.tiny_decoder import TinyDecoderConfig
from snapgen_jax.training.optimizer import (
    OptimizerConfig,
    clip_by_joint_norm,
    learning_rate_schedule,
    make_optimizer,
    new_player,
    step_player,
)
from snapgen_jax.training.recipe import ExportPlan, Metrics, Part
from snapgen_jax.training.state import Player, TrainState
from snapgen_jax.weights.frozen import load_perceptual

Tree = Any
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ReconstructionLoss:
    """How much each term counts; one of weight 0 is not computed.

    Attributes:
        l1, l2: of the absolute and the squared difference of pixels in [-1, 1].
        perceptual: of the perceptual distance.
        adversarial: of the generator's hinge loss.
        adversarial_from_steps: updates before the discriminator joins; until then it neither learns nor judges.
        balance: "adaptive" makes the adversarial gradient at the last layer as long as that of the other terms, before
            `adversarial` scales it; "none" leaves it as it is.
    """

    l1: float = 0.0
    l2: float = 1.0
    perceptual: float = 1.0
    adversarial: float = 0.1
    adversarial_from_steps: int = 0
    balance: Literal["adaptive", "none"] = "adaptive"


@dataclasses.dataclass(frozen=True)
class ReconstructionConfig:
    """What the recipes of decoders have in common.

    Attributes:
        batch_size: images in a global batch.
        microbatches: 1; the adaptive weight is that of a whole batch.
        train_steps: updates in the run; where a decaying learning rate ends.
        image_sizes: (height, width) of each aspect bucket, in pixels.
        loss: the terms.
        perceptual: the network of the perceptual distance.
        perceptual_weights: folder of its published weights (see `weights.maps.lpips`); "" draws them from a fixed key.
        discriminator: the network of the discriminator.
        optimizer, discriminator_optimizer: of the two players.
        ema_decay: of the averaged weights of the model; 0 keeps no average.
    """

    batch_size: int = 16
    microbatches: int = 1
    train_steps: int = 1000
    image_sizes: tuple[tuple[int, int], ...] = ((32, 32),)
    loss: ReconstructionLoss = ReconstructionLoss()
    perceptual: LPIPSConfig = LPIPSConfig.preset("shapes")
    perceptual_weights: str = ""
    discriminator: PatchDiscriminatorConfig = PatchDiscriminatorConfig.preset("shapes")
    optimizer: OptimizerConfig = OptimizerConfig()
    discriminator_optimizer: OptimizerConfig = OptimizerConfig(b1=0.5)
    ema_decay: float = 0.999
    evaluation: EvaluationConfig = EvaluationConfig(during=("reconstruction",), final=("reconstruction",))


class Reconstruction:
    """A recipe without its networks. A subclass gives `new_params`, `draw`, `make`, `last_layer`,
    `decoders` and `trained_codec`."""

    last_layer: Path

    def __init__(self, config: Any, platform: Platform):
        """`platform` is the one compiled for.

        Raises:
            ValueError: the config asks for gradient accumulation.
        """
        if config.microbatches != 1:
            raise ValueError(
                f"microbatches={config.microbatches}: the adaptive weight needs the batch in one part; set it to 1 and "
                "lower batch_size"
            )
        self.config, self.loss = config, config.loss
        self.perceptual, _ = build(for_platform(config.perceptual, platform))
        self.discriminator, _ = build(for_platform(config.discriminator, platform))
        self.optimizers: dict[str, optax.GradientTransformation] = {
            "model": make_optimizer(config.optimizer, config.train_steps),
            "discriminator": make_optimizer(config.discriminator_optimizer, config.train_steps),
        }
        self.learning_rate = learning_rate_schedule(config.optimizer, config.train_steps)

    # --- what a subclass gives ---

    def new_params(self, key: jax.Array) -> Tree:
        """The model's networks, drawn."""
        raise NotImplementedError

    def draw(self, frozen: Tree, batch: Tree, key: jax.Array) -> Tree:
        """All that is random about a batch, and all that no gradient passes: at least `image` `[B, H, W, 3]`, which is
        to be made."""
        raise NotImplementedError

    def make(self, params: Tree, drawn: Tree) -> tuple[jax.Array, dict[str, tuple[float, jax.Array]], Tree]:
        """The images made, `[B, H, W, 3]`; terms of its own, `{name: (weight, [B])}`; and what `measure` takes."""
        raise NotImplementedError

    def measure(self, params: Tree, found: Tree, step: jax.Array) -> Tree:
        """The model's parameters with those that are measured and not learnt."""
        del found, step
        return params

    def decoders(self, params: Tree, frozen: Tree, images: jax.Array) -> dict[str, jax.Array]:
        """`{name: [B, H, W, 3]}`: images in [-1, 1] through each decoder that the recipe knows."""
        raise NotImplementedError

    def trained_codec(self, params: Tree, frozen: Tree) -> Codec:
        """The codec that is trained, as it is so far."""
        raise NotImplementedError

    # --- shapes ---

    def batch_specs(self) -> dict[str, Tree]:
        """One bucket per image size: `image` uint8 `[B, H, W, 3]`."""
        b = self.config.batch_size
        return {
            f"{h}x{w}": {"image": jax.ShapeDtypeStruct((b, h, w, 3), jnp.uint8)} for h, w in self.config.image_sizes
        }

    def init(self, key: jax.Array) -> TrainState:
        """Draws the networks of both players."""
        model_key, discriminator_key = jax.random.split(key)
        players = {"model": self._new_player("model", self.new_params(model_key))}
        if self.loss.adversarial:
            players["discriminator"] = self._new_player("discriminator", init(self.discriminator, discriminator_key))
        return TrainState(jnp.int32(0), jnp.int32(0), players, {})

    def warm_start(self, state: TrainState, earlier: Tree) -> TrainState:
        """Starts from `{player: weights}` of an earlier run; optimizers, average and schedule begin anew."""

        def started(name: str, player: Player) -> Player:
            if name not in earlier:
                return player
            taken = {part: earlier[name][part] for part in player.params}
            return self._new_player(name, jax.tree.map(lambda a, b: b.astype(a.dtype), player.params, taken))

        return state.replace(players={name: started(name, player) for name, player in state.players.items()})

    def _new_player(self, name: str, params: Tree) -> Player:
        ema = name == "model" and self.config.ema_decay > 0
        return new_player(params, self.optimizers[name], ema=ema)

    def frozen_spec(self) -> Tree:
        """`{"perceptual"}`, where that term counts."""
        return {"perceptual": frozen_spec(self.perceptual)} if self.loss.perceptual else {}

    def load_frozen(self, mesh: Mesh | None) -> Tree:
        """Reads the perceptual distance, or draws it where no weights are given."""
        if not self.loss.perceptual:
            return {}
        return {"perceptual": load_perceptual(self.perceptual, self.config.perceptual_weights, mesh)}

    def rules(self) -> Sequence[tuple[str, PartitionSpec]]:
        """Those of the networks."""
        return [
            *AutoencoderConfig().rules(),
            *TinyDecoderConfig().rules(),
            *self.config.discriminator.rules(),
            *self.config.perceptual.rules(),
        ]

    # --- training ---

    def task(
        self, frozen: Tree, drawn: Tree, made: jax.Array, own: dict[str, tuple[float, jax.Array]]
    ) -> tuple[jax.Array, Metrics]:
        """The sum of all terms but the adversarial one, and each by itself, unweighted."""
        loss, difference = self.loss, made - drawn["image"]
        terms = dict(own)
        if loss.l1:
            terms["l1"] = loss.l1, jnp.abs(difference)
        if loss.l2:
            terms["l2"] = loss.l2, jnp.square(difference)
        if loss.perceptual:
            terms["perceptual"] = loss.perceptual, apply(self.perceptual, frozen["perceptual"], made, drawn["image"])
        means = {name: (weight, jnp.mean(values)) for name, (weight, values) in terms.items()}
        total = functools.reduce(jnp.add, (weight * mean for weight, mean in means.values()))
        return total, {name: mean for name, (_, mean) in means.items()}

    def judge(self, discriminator: Tree, images: jax.Array) -> jax.Array:
        """Logits of the discriminator."""
        return apply(self.discriminator, discriminator, images)

    def balance(self, params: Tree, discriminator: Tree, frozen: Tree, drawn: Tree) -> jax.Array:
        """The adaptive weight: the ratio of the gradients of the task and of the generator's loss at the last layer."""
        if self.loss.balance == "none":
            return jnp.float32(1)

        def task(last: jax.Array) -> jax.Array:
            made, own, _ = self.make(_with_leaf(params, self.last_layer, last), drawn)
            return self.task(frozen, drawn, made, own)[0]

        def adversarial(last: jax.Array) -> jax.Array:
            made, _, _ = self.make(_with_leaf(params, self.last_layer, last), drawn)
            return jnp.mean(hinge_generator_loss(self.judge(discriminator, made)))

        last = functools.reduce(lambda tree, name: tree[name], self.last_layer, params)
        return adaptive_weight(optax.global_norm(jax.grad(task)(last)), optax.global_norm(jax.grad(adversarial)(last)))

    def update(self, state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> tuple[TrainState, Metrics]:
        """One step of the model and, once it has joined, of the discriminator, on the same images."""
        drawn, players = self.draw(frozen, batch, key), dict(state.players)
        model, other = players["model"], players.get("discriminator")
        weight = jnp.float32(0)
        if other is not None:
            joined = state.step >= self.loss.adversarial_from_steps
            weight = jnp.where(joined, self.balance(model.params, other.params, frozen, drawn), 0.0)

        def objective(params: Tree) -> tuple[jax.Array, tuple[jax.Array, Metrics, Tree]]:
            made, own, found = self.make(params, drawn)
            total, terms = self.task(frozen, drawn, made, own)
            if other is not None:
                terms["adversarial"] = jnp.mean(hinge_generator_loss(self.judge(other.params, made)))
                total = total + weight * self.loss.adversarial * terms["adversarial"]
            return total, (made, terms, found)

        (total, (made, metrics, found)), grads = jax.value_and_grad(objective, has_aux=True)(model.params)
        grads, norm = clip_by_joint_norm(grads, self.config.optimizer.clip_norm)
        model = dataclasses.replace(model, params=self.measure(model.params, found, state.step))
        players["model"] = step_player(model, grads, self.optimizers["model"], state.step, self.config.ema_decay)
        rate = jnp.asarray(self.learning_rate(state.step))
        metrics |= {"loss": total, "grad_norm/model": norm, "learning_rate": rate}
        if other is not None:
            player, loss, norm = self._step_discriminator(other, drawn["image"], made, state.step)
            players["discriminator"] = jax.tree.map(lambda new, old: jnp.where(joined, new, old), player, other)
            metrics |= {"discriminator": loss, "adaptive_weight": weight, "grad_norm/discriminator": norm}
        return state.replace(players=players), metrics

    def parts(self) -> Mapping[str, Part]:
        """ "draw", all that comes before the losses: what frozen networks make of a batch."""
        return {"draw": lambda state, frozen, batch, key: self.draw(frozen, batch, key)}

    def _step_discriminator(
        self, player: Player, real: jax.Array, made: jax.Array, step: jax.Array
    ) -> tuple[Player, jax.Array, jax.Array]:
        def objective(params: Tree) -> jax.Array:
            return jnp.mean(hinge_discriminator_loss(self.judge(params, real), self.judge(params, made)))

        loss, grads = jax.value_and_grad(objective)(player.params)
        grads, norm = clip_by_joint_norm(grads, self.config.discriminator_optimizer.clip_norm)
        return step_player(player, grads, self.optimizers["discriminator"], step, 0.0), loss, norm

    # --- use ---

    def generate(self, params: Tree, frozen: Tree, conditions: Tree, key: jax.Array) -> dict[str, jax.Array]:
        """`image` uint8 `[B, H, W, 3]` of the conditions -> its `latent` and the `image` made of that."""
        del key
        codec = self.trained_codec(params, frozen)
        latent = codec.encode(from_uint8(conditions["image"]))
        return {"image": to_uint8(codec.decode(latent)), "latent": latent}

    def reconstruct(self, params: Tree, frozen: Tree, batch: Tree, key: jax.Array) -> dict[str, jax.Array]:
        """What the evaluator "reconstruction" compares: `original` and the output of each decoder, uint8
        `[B, H, W, 3]`, and its perceptual distance `lpips/<decoder>` `[B]`."""
        del key
        images = from_uint8(batch["image"])
        found = {"original": batch["image"]}
        for name, made in self.decoders(params["model"], frozen, images).items():
            found[name] = to_uint8(made)
            if "perceptual" in frozen:
                found[f"lpips/{name}"] = apply(self.perceptual, frozen["perceptual"], from_uint8(found[name]), images)
        return found

    def evaluators(self) -> Sequence[EvaluatorSpec]:
        """Those that `config.evaluation` names."""
        when = self.config.evaluation
        parts = {"reconstruction": {"function": self.reconstruct}}
        return [when.spec(name, **parts.get(name, {})) for name in when.names]

    def exports(self) -> ExportPlan:
        """A decoder draws nothing by itself.

        Raises:
            ValueError: always, with what to do instead.
        """
        raise ValueError(
            "a decoder alone makes no image from a prompt; export the generator whose latents it decodes, with this "
            "run as its decoder: snapgen export --workdir=GENERATOR --decoder=THIS"
        )


def _with_leaf(tree: Tree, path: Path, leaf: jax.Array) -> Tree:
    """The tree with another leaf at a path."""
    name, *rest = path
    return {**tree, name: _with_leaf(tree[name], tuple(rest), leaf) if rest else leaf}
