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

from snapgen_jax.bounds import SHARE, at_least, check
from snapgen_jax.evaluation.interfaces import EvaluationConfig, EvaluatorSpec
from snapgen_jax.inputs.images import ImagesConfig
from snapgen_jax.inputs.interfaces import TokenizerSpec
from snapgen_jax.inputs.registry import InputsConfig
from snapgen_jax.losses.adversarial import adaptive_weight, hinge_discriminator_loss, hinge_generator_loss
from snapgen_jax.networks.codec import Codec, from_uint8, to_uint8
from snapgen_jax.networks.lpips import LPIPSConfig
from snapgen_jax.networks.module import Network, Platform, apply, build, for_platform, init
from snapgen_jax.networks.patch_discriminator import PatchDiscriminatorConfig
from snapgen_jax.networks.rules import rules_of, within
from snapgen_jax.recipes._assembly import Specs, frozen_roles, specs_of, taken_from
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.exports import ExportPlan
from snapgen_jax.training.optimizer import (
    OptimizerConfig,
    learning_rate_schedule,
    make_optimizer,
    new_player,
    step_player,
)
from snapgen_jax.training.recipe import Metrics, NoOptions, Part, Use
from snapgen_jax.training.state import Player, TrainState
from snapgen_jax.weights.frozen import load_perceptual

Tree = Any
Path = tuple[str, ...]
DISCRIMINATOR, PERCEPTUAL = "discriminator", "perceptual"


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

    def __post_init__(self) -> None:
        weight = at_least(0)
        check(self, l1=weight, l2=weight, perceptual=weight, adversarial=weight, adversarial_from_steps=at_least(0))


