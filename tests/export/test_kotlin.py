"""The Kotlin core of the Android project, on a JVM: against the golden suite, against the Python client, on LiteRT."""

import json
import random
import re
import shutil
import struct
import subprocess
import zipfile

import numpy as np
import pytest
import tokenizers
from PIL import Image

from snapgen_jax.data.pretrained_tokenizers import PretrainedTokenizer
from snapgen_jax.diffusion.noise import draw_noise
from snapgen_jax.export.apps import android, write_app
from snapgen_jax.export.client import LiteRTGenerator

from ..tiny_tokenizers import write_clip, write_gemma, write_t5
from . import test_bad_programs
from .conftest import PROMPTS, resign
from .kotlin_build import SOURCES, STUBS, Probe, compiled, java, litert, project_jar


@pytest.fixture(scope="module")
def probe():
    probe = Probe()
    yield probe
    probe.close()


@pytest.fixture
def copy(small_bundle, tmp_path):
    """A bundle that a test may damage."""
    return shutil.copytree(small_bundle, tmp_path / "copy")


def precisions(bundle) -> list[str]:
    found = json.loads((bundle / "manifest.json").read_text("utf-8"))["precisions"]
    assert {"f32", "f16"} <= set(found)
    return found


def test_every_case_of_the_golden_suite_holds(probe, small_bundle):
    checks = probe.ask("golden", folder=small_bundle)
    assert [check for check in checks if not check[0]] == []
    cases = json.loads((small_bundle / "golden" / "conformance.json").read_text("utf-8"))
    sections = [name for name, entries in cases.items() if isinstance(entries, list)]
    assert len(sections) == 6
    for section in sections:
        assert sum(f": {section}[" in name for _, name, _ in checks) == len(cases[section]) > 0
    replayed = len(np.load(small_bundle / "golden" / "predictions.npy"))
    assert sum(name.startswith("golden replay") for _, name, _ in checks) == replayed > 0
    assert sum(name.startswith("golden tokens") for _, name, _ in checks) == len(PROMPTS)


@pytest.mark.parametrize(
    "name, change, failing",
    [
        ("predictions", lambda array: array[:, :, ::-1], "golden replay"),  # guidance towards the null call
        ("predictions", lambda array: array[:, ::-1], "golden replay"),
        ("time", lambda array: array[::-1], "golden replay"),
        ("latents", lambda array: array * np.float32(1.0001), "golden replay"),
        ("noise", lambda array: array[::-1], "golden noise"),
    ],
)
def test_golden_data_that_is_wrong_is_seen(probe, copy, name, change, failing):
    path = copy / "golden" / f"{name}.npy"
    np.save(path, np.ascontiguousarray(change(np.load(path))))
    resign(copy)
    wrong = [check[1] for check in probe.ask("golden", folder=copy) if not check[0]]
    assert wrong and any(name.startswith(failing) for name in wrong)


@pytest.mark.parametrize("in_turn", [False, True])
def test_networks_on_litert_are_within_the_tolerances_of_the_bundle(probe, small_bundle, in_turn):
    for precision in precisions(small_bundle):
        checks = probe.ask("verify", folder=small_bundle, precision=precision, in_turn=in_turn)
        assert len(checks) == 3 * len(PROMPTS)
        assert [check for check in checks if not check[0]] == []


@pytest.mark.parametrize("in_turn", [False, True])
def test_two_signatures_of_one_file_take_turns_and_pass_on_their_state(probe, clip, in_turn):
    for precision in precisions(clip.folder):
        checks = probe.ask("verify", folder=clip.folder, precision=precision, in_turn=in_turn)
        assert checks and [check for check in checks if not check[0]] == []


def test_a_bundle_of_several_sizes_draws_at_its_own(probe, two_sizes):
    for precision in precisions(two_sizes):
        checks = probe.ask("verify", folder=two_sizes, precision=precision, in_turn=False)
        assert checks and [check for check in checks if not check[0]] == []


