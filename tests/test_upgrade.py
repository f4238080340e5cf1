"""Workdirs of an earlier version: `snapgen upgrade` rewrites their configs, and nothing is lost with them.

`goldens/schema_1/` holds what that version wrote: configs of its runs, `began.json` of the last stage of a chain, which
holds the configs of all stages, and in `run.tar.xz` a run of the smallest network with the images that it drew.
"""

import json
import pathlib
import tarfile

import jax
import numpy as np
import pytest
from PIL import Image

from snapgen_jax.chain import load_chain, with_earlier
from snapgen_jax.chain_run import changes, describe
from snapgen_jax.cli import main
from snapgen_jax.config import complete, load_config, read_one, resolve
from snapgen_jax.generation import load
from snapgen_jax.generation import load_config as config_of
from snapgen_jax.training.exits import ConfigError, ExitCode
from snapgen_jax.training.keys import key
from snapgen_jax.upgrade import RECIPES, upgrade, upgraded
from snapgen_jax.workdir import differences

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "schema_1"
SHORT = ["train_steps=10", "log_every_steps=1", "checkpoint.every_steps=10"]
# Of that version's stored text states, which were joined beforehand, and whose encoders nobody named; its guidance.
STATES = {"kind": "stored", "context_tokens": 12, "context_width": 16, "pooled_width": 16}
JOINED = [f"inputs={ {**STATES, 'image_sizes': ((64, 64),)} }", "data.source=synthetic"]
TAUGHT = [f"teacher.inputs={ {**STATES, 'prefix': 'teacher_', 'latent_channels': 0} }"]
# {golden: (today's config file, with what was changed in that run)}
RUNS = {
    "quickstart": ("configs/shapes/quickstart.py:runlocal", SHORT),
    "folder": ("configs/folder.py:runlocal", [*SHORT, "data.path=photos"]),
    "t2i_256": ("configs/pretrain/t2i_256.py:runlocal", [*SHORT, *JOINED, "sampling.guidance=7.0"]),
    "t2i_256_images": ("configs/pretrain/t2i_256_images.py:runlocal", [*SHORT, "sampling.guidance=7.0"]),
    "t2i_512_sd35l": ("configs/distill/t2i_512_sd35l.py:runlocal", [*SHORT, *JOINED, *TAUGHT, "sampling.guidance=7.0"]),
    "t2i_1024_4step": (
        "configs/fewstep/t2i_1024_4step.py:runlocal",
        [
            *SHORT,
            *JOINED,
            *TAUGHT,
            "sampling.times=()",
            "sampling.shift=3.0",
            "teacher.few_step_times=()",
        ],
    ),
    "autoencoder": ("configs/shapes/autoencoder.py:runlocal", [*SHORT, f"kl_weight={1e-4 * (3 * 2**2 / 4)}"]),
    "tiny_decoder": ("configs/shapes/tiny_decoder.py:generated", []),
}
# The codec of a decoder's generator is the decoder's own, whatever the config says of it.
UNREAD = {"tiny_decoder": {"generator.inputs.codec.kind", "generator.inputs.codec.workdir"}}
BEGAN = json.loads((GOLDENS / "began.json").read_text())


def golden(name):
    return (GOLDENS / f"{name}.json").read_text()