@dataclasses.dataclass(frozen=True)
class ReconstructionConfig:
    """What the recipes of decoders have in common.

    Attributes:
        batch_size: images in a global batch.
        microbatches: 1; the adaptive weight is that of a whole batch.
        train_steps: updates in the run; where a decaying learning rate ends.
        inputs: images, and the codec where the method has a frozen one.
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
    inputs: InputsConfig = ImagesConfig()
    loss: ReconstructionLoss = ReconstructionLoss()
    perceptual: LPIPSConfig = LPIPSConfig.preset("shapes")
    perceptual_weights: str = ""
    discriminator: PatchDiscriminatorConfig = PatchDiscriminatorConfig.preset("shapes")
    optimizer: OptimizerConfig = OptimizerConfig()
    discriminator_optimizer: OptimizerConfig = OptimizerConfig(b1=0.5)
    ema_decay: float = 0.999
    evaluation: EvaluationConfig = EvaluationConfig(during=("reconstruction",), final=("reconstruction",))

    def __post_init__(self) -> None:
        check(self, batch_size=at_least(1), train_steps=at_least(1), ema_decay=SHARE)


class Reconstruction:
    """A recipe without its networks. A subclass gives `model`, `last_layer`, `draw`, `make`, `decoders` and `codec`."""

    model: Mapping[str, Network]  # what the player of that name holds, by role
    last_layer: Path
    options = NoOptions()

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
        self.inputs = config.inputs.build(config.batch_size, platform)
        self.perceptual, _ = build(for_platform(config.perceptual, platform))
        self.discriminator, _ = build(for_platform(config.discriminator, platform))
        self.trains = {
            "model": tuple(self.model),
            **({DISCRIMINATOR: (DISCRIMINATOR,)} if self.loss.adversarial else {}),
        }
        self.optimizers: dict[str, optax.GradientTransformation] = {
            "model": make_optimizer(config.optimizer, config.train_steps),
            "discriminator": make_optimizer(config.discriminator_optimizer, config.train_steps),
        }
        self.learning_rate = learning_rate_schedule(config.optimizer, config.train_steps)

    # --- what a subclass gives ---

    def draw(self, networks: Tree, batch: Tree, key: jax.Array) -> Tree:
        """All that is random about a batch, and all that no gradient passes: at least `image` `[B, H, W, 3]`, which is
        to be made."""
        raise NotImplementedError

    def make(self, networks: Tree, drawn: Tree) -> tuple[jax.Array, dict[str, tuple[float, jax.Array]], Tree]:
        """The images made, `[B, H, W, 3]`; terms of its own, `{name: (weight, [B])}`; and what `measure` takes."""
        raise NotImplementedError

    def measure(self, params: Tree, found: Tree, step: jax.Array) -> Tree:
        """The model's parameters with those that are measured and not learnt."""
        del found, step
        return params

    def decoders(self, networks: Tree, images: jax.Array) -> dict[str, jax.Array]:
        """`{name: [B, H, W, 3]}`: images in [-1, 1] through each decoder that the recipe knows."""
        raise NotImplementedError

    def codec(self, params: Tree, frozen: Tree) -> Codec:
        """The codec that is trained, as it is so far."""
        raise NotImplementedError

    # --- networks ---

    def networks(self) -> dict[str, Network]:
        """`{role: network}` of all that the step uses."""
        return {
            **self.model,
            **({DISCRIMINATOR: self.discriminator} if self.loss.adversarial else {}),
            **({PERCEPTUAL: self.perceptual} if self.loss.perceptual else {}),
            **self.inputs.networks(),
        }

    def weights(self, params: Tree, frozen: Tree) -> dict[str, Tree]:
        """The networks as they are: `{role: parameters}`."""
        opponent = {DISCRIMINATOR: params[DISCRIMINATOR]} if DISCRIMINATOR in params else {}
        return {**frozen, **params["model"], **opponent}

    def init(self, key: jax.Array) -> TrainState:
        """Draws the networks of both players."""
        model_key, discriminator_key = jax.random.split(key)
        params = {role: init(network, model_key) for role, network in self.model.items()}
        players = {"model": self._new_player("model", params)}
        if self.loss.adversarial:
            players[DISCRIMINATOR] = self._new_player(DISCRIMINATOR, init(self.discriminator, discriminator_key))
        return TrainState(jnp.int32(0), jnp.int32(0), players, {})

    def warm_start(self, state: TrainState, earlier: Tree) -> TrainState:
        """Starts from `{player: weights}` of an earlier run; optimizers, average and schedule begin anew."""

        def started(name: str, player: Player) -> Player:
            if name not in earlier:
                return player
            return self._new_player(name, taken_from(player.params, earlier[name]))

        return state.replace(players={name: started(name, player) for name, player in state.players.items()})

    def _new_player(self, name: str, params: Tree) -> Player:
        ema = name == "model" and self.config.ema_decay > 0
        return new_player(params, self.optimizers[name], ema=ema)

    def frozen_spec(self) -> Tree:
        """`{role: shapes}` of the networks that no player trains."""
        networks = self.networks()
        return specs_of(networks, frozen_roles(networks, self.trains))

    def load_frozen(self, mesh: Mesh | None, use: Use = "train") -> Tree:
        """Reads the inputs' codec, where there is one, and the perceptual distance, which judges trained images too."""
        del use
        frozen = self.inputs.load(self.inputs.pretrained(), mesh)
        if self.loss.perceptual:
            frozen[PERCEPTUAL] = load_perceptual(self.perceptual, self.config.perceptual_weights, mesh)
        return frozen

    def rules(self) -> Sequence[tuple[str, PartitionSpec]]:
        """Those of the networks."""
        # The discriminator is a player by itself, whose tree has no role above it.
        alone = within(DISCRIMINATOR, self.discriminator.config.rules()) if self.loss.adversarial else []
        return [*rules_of(self.networks()), *alone]

    # --- shapes ---

    def batch_specs(self) -> Specs:
        """Those of the inputs."""
        return self.inputs.batch_specs()

    def tokenizers(self) -> Mapping[str, TokenizerSpec]:
        """Those of the inputs."""
        return self.inputs.tokenizers()

    def conditions(self) -> tuple[str, ...]:
        """The images that are made again."""
        return ("image",)

    # --- training ---

    def task(
        self, networks: Tree, drawn: Tree, made: jax.Array, own: dict[str, tuple[float, jax.Array]]
    ) -> tuple[jax.Array, Metrics]:
        """The sum of all terms but the adversarial one, and each by itself, unweighted."""
        loss, difference = self.loss, made - drawn["image"]
        terms = dict(own)
        if loss.l1:
            terms["l1"] = loss.l1, jnp.abs(difference)
        if loss.l2:
            terms["l2"] = loss.l2, jnp.square(difference)
        if loss.perceptual:
            terms["perceptual"] = loss.perceptual, apply(self.perceptual, networks[PERCEPTUAL], made, drawn["image"])
        means = {name: (weight, jnp.mean(values)) for name, (weight, values) in terms.items()}
        total = functools.reduce(jnp.add, (weight * mean for weight, mean in means.values()))
        return total, {name: mean for name, (_, mean) in means.items()}

    def judge(self, networks: Tree, images: jax.Array) -> jax.Array:
        """Logits of the discriminator."""
        return apply(self.discriminator, networks[DISCRIMINATOR], images)

    def balance(self, networks: Tree, drawn: Tree) -> jax.Array:
        """The adaptive weight: the ratio of the gradients of the task and of the generator's loss at the last layer."""
        if self.loss.balance == "none":
            return jnp.float32(1)

        def task(last: jax.Array) -> jax.Array:
            made, own, _ = self.make(_with_leaf(networks, self.last_layer, last), drawn)
            return self.task(networks, drawn, made, own)[0]

        def adversarial(last: jax.Array) -> jax.Array:
            made, _, _ = self.make(_with_leaf(networks, self.last_layer, last), drawn)
            return jnp.mean(hinge_generator_loss(self.judge(networks, made)))

        last = functools.reduce(lambda tree, name: tree[name], self.last_layer, networks)
        return adaptive_weight(optax.global_norm(jax.grad(task)(last)), optax.global_norm(jax.grad(adversarial)(last)))

    def update(self, state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> tuple[TrainState, Metrics]:
        """One step of the model and, once it has joined, of the discriminator, on the same images."""
        players = dict(state.players)
        params = {name: player.params for name, player in players.items()}
        networks = self.weights(params, frozen)
        drawn = self.draw(networks, batch, key)
        model, other = players["model"], players.get(DISCRIMINATOR)
        weight = jnp.float32(0)
        if other is not None:
            joined = state.step >= self.loss.adversarial_from_steps
            weight = jnp.where(joined, self.balance(networks, drawn), 0.0)

        def objective(trained: Tree) -> tuple[jax.Array, tuple[jax.Array, Metrics, Tree]]:
            networks = self.weights({**params, "model": trained}, frozen)
            made, own, found = self.make(networks, drawn)
            total, terms = self.task(networks, drawn, made, own)
            if other is not None:
                terms["adversarial"] = jnp.mean(hinge_generator_loss(self.judge(networks, made)))
                total = total + weight * self.loss.adversarial * terms["adversarial"]
            return total, (made, terms, found)

        (total, (made, metrics, found)), grads = jax.value_and_grad(objective, has_aux=True)(model.params)
        players["model"], norm = step_player(
            model.replace(params=self.measure(model.params, found, state.step)),
            grads,
            self.optimizers["model"],
            state.step,
            clip_norm=self.config.optimizer.clip_norm,
            ema_decay=self.config.ema_decay,
        )
        rate = jnp.asarray(self.learning_rate(state.step))
        metrics |= {"loss": total, "grad_norm/model": norm, "learning_rate": rate}
        if other is not None:
            player, loss, norm = self._step_discriminator(other, drawn["image"], made, state.step)
            players[DISCRIMINATOR] = jax.tree.map(lambda new, old: jnp.where(joined, new, old), player, other)
            metrics |= {"discriminator": loss, "adaptive_weight": weight, "grad_norm/discriminator": norm}
        return state.replace(players=players), metrics

    def parts(self) -> Mapping[str, Part]:
        """ "draw", all that comes before the losses: what frozen networks make of a batch."""

        def draw(state: TrainState, frozen: Tree, batch: Tree, key: jax.Array) -> Tree:
            params = {name: player.params for name, player in state.players.items()}
            return self.draw(self.weights(params, frozen), batch, key)

        return {"draw": draw}

    def _step_discriminator(
        self, player: Player, real: jax.Array, made: jax.Array, step: jax.Array
    ) -> tuple[Player, jax.Array, jax.Array]:
        def objective(params: Tree) -> jax.Array:
            networks = {DISCRIMINATOR: params}
            return jnp.mean(hinge_discriminator_loss(self.judge(networks, real), self.judge(networks, made)))

        loss, grads = jax.value_and_grad(objective)(player.params)
        optimizer, clip_norm = self.optimizers[DISCRIMINATOR], self.config.discriminator_optimizer.clip_norm
        player, norm = step_player(player, grads, optimizer, step, clip_norm=clip_norm)
        return player, loss, norm

    # --- use ---

    def generate(
        self, params: Tree, frozen: Tree, conditions: Tree, keys: jax.Array, options: NoOptions
    ) -> dict[str, jax.Array]:
        """`image` uint8 `[B, H, W, 3]` of the conditions -> its `latent` and the `image` made of that."""
        del keys, options
        codec = self.codec(params, frozen)
        latent = codec.encode(from_uint8(conditions["image"]))
        return {"image": to_uint8(codec.decode(latent)), "latent": latent}

    def reconstruct(self, params: Tree, frozen: Tree, batch: Tree, key: jax.Array) -> dict[str, jax.Array]:
        """What the evaluator "reconstruction" compares: `original` and the output of each decoder, uint8
        `[B, H, W, 3]`, and its perceptual distance `lpips/<decoder>` `[B]`."""
        del key
        networks, images = self.weights(params, frozen), from_uint8(batch["image"])
        found = {"original": batch["image"]}
        for name, made in self.decoders(networks, images).items():
            found[name] = to_uint8(made)
            if PERCEPTUAL in networks:
                found[f"lpips/{name}"] = apply(self.perceptual, networks[PERCEPTUAL], from_uint8(found[name]), images)
        return found

    def evaluators(self) -> Sequence[EvaluatorSpec]:
        """Those that `config.evaluation` names."""
        when = self.config.evaluation
        parts = {"reconstruction": {"function": self.reconstruct}}
        return [when.spec(name, **parts.get(name, {})) for name in when.names]

    def exports(self) -> ExportPlan:
        """A decoder draws nothing by itself.

        Raises:
            ConfigError: always, with what to do instead.
        """
        raise ConfigError(
            "a decoder alone makes no image from a prompt; export the generator whose latents it decodes, with this "
            "run as its decoder: snapgen export --workdir=GENERATOR --decoder=THIS"
        )


def _with_leaf(tree: Tree, path: Path, leaf: jax.Array) -> Tree:
    """The tree with another leaf at a path."""
    name, *rest = path
    return {**tree, name: _with_leaf(tree[name], tuple(rest), leaf) if rest else leaf}