@pytest.mark.parametrize(
    "options", [{}, {"steps": 2, "guidance": 1.0}, {"steps": 3, "guidance": 4.5, "method": "heun"}], ids=str
)
def test_the_picture_is_that_of_the_python_client(probe, small_bundle, tmp_path, options):
    seed, index, prompt = 4_000_000_000, 17, "two GREEN stars, ñ 😀"
    drawn = probe.ask(
        "draw",
        folder=small_bundle,
        precision="f32",
        prompt=prompt,
        seed=seed,
        index=index,
        out=tmp_path / "rgb",
        **options,
    )
    image = np.fromfile(tmp_path / "rgb", np.uint8).reshape(drawn["height"], drawn["width"], 3)
    (expected,) = LiteRTGenerator(small_bundle).generate([prompt], seed=seed, indices=[index], **options)
    assert np.abs(image.astype(int) - expected).max() <= 1
    assert image.std() > 10
    steps = options.get("steps", 4)
    assert drawn["steps"] == list(range(1, steps + 1))
    done, totals = zip(*drawn["progress"], strict=True)
    assert set(totals) == {done[-1]} and list(done) == list(range(1, done[-1] + 1))


def test_a_cancelled_run_ends_before_the_next_call_and_the_next_one_is_whole(probe, small_bundle, tmp_path):
    asked = {
        "folder": small_bundle,
        "precision": "f32",
        "prompt": PROMPTS[0],
        "seed": 1,
        "index": 0,
        "out": tmp_path / "rgb",
    }
    assert probe.ask("draw", **asked, cancel_after=3) == {
        "error": "the run was cancelled",
        "kind": "CancelledException",
    }
    assert not (tmp_path / "rgb").exists()
    assert "error" not in probe.ask("draw", **asked) and (tmp_path / "rgb").exists()


def adversarial(count: int, special: tuple[str, ...]) -> list[str]:
    """Texts of what tokenizers disagree about."""
    letters = [
        *special, *(text.upper() for text in special), "'s", "'LL", "'", " ", "  ", "\n", "\t", "\u00a0", "\u3000",
        "\u0085", "\u200b", "Σ", "ς", "İ", "ß", "ẞ", "ﬁ", "½", "Ⅷ", "٣", "e\u0301", "A\u030a", "\u0323\u0307q", "한국",
        "円", "😀", "\U0001f469\u200d\U0001f467", "\U0001d4b3", "\x00", "\x1c", "a", "Bc", "12", "...", "#!", "<|",
        "|>", "red circle",
    ]  # fmt: skip
    rng = random.Random(0)
    planes = [chr(rng.choice((rng.randrange(0x20, 0x3000), rng.randrange(0x3000, 0xD800)))) for _ in range(200)]
    return ["", *("".join(rng.choices(letters + planes, k=rng.randrange(1, 12))) for _ in range(count))]


