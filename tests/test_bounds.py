"""Numbers that nobody can mean are refused by the name of their key, before anything is read, compiled or written."""

import dataclasses
import math
from typing import Any

import pytest

from snapgen_jax.bounds import FINITE, SEED, SHARE, FieldError, above, at_least, below, check, within
from snapgen_jax.cli import main
from snapgen_jax.config import load_config
from snapgen_jax.evaluation.interfaces import EvaluatorSpec
from snapgen_jax.evaluation.registry import create
from snapgen_jax.training.exits import ConfigError, ExitCode
from snapgen_jax.training.loop import LoopConfig

QUICKSTART = "configs/shapes/quickstart.py"


@pytest.mark.parametrize(
    ("bounds", "inside", "outside"),
    [
        (at_least(1), (1, 2.5, 10**12), (0, -1, 0.999)),
        (above(0), (1e-30, 7), (0, -1)),
        (within(0, 1), (0, 0.5, 1), (-1e-9, 1.001)),
        (below(1), (0, 0.999), (1, -0.1)),
        (FINITE, (-1e300, 0), ()),
        (SEED, (0, 2**31 - 1), (-1, 2**31, 3_000_000_000)),
    ],
)
def test_bounds_hold_finite_numbers_between_their_ends(bounds, inside, outside):
    assert all(map(bounds.holds, inside))
    assert not any(map(bounds.holds, (*outside, math.nan, math.inf, -math.inf)))


def test_a_field_of_several_numbers_is_checked_number_by_number():
    @dataclasses.dataclass(frozen=True)
    class Sizes:
        sizes: tuple = ((8, 8), (8, 4))
        shares: dict = dataclasses.field(default_factory=dict)
        width: int | None = None

        def __post_init__(self):
            check(self, sizes=at_least(1), shares=SHARE, width=at_least(1))

    assert Sizes().width is None
    with pytest.raises(FieldError, match=r"^sizes is \(\(8, 8\), \(8, 0\)\); give 1 or more each$"):
        Sizes(((8, 8), (8, 0)))
    with pytest.raises(FieldError, match=r"^shares is \{'a': 2\}; give a number from 0 to 1 each$"):
        Sizes(shares={"a": 2})
    with pytest.raises(TypeError, match="str"):
        Sizes(width="8")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=3000000000", "'seed' is 3000000000; give a number from 0 to 2147483647"),
        ("seed=-1", "'seed' is -1; give a number from 0"),
        ("train_steps=0", "'train_steps' is 0; give 1 or more"),
        ("log_every_steps=0", "'log_every_steps' is 0; give 1 or more"),
        ("max_skipped_steps=0", "'max_skipped_steps' is 0; give 1 or more"),
        ("microbatches=0", "'microbatches' is 0; give 1 or more"),
        ("batch_size=0", "'batch_size' is 0; give 1 or more"),
        ("stall_seconds=-1", "'stall_seconds' is -1.0; give 0 or more"),
        ("checkpoint.every_steps=0", "'checkpoint.every_steps' is 0; give 1 or more; a number above train_steps"),
        ("checkpoint.keep_last=0", "'checkpoint.keep_last' is 0; give 1 or more"),
        ("checkpoint.keep_every_steps=-5", "'checkpoint.keep_every_steps' is -5; give 0 or more"),
        ("evaluation.every_steps=-1", "'evaluation.every_steps' is -1; give 0 or more"),
        ("optimizer.learning_rate=1e999", "'optimizer.learning_rate' is inf; give 0 or more"),
        ("optimizer.learning_rate=-1e-4", "'optimizer.learning_rate' is -0.0001; give 0 or more"),
        ("optimizer.warmup_steps=-1", "'optimizer.warmup_steps' is -1; give 0 or more"),
        ("optimizer.b2=1", "'optimizer.b2' is 1.0; give 0 or more, and less than 1"),
        ("optimizer.eps=0", "'optimizer.eps' is 0.0; give a finite number above 0"),
        ("optimizer.clip_norm=1e999", "'optimizer.clip_norm' is inf; give 0 or more; 0 turns it off"),
        ("ema_decay=1.5", "'ema_decay' is 1.5; give a number from 0 to 1"),
        ("mesh.slices=0", "'mesh.slices' is 0; give 1 or more"),
        ("network.groups=0", "'network.groups' is 0; give 1 or more"),
        ("network.channels=(0,0)", r"'network.channels' is \(0, 0\); give 1 or more each"),
        ("schedule.std=-1", "'schedule.std' is -1.0; give 0 or more"),
        ("schedule.shift=0", "'schedule.shift' is 0.0; give a finite number above 0"),
        ("data.workers=-1", "'data.workers' is -1; give 0 or more"),
        ("data.prefetch=0", "'data.prefetch' is 0; give 1 or more"),
        ("data.validation_share=1", "'data.validation_share' is 1.0; give 0 or more, and less than 1"),
        ("data.shapes.size=8", "'data.shapes.size' is 8; give a number from 32 to 256"),
        ("inputs.image_sizes=((32,0),)", r"'inputs.image_sizes' is \(\(32, 0\),\); give 1 or more each"),
        ("inputs.caption_dropout=2", "'inputs.caption_dropout' is 2.0; give a number from 0 to 1"),
        ("inputs.codec.scale=0", "'inputs.codec.scale' is 0.0; give a finite number above 0"),
        ("sampling.steps=0", "'sampling.steps' is 0; give 1 or more"),
    ],
)
def test_a_number_that_nobody_can_mean_is_refused_by_the_name_of_its_key(override, message):
    with pytest.raises(ConfigError, match=f"config key {message}"):
        load_config(QUICKSTART, [override])