def files(root):
    """{path: bytes} of everything below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture
def chain(tmp_path):
    """The workdir of a chain of five stages, as the earlier version left it."""
    chain, _ = load_chain("configs/shapes/chain.py:runlocal")
    for name, text in BEGAN.items():
        folder = tmp_path / "chain" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(text)
        own = {earlier: BEGAN[earlier] for earlier in with_earlier(chain, name)}
        (folder / "began.json").write_text(json.dumps(own))
    return tmp_path / "chain"


# --- what it rewrites ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_a_config_becomes_the_one_that_its_config_file_gives_today(name, tmp_path):
    (tmp_path / "config.json").write_text(golden(name))
    assert upgrade(tmp_path) == [str(tmp_path / "config.json")]
    config = config_of(tmp_path)
    assert differences(config, load_config(*RUNS[name])).keys() == UNREAD.get(name, set())
    assert resolve(config).build("cpu").batch_specs()


def test_every_recipe_of_that_version_is_among_them():
    recipes = {json.loads(text)["recipe"] for text in [*map(golden, RUNS), *BEGAN.values()]}
    assert recipes == RECIPES.keys()


def test_a_chain_is_rewritten_stage_by_stage_and_no_stage_is_trained_anew(chain):
    rewritten = [chain / name / file for name in sorted(BEGAN) for file in ("config.json", "began.json")]
    assert upgrade(chain) == [str(file) for file in rewritten]
    today, _ = load_chain("configs/shapes/chain.py:runlocal")
    stages = {stage.name: stage for stage in today.stages}
    assert stages.keys() == {*BEGAN, "student_further"}  # which is new

    def now(name):
        earlier = [f"{key}=runs/chain/{other}" for key, other in stages[name].earlier.items()]
        since = {"student_few_step": ["inputs.caption_dropout=0.1"]}  # what it was then
        return resolve(read_one(stages[name].config), [*earlier, *since.get(name, [])])

    for name in BEGAN:
        assert not differences(config_of(chain / name), now(name).config)
        began = json.loads((chain / name / "began.json").read_text())
        depends = {other: describe(stages[other], now(other)) for other in with_earlier(today, name)}
        assert began.keys() == depends.keys() and changes(today, name, began, depends) == ""


def test_the_weights_of_an_earlier_run_draw_the_images_that_they_drew(tmp_path):
    with tarfile.open(GOLDENS / "run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    run, prompts = tmp_path / "run", ["a red circle", "two green stars"]
    with pytest.raises(ConfigError, match="snapgen upgrade"):
        load(run)
    others = {name: content for name, content in files(run).items() if name != "config.json"}
    assert main(["upgrade", str(run)]) == ExitCode.DONE
    assert {name: content for name, content in files(run).items() if name != "config.json"} == others
    before = np.stack(np.split(np.asarray(Image.open(run / "drawn.png")), 2, axis=1))
    generator = load(run)
    shape = generator.recipe.inputs.latent_shape()
    noise = np.stack([jax.random.normal(key(3, i, "generate"), shape) for i in range(2)])  # as that version drew it

    def drawn(prompts):
        return generator.generate(prompts, conditions={"noise": noise}).astype(int)

    assert np.abs(drawn(prompts) - before).max() <= 1  # another machine may round otherwise
    assert np.abs(drawn(prompts[::-1]) - before).max() > 10


@pytest.mark.parametrize(
    ("section", "takes", "text_workdir", "patch"),
    [
        ({"text": {"width": 8, "heads": 2, "layers": 1, "projection": 16}}, ("condition",), "", 4),
        ({"codec": {"kind": "patch", "patch": 2}}, ("latent",), "runs/chain/clip", 2),
        ({"text": {"width": 8, "heads": 2}, "codec": {"kind": "patch", "patch": 8}}, ("condition", "latent"), "", 8),
    ],
)
def test_a_teacher_with_an_encoder_or_latents_of_its_own_gets_inputs_of_its_own(section, takes, text_workdir, patch):
    old = json.loads(BEGAN["student_distilled"])
    teacher = complete(upgraded({**old, "teacher": {**old["teacher"], **section}})).teacher
    assert teacher.takes == takes and teacher.network.kind == "mmdit"
    assert (teacher.inputs.kind, teacher.inputs.text_workdir, teacher.inputs.codec.patch) == (
        "captions",
        text_workdir,
        patch,
    )
    assert teacher.inputs.text.width == section.get("text", old["text"])["width"]


def test_a_trunk_of_another_run_than_training_starts_from_keeps_its_name():
    old = json.loads(BEGAN["student_few_step"])
    assert old["trunk_workdir"] == old["init_from"] != ""
    assert complete(upgraded(old)).trunk_workdir == ""
    assert complete(upgraded({**old, "trunk_workdir": "runs/other"})).trunk_workdir == "runs/other"


# --- what it leaves alone --------------------------------------------------------------------------------------------


def test_what_is_up_to_date_is_left_alone(chain, capsys):
    upgrade(chain)
    (chain / "later").mkdir()
    (chain / "later" / "config.json").write_text('{"schema": 3, "recipe": "of tomorrow"}')
    before = files(chain)
    assert main(["upgrade", str(chain)]) == ExitCode.DONE
    assert capsys.readouterr().out == f"{chain} is up to date\n" and files(chain) == before


def test_a_published_system_needs_no_other_config():
    config = load_config("configs/teacher/sd35_large.py").to_dict()
    assert upgraded(config) == config


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "config.json",
            '{"recipe": "latent_flow"}',
            "unknown recipe 'latent_flow' of an earlier version; it had",
        ),
        ("config.json", '{"recipe": "flow_matching", "unet": {"chanels": [8]}}', "did you mean 'channels'?"),
        ("config.json", '{"recipe": "contrastive"}', "KeyError('image')"),
        ("config.json", '{"recipe": "flow_mat', "JSONDecodeError"),
        ("config.json", "[]", "AttributeError"),
        ("began.json", '{"clip": "{}', "JSONDecodeError"),
        ("began.json", '{"clip": 3}', "TypeError"),
    ],
)
def test_one_file_that_cannot_be_rewritten_leaves_all_as_they_were(chain, file, text, message, capsys):
    (chain / "teacher" / file).write_text(text)  # the last of them, in the order in which they are looked at
    before = files(chain)
    assert main(["upgrade", str(chain)]) == ExitCode.BAD_CONFIG
    said = capsys.readouterr().err
    assert f"{chain / 'teacher' / file} cannot be rewritten, and nothing was changed: " in said and message in said
    assert files(chain) == before


def test_a_folder_that_holds_no_run_is_refused(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert main(["upgrade", str(folder)]) == ExitCode.BAD_CONFIG
        assert f"{folder} is not a workdir" in capsys.readouterr().err
    assert not files(tmp_path)


@pytest.mark.parametrize("command", ["sample --prompt=a", "evaluate", "export", "train --config=configs/folder.py"])
def test_before_it_every_command_says_what_to_do(command, tmp_path, capsys):
    (tmp_path / "config.json").write_text(golden("quickstart"))
    name, *options = command.split()
    assert main([name, f"--workdir={tmp_path}", *options]) == ExitCode.BAD_CONFIG
    assert f"rewrite it once with `snapgen upgrade {tmp_path}`" in capsys.readouterr().err
    assert files(tmp_path) == {"config.json": golden("quickstart").encode()}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"recipe": "flow_mat', "config.json is no"),
        ("[]", "config.json "),
        ('{"recipe": "latent_flow_matching"}', ""),
    ],
)
@pytest.mark.parametrize("command", ["sample --prompt=a", "status"])
def test_a_config_that_no_run_wrote_is_one_line_of_every_command(command, text, message, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    name, *options = command.split()
    assert main([name, f"--workdir={tmp_path}", *options]) == ExitCode.BAD_CONFIG
    said = capsys.readouterr().err
    assert str(tmp_path) in said and message in said and "Traceback" not in said


def test_the_status_of_an_earlier_run_says_what_to_do_next(tmp_path, capsys):
    (tmp_path / "config.json").write_text(golden("quickstart"))
    assert main(["status", f"--workdir={tmp_path}"]) == ExitCode.DONE
    assert f"next        an earlier version wrote this workdir; rewrite it once with `snapgen upgrade {tmp_path}`" in (
        capsys.readouterr().out
    )
