"""What a run of reward tuning begins with: an earlier run of the recipe is gone on with, or refused; and so is a tuned
text encoder beside another base than its own."""

import dataclasses
import functools
import json
import shutil

import jax
import pytest

from snapgen_jax.networks.lora import LoraConfig
from snapgen_jax.training.exits import ConfigError
from snapgen_jax.training.fingerprint import fingerprint
from snapgen_jax.training.keys import key
from tests.recipes.test_reward_tuning import METHOD, tuning
from tests.recipes_for_tests import save_run, saved_away_from_zero

LORA = LoraConfig(2, 4.0, ("attention/",))


def earlier(workdir, **config):
    """The workdir of an earlier run of the recipe."""
    (workdir / "config.json").write_text(json.dumps({"recipe": "reward_tuning", "init_from": "runs/base", **config}))
    return workdir


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        ("text", "network_adapters", "a tuned text encoder, 'text' .* set tuned_text to it and init_from to the base"),
        ("text_adapters", "network", "a tuned text encoder, 'text' .* set tuned_text to it and init_from to the base"),
        ("text_adapters", "text", "set trains='text_adapters' and encoder='text' to go on with it, or set init_from"),
        ("text", "text_adapters", "set trains='text' and encoder='text' to go on with it, or set init_from to the ba"),
        ("network", "network_adapters", "a tuned network .* set trains='network' to go on with it"),
        ("network_adapters", "text", "a tuned network .* set trains='network_adapters' to go on with it"),
    ],
)
def test_a_run_that_tuned_something_else_is_no_start(tmp_path, was, now, message):
    recipe = tuning(earlier(tmp_path, trains=was), trains=now, lora=LORA)
    with pytest.raises(ConfigError, match=message):
        recipe.warm_start(None, {})


def test_a_run_that_tuned_another_encoder_is_no_start(tmp_path):
    recipe = tuning(earlier(tmp_path, encoder="clip_g"))
    with pytest.raises(ConfigError, match="set trains='text' and encoder='clip_g' to go on with it"):
        recipe.warm_start(None, {})


@pytest.mark.parametrize("trains", ["text", "network", "text_adapters", "network_adapters"])
def test_a_run_that_tuned_the_same_is_gone_on_with_and_any_base_is_a_start(tmp_path, trains):
    tuning(earlier(tmp_path, trains=trains), trains=trains, lora=LORA)._check_start()
    (tmp_path / "config.json").write_text(json.dumps({"recipe": "flow_matching"}))
    tuning(tmp_path, trains=trains, lora=LORA)._check_start()
    tuning("runs/moved", trains=trains, lora=LORA)._check_start()


# --- an encoder that was tuned before ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Two runs with networks of one shape: workdirs, each with a tokenizer, and the weights of the first."""
    first, second = (tmp_path_factory.mktemp(name) for name in ("first", "second"))
    weights, state = saved_away_from_zero(METHOD, first), jax.jit(METHOD.init)(key(0, 0, "init"))
    player = state.players["model"].replace(ema=jax.tree.map(lambda x: 1.5 * x, weights))
    save_run(state.replace(players={"model": player}), second)
    for workdir in (first, second):
        (workdir / "tokenizer.json").write_text("{}")
    return first, second, weights


@pytest.fixture(scope="module")
def tuned_text(bases, tmp_path_factory):
    """`tuned_text(trains)`: the workdir of a run that tuned the text encoder of the first base."""

    @functools.cache
    def run(trains):
        workdir = tmp_path_factory.mktemp(trains)
        recipe = tuning(bases[0], trains=trains, lora=LORA)
        save_run(jax.jit(recipe.init)(key(0, 0, "init")), workdir)
        (workdir / "tokenizer.json").write_text("{}")
        return earlier(workdir, trains=trains, init_from=str(bases[0]), lora=dataclasses.asdict(LORA))

    return run


def load_beside(base, tuned_text):
    return tuning(base, trains="network", tuned_text=str(tuned_text)).load_frozen(None, "generate")


@pytest.mark.parametrize("trains", ["text", "text_adapters"])
@pytest.mark.parametrize("by", ["tuned_text", "others"])
def test_an_encoder_that_was_tuned_from_another_base_is_refused(bases, tuned_text, trains, by):
    first, second, weights = bases
    named = {"tuned_text": str(tuned_text(trains))} if by == "tuned_text" else {"others": {"again": tuned_text(trains)}}
    own = {"trains": "network"} if by == "tuned_text" else {}
    frozen = tuning(first, **own, **named).load_frozen(None, "generate")
    if trains == "text_adapters":  # as they begin they change nothing
        role = "text" if by == "tuned_text" else "other/again"
        assert fingerprint(frozen[role]) == fingerprint(weights["text"])
    with pytest.raises(ConfigError, match=f"was tuned from that of '{first}', and the one here is of '{second}'"):
        tuning(second, **own, **named).load_frozen(None, "generate")


def test_an_encoder_with_another_tokenizer_is_refused(bases, tuned_text, tmp_path):
    for file in tuned_text("text").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text('{"other": 1}')
    with pytest.raises(ConfigError, match="knows another tokenizer than that of"):
        load_beside(bases[0], tmp_path)


def test_a_base_that_was_moved_is_still_that_of_its_encoder(bases, tuned_text, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(bases[0], moved)
    load_beside(moved, tuned_text("text"))  # its weights are those that the encoder began with
    (tmp_path / "run").mkdir()
    for file in tuned_text("text").iterdir():
        (tmp_path / "run" / file.name).symlink_to(file)
    (tmp_path / "run" / "config.json").unlink()
    load_beside(moved, earlier(tmp_path / "run", trains="text", init_from=str(tmp_path / "gone")))