def test_zero_is_taken_where_it_has_a_meaning():
    never = ["checkpoint.keep_every_steps", "evaluation.every_steps", "optimizer.clip_norm", "data.workers"]
    config: Any = load_config(QUICKSTART, [f"{name}=0" for name in never])
    assert config.checkpoint.keep_every_steps == config.evaluation.every_steps == config.data.workers == 0
    assert config.optimizer.clip_norm == 0


def test_a_config_file_may_say_nan_and_is_refused_too(tmp_path):
    (tmp_path / "nan.py").write_text(
        "def get_config(arg=None):\n    return {'optimizer': {'learning_rate': float('nan')}}\n"
    )
    with pytest.raises(ConfigError, match=r"'optimizer.learning_rate' is nan; give 0 or more"):
        load_config(str(tmp_path / "nan.py"))


def test_a_notebook_is_told_too():
    with pytest.raises(ValueError, match=r"^log_every_steps is 0; give 1 or more$"):
        LoopConfig(log_every_steps=0)


def test_the_command_ends_with_78_before_a_workdir_is_made(tmp_path, capsys):
    code = main(["train", f"--workdir={tmp_path / 'run'}", f"--config={QUICKSTART}", "--config.log_every_steps=0"])
    assert code == ExitCode.BAD_CONFIG and not (tmp_path / "run").exists()
    assert "config key 'log_every_steps' is 0; give 1 or more" in capsys.readouterr().err


NOT_UTF_8 = r"holds 'a \\udcff', which is no text: it was not UTF-8; write it in UTF-8"


def test_prompts_that_are_not_utf_8_are_refused_before_a_run_begins():
    with pytest.raises(ConfigError, match=f"config key 'sample_prompts' {NOT_UTF_8}"):
        load_config(QUICKSTART, ["sample_prompts=('a ring', 'a \udcff')"])


@pytest.mark.parametrize("name", ["sample_grid", "clip_score", "diversity"])
def test_prompts_of_an_evaluator_that_are_not_utf_8_are_refused(name):
    with pytest.raises(ValueError, match=f"option of the evaluator '{name}' 'prompts' {NOT_UTF_8}"):
        create(EvaluatorSpec(name, options={"prompts": ("a ring", "a \udcff")}))


@pytest.mark.parametrize(
    ("name", "option", "value", "said"),
    [
        ("sample_grid", "seed", 2**31, "is 2147483648; give a number from 0 to 2147483647"),
        ("compositional", "seed", -1, "is -1; give a number from 0"),
        ("clip_score", "seed", -1, "is -1; give a number from 0"),
        ("diversity", "seed", -1, "is -1; give a number from 0"),
        ("diversity", "images", 1, "is 1; give 2 or more"),
        ("frechet", "examples", 1, "is 1; give 2 or more"),
        ("frechet", "seed", 2**40, "is 1099511627776; give a number from 0"),
        ("sample_grid", "columns", 0, "is 0; give 1 or more"),
    ],
)
def test_options_of_evaluators_are_refused_before_a_run_begins(name, option, value, said):
    with pytest.raises(ValueError, match=f"option of the evaluator '{name}' '{option}' {said}"):
        create(EvaluatorSpec(name, options={option: value}))