@pytest.mark.parametrize("kind", ["trained", "clip"])
def test_token_ids_are_those_of_the_tokenizers_library(probe, small_bundle, tmp_path, kind):
    path = small_bundle / "tokenizer.json"
    if kind == "clip":
        path = tmp_path / "clip.json"
        PretrainedTokenizer.load(write_clip(tmp_path / "clip")).save(path)
    library = tokenizers.Tokenizer.from_file(str(path))
    special = tuple(entry["content"] for entry in json.loads(path.read_text("utf-8"))["added_tokens"])
    prompts = [*adversarial(1500, special), "x" * 5000]
    expected = [library.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
    found = probe.ask("encode", file=path, prompts=prompts)
    assert [(p, f, e) for p, f, e in zip(prompts, found, expected, strict=True) if f != e] == []


@pytest.mark.parametrize(
    "write, named",
    [(write_t5, 'the model the text "Unigram"'), (write_gemma, "BPE with byte_fallback")],
    ids=["t5", "gemma"],
)
def test_a_tokenizer_of_another_kind_is_refused_by_name(probe, tmp_path, write, named):
    PretrainedTokenizer.load(write(tmp_path / "folder")).save(tmp_path / "tokenizer.json")
    said = probe.refusal("encode", file=tmp_path / "tokenizer.json", prompts=["a"])
    assert named in said and "Give the token ids themselves" in said


def test_half_of_a_character_is_refused(probe, small_bundle, tmp_path):
    for prompt in ("a \ud800 circle", "\udc80", "a\udc80\ud800"):
        said = probe.refusal(
            "draw", folder=small_bundle, precision="f32", prompt=prompt, seed=0, index=0, out=tmp_path / "rgb"
        )
        assert "half of a character" in said


def test_noise_is_that_of_the_seed(probe, tmp_path):
    for seed, index in ((0, 0), (2**32 - 1, 5), (123_456_789, 2**32 - 1)):
        probe.ask("noise", seed=seed, index=index, shape=[30, 40, 3], out=tmp_path / "noise")
        found = np.fromfile(tmp_path / "noise", "<f4")
        expected = draw_noise(seed, index, (30, 40, 3)).reshape(-1)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        assert (found == expected).mean() > 0.5  # the last bit alone is the platform's


@pytest.mark.parametrize("bad", [{"seed": -1}, {"seed": 2**32}, {"index": 2**32}, {"index": -5}], ids=str)
def test_a_seed_out_of_bounds_is_refused(probe, tmp_path, bad):
    said = probe.refusal("noise", **{"seed": 0, "index": 0, **bad}, shape=[2], out=tmp_path / "noise")
    assert "must be a whole number from 0 to 4294967295" in said


def test_options_that_the_bundle_does_not_have_are_refused(probe, small_bundle, tmp_path):
    asked = {"folder": small_bundle, "precision": "f32", "prompt": "a", "seed": 0, "index": 0, "out": tmp_path / "rgb"}
    assert "at least one step" in probe.refusal("draw", **asked, steps=0)
    assert "unknown sampling method 'rk4'" in probe.refusal("draw", **asked, method="rk4")
    asked["precision"] = "int2"
    assert "no precision 'int2' in this bundle; it has f32" in probe.refusal("draw", **asked)


def cut_short(folder):
    path = folder / "unet_f32.tflite"
    path.write_bytes(path.read_bytes()[:-100])


def another_byte(folder):
    path = folder / "unet_f16.tflite"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def leaves(name):
    def damage(folder):
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        (folder.parent / "outside").write_text("x")
        manifest["files"][name] = {"bytes": 1, "sha256": "0"}
        (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")

    return damage


def edit(name, **changes):
    def damage(folder):
        data = json.loads((folder / name).read_text("utf-8"))
        (folder / name).write_text(json.dumps({**data, **changes}), "utf-8")
        resign(folder)

    return damage


def replace(name, text):
    def damage(folder):
        (folder / name).write_text(text, "utf-8")
        if name != "manifest.json":
            resign(folder)

    return damage


@pytest.mark.parametrize(
    "damage, message",
    [
        (cut_short, "unet_f32.tflite has .* bytes instead of .*: copy the bundle again"),
        (another_byte, "unet_f16.tflite is not the file that was exported .*: copy the bundle again"),
        (lambda folder: (folder / "manifest.json").unlink(), "holds no manifest.json"),
        (lambda folder: (folder / "noise.py").unlink(), "the bundle has no file 'noise.py'"),
        (leaves("../outside"), "the file name '../outside' leads out of the bundle"),
        (leaves("golden/../../outside"), "leads out of the bundle"),
        (leaves("/etc/hostname"), "leads out of the bundle"),
        (leaves("golden\\outside"), "leads out of the bundle"),
        (leaves("C:outside"), "leads out of the bundle"),
        (edit("manifest.json", schema=99), "schema 99, and this client knows 3..4: update the app"),
        (edit("manifest.json", schema=5), "packed networks, which this client does not unpack"),
        (edit("manifest.json", schema=2), "schema 2, and this client knows 3..4: export it again"),
        (edit("program.json", schema=4), "schema is 4; this client knows 3: update the app"),
        (edit("program.json", kind="ddpm"), "kind is the text \"ddpm\"; this client knows flow, feed_forward"),
        (edit("manifest.json", units={}), "manifest.json does not describe the units"),
        (replace("manifest.json", '{"schema": 4'), "manifest.json is not readable JSON: it ends too early"),
        (replace("manifest.json", "[4]"), "manifest.json holds a list; an object was expected"),
        (replace("manifest.json", "[" * 100_000), "nested more than"),
        (replace("program.json", '{"schema": 3,}'), "program.json is not readable JSON"),
        (replace("golden/golden.json", "nothing"), "golden/golden.json is not readable JSON"),
    ],
)  # fmt: skip
def test_a_damaged_bundle_is_refused_with_what_is_wrong(probe, copy, damage, message):
    damage(copy)
    said = probe.refusal("open", folder=copy, digests=True)
    assert re.search(message, said), said


def test_a_damaged_array_is_refused(probe, tmp_path):
    whole, cut = tmp_path / "whole.npy", tmp_path / "cut.npy"
    np.save(whole, np.zeros((2, 3), np.float32))
    assert probe.ask("npy", file=whole) == {"shape": [2, 3], "dtype": "float32"}
    cut.write_bytes(whole.read_bytes()[:-1])
    assert "ends too early" in probe.refusal("npy", file=cut)
    for array, message in (
        (np.zeros(2), "holds '<f8'; this client reads float32"),
        (np.asfortranarray(np.zeros((2, 3), np.float32)), "Fortran order"),
        (np.array([{}]), "holds '|O'"),
    ):
        np.save(cut, array, allow_pickle=True)
        assert message in probe.refusal("npy", file=cut)


def test_every_program_that_the_python_client_refuses_is_refused(probe):
    cases = test_bad_programs.test_a_program_that_does_not_fit_together_is_refused.pytestmark[0].args[1]
    assert len(cases) > 30
    for program, message in cases:
        answer = probe.ask("program", text=json.dumps(program))
        assert isinstance(answer, dict) and answer.get("kind") == "BundleException", (program, message, answer)


@pytest.mark.parametrize(
    "fault, reason",
    [
        ("throws", "GPU cannot run it: no OpenCL here"),
        ("links", "GPU cannot run it: libLiteRtClGlAccelerator.so"),
        ("nan", "GPU computes something else (self-test: not finite)"),
        ("unet", "GPU computes something else (self-test: off by"),
    ],
)
def test_a_gpu_that_fails_or_computes_garbage_gives_way_to_the_cpu_and_it_is_said(probe, small_bundle, fault, reason):
    asked = {"folder": small_bundle, "precision": "f32", "prompt": PROMPTS[0]}
    right = probe.ask("choose", **asked, fault="none")
    assert all(" runs on GPU in f32 (self-test: off by " in line for line in right["reports"])
    found = probe.ask("choose", **asked, fault=fault)
    assert found["sum"] == right["sum"]
    (line,) = [line for line in found["reports"] if line.startswith("unet ")]
    assert line.startswith("unet runs on CPU in f32 (self-test: off by ") and reason in line
    others = [line for line in found["reports"] if not line.startswith("unet ")]
    assert others and all(("GPU in f32" in line) == (fault == "unet") for line in others)


def test_a_file_that_no_processor_computes_rightly_is_refused(probe, copy):
    folder = copy / "golden" / "self_test" / "unet" / "outputs"
    for path in folder.glob("*.npy"):
        np.save(path, 2 * np.load(path))
    resign(copy)
    said = probe.refusal("choose", folder=copy, precision="f32", prompt="a", fault="none")
    assert (
        "the unit 'unet' runs nowhere here: GPU computes something else" in said
        and "; CPU computes something else" in said
    )


def test_a_file_that_is_no_network_is_refused(probe, copy):
    (copy / "unet_f32.tflite").write_bytes(b"TFL3" * 1000)
    resign(copy)
    said = probe.refusal("choose", folder=copy, precision="f32", prompt="a", fault="throws")
    assert "the unit 'unet' runs nowhere here: GPU cannot run it: no OpenCL here; CPU cannot run it: LiteRT" in said


def test_a_bundle_is_copied_once_whole_and_anew_when_it_changes(probe, small_bundle, copy, tmp_path):
    target = tmp_path / "phone" / "bundle"
    target.parent.mkdir()
    first = probe.ask("copy", source=small_bundle, folder=target)
    listed = json.loads((small_bundle / "manifest.json").read_text("utf-8"))["files"]
    assert first["read"] == len(listed) + 1 and first["progress"][-1] == 1.0
    assert probe.ask("open", folder=target, digests=True)["precisions"] == precisions(small_bundle)
    assert probe.ask("copy", source=small_bundle, folder=target)["read"] == 1
    another_byte(copy)
    assert "the file that was exported" not in probe.ask("copy", source=copy, folder=target)  # the manifest is the same
    (copy / "README.md").write_text("another")
    resign(copy)
    (copy / "noise.py").write_text("damaged")
    said = probe.refusal("copy", source=copy, folder=target)
    assert "noise.py is not the file that was exported" in said
    assert probe.ask("open", folder=target, digests=True)["precisions"] == precisions(
        small_bundle
    )  # what was there stays
    shutil.copy(small_bundle / "noise.py", copy)
    leaves("../outside")(copy)
    assert "leads out of the bundle" in probe.refusal("copy", source=copy, folder=target)


def test_the_desktop_program_draws_a_png_and_verifies(small_bundle, tmp_path):
    command = [java(), "--enable-native-access=ALL-UNNAMED", "-cp", str(project_jar()), "dev.snapgen.desktop.MainKt"]
    place = [f"--bundle={small_bundle}", f"--library={litert()}"]
    out = tmp_path / "picture.png"
    subprocess.run([*command, "draw", *place, "--prompt=two green stars", "--seed=3", f"--out={out}"], check=True)
    (expected,) = LiteRTGenerator(small_bundle).generate(["two green stars"], seed=3)
    assert np.abs(np.asarray(Image.open(out)).astype(int) - expected).max() <= 1
    run = subprocess.run([*command, "verify", *place, "--in-turn"], capture_output=True, text=True, check=True)
    assert "FAIL" not in run.stdout and "checks passed" in run.stdout
    for wrong, message in (
        (["draw", *place], "--prompt is missing"),
        (["draw", *place, "--prompt=a", "--seed=x"], "--seed=x is no whole number"),
        (["verify", f"--bundle={tmp_path}", place[1]], "holds no manifest.json"),
        ([], "what shall be done?"),
    ):
        run = subprocess.run([*command, *wrong], capture_output=True, text=True, check=False)
        assert run.returncode == 1 and message in run.stderr and "Exception" not in run.stderr


def test_the_android_shell_fits_our_stubs_of_android_and_litert():
    compiled("shell", [SOURCES["app"], STUBS], [project_jar()])


def test_the_bundle_inside_a_written_project_opens(probe, small_bundle, tmp_path):
    place = write_app("android", small_bundle, tmp_path / "phone") / android.ASSETS
    opened = probe.ask("open", folder=place, digests=True)
    assert opened == {"name": "Small quickstart", "precisions": precisions(small_bundle)}
    name = (tmp_path / "phone" / "app/src/main/res/values/strings.xml").read_text("utf-8")
    assert f">{opened['name']}<" in name


# What the core may use of Java: it is all in Android 7 (API level 24), which has no java.nio.file. What
# compilers write of java.lang.invoke for lambdas and texts, Android's build replaces.
ALLOWED = (
    "java/lang/", "java/util/", "java/io/", "java/text/Normalizer", "java/nio/ByteBuffer", "java/nio/ByteOrder",
    "java/nio/charset/Charset", "java/nio/FloatBuffer", "java/nio/IntBuffer", "java/security/MessageDigest",
)  # fmt: skip
NEWER = ("java/lang/foreign", "java/lang/invoke/VarHandle", "java/lang/Record", "java/util/HexFormat")


def test_the_core_uses_no_class_that_the_oldest_android_lacks():
    with zipfile.ZipFile(project_jar()) as jar:
        names = [name for name in jar.namelist() if name.startswith("dev/snapgen/core/")]
        used = {name for file in names for name in classes(jar.read(file))}
    java_classes = {name for name in used if name.startswith(("java/", "javax/", "jdk/", "sun/"))}
    assert len(java_classes) > 20
    assert {n for n in java_classes if not n.startswith(ALLOWED) or n.startswith(NEWER)} == set()
    assert {n for n in used - java_classes if not n.startswith(("kotlin/", "dev/snapgen/core/", "["))} == set()


def classes(data: bytes) -> set[str]:
    """The classes that a class file names, from its constant pool (the JVM specification, section 4.4)."""
    (count,) = struct.unpack_from(">H", data, 8)
    sizes = {3: 4, 4: 4, 5: 8, 6: 8, 7: 2, 8: 2, 9: 4, 10: 4, 11: 4, 12: 4, 15: 3, 16: 2, 17: 4, 18: 4, 19: 2, 20: 2}
    texts, named, at, i = {}, [], 10, 1
    while i < count:
        tag = data[at]
        if tag == 1:
            (length,) = struct.unpack_from(">H", data, at + 1)
            texts[i] = data[at + 3 : at + 3 + length].decode("utf-8", "replace")
            at += 3 + length
        else:
            if tag == 7:
                named.append(struct.unpack_from(">H", data, at + 1)[0])
            at += 1 + sizes[tag]
        i += 2 if tag in (5, 6) else 1
    return {texts[index] for index in named}
