"""Sharding rules of several networks in one tree: each parameter follows the rules of its own network."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from snapgen_jax.networks.clip import ClipTextConfig
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.module import build, flatten
from snapgen_jax.networks.rules import rules_of, within
from snapgen_jax.networks.t5 import T5Config
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.parallel.sharding import tree_shardings
from snapgen_jax.training.optimizer import OptimizerConfig, make_optimizer, new_player
from snapgen_jax.training.state import TrainState

MESH = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
CONFIGS = {
    "unet": UNetConfig.preset("smoke"),
    "text": ClipTextConfig.preset("smoke"),
    "mmdit": MMDiTConfig.preset("smoke"),
    "teacher/mmdit": MMDiTConfig.preset("smoke", depth=5, dual=2),
    "teacher/text": T5Config.preset("smoke"),
    "teacher": UNetConfig.preset("smoke", channels=(8, 8)),
}
NETWORKS = {role: build(config)[0] for role, config in CONFIGS.items()}
SPECS = {role: build(config)[1] for role, config in CONFIGS.items()}


def places(tree, rules):
    return {path: sharding.spec for path, sharding in flatten(tree_shardings(tree, rules, MESH)).items()}


@pytest.mark.parametrize("role", CONFIGS)
def test_in_a_frozen_tree_each_role_follows_its_own_network(role):
    alone = places(SPECS[role], CONFIGS[role].rules())
    together = places(SPECS, rules_of(NETWORKS))
    assert any(spec != PartitionSpec() for spec in alone.values())
    assert {path: together[role, *path] for path in alone} == alone


def test_a_role_may_be_a_part_of_a_nested_tree():
    tree = {"teacher": {"text": SPECS["teacher/text"], "mmdit": SPECS["teacher/mmdit"], **SPECS["teacher"]}}
    found = places(tree, rules_of(NETWORKS))
    for role in ("teacher/text", "teacher/mmdit", "teacher"):
        for path, spec in places(SPECS[role], CONFIGS[role].rules()).items():
            assert found[(*role.split("/"), *path)] == spec


def test_in_a_train_state_moments_and_averages_follow_their_parameters():
    """One player is called as a role of the other is; and blocks of the MMDiT have a part `text`."""
    optimizer = make_optimizer(OptimizerConfig(), 10)
    held = {"text": ("unet", "mmdit"), "critic": ("text", "teacher/text")}

    def state():
        params = {
            player: {role: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), SPECS[role]) for role in roles}
            for player, roles in held.items()
        }
        players = {player: new_player(tree, optimizer, ema=True) for player, tree in params.items()}
        return TrainState(jnp.int32(0), jnp.int32(0), players, {})

    spec = jax.eval_shape(state)
    shardings = tree_shardings(spec, rules_of(NETWORKS), MESH)
    for player, roles in held.items():
        for role in roles:
            expected = places(SPECS[role], CONFIGS[role].rules())
            placed = shardings.players[player]
            moments = [part.mu for part in placed.opt_state if hasattr(part, "mu")]
            assert len(moments) == 1
            for tree in (placed.params, placed.ema, *moments):
                assert {path: sharding.spec for path, sharding in flatten(tree[role]).items()} == expected


def test_the_rules_of_one_name_hold_below_it_alone():
    rules = within("text", [("kernel$", PartitionSpec("fsdp"))])
    leaf = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    found = places({"text": {"a": {"kernel": leaf}}, "context": {"kernel": leaf}}, rules)
    assert found == {("text", "a", "kernel"): PartitionSpec("fsdp"), ("context", "kernel"): PartitionSpec()}
