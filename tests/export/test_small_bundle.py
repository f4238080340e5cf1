"""The bundle that tests of clients share is what they expect: a guided flow on patches, from prompts."""

import json

import numpy as np

from snapgen_jax.export.client import MANIFEST_SCHEMA, LiteRTGenerator
from snapgen_jax.export.manifest import About
from snapgen_jax.export.program import Flow
from snapgen_jax.export.run import about_run
from snapgen_jax.export.verify import grey_levels

from .conftest import ABOUT, PROMPTS


def test_the_shared_bundle_draws_from_prompts(small_bundle):
    generator = LiteRTGenerator(small_bundle)
    program = generator.program
    assert isinstance(program, Flow) and program.steps[0].guided and len(program.times) == 5
    assert program.steps[0].prediction["kind"] == "x_0" and program.decoder["kind"] == "patch"
    images = generator.generate(PROMPTS)
    assert images.shape == (2, 32, 32, 3) and images.std() > 10
    assert grey_levels(images, np.load(small_bundle / "golden" / "outputs" / "image.npy")).max() <= 1


def test_the_manifest_says_whose_a_bundle_is_and_what_it_takes(small_bundle):
    manifest = json.loads((small_bundle / "manifest.json").read_text())
    assert manifest["schema"] == MANIFEST_SCHEMA == 4
    assert About(*(manifest[name] for name in ("model", "licence", "provenance"))) == ABOUT
    readme = (small_bundle / "README.md").read_text("utf-8")
    assert readme.startswith("# Small quickstart\n") and "Licence of the weights: apache-2.0." in readme
    assert manifest["minimum_runtime"].keys() == {"ai-edge-litert", "android", "litert.js"}
    for unit in manifest["units"].values():
        assert unit["accelerators_verified"]["cpu"] == manifest["precisions"]
        assert set(unit["accelerators_verified"]["gpu"]) == set(unit["gpu"].get("rel_l2", ()))
        assert all(0 < unit["load_bytes"][precision] < unit["peak_bytes"][precision] for precision in unit["files"])
        assert sorted(unit["input_order"]) == list(unit["inputs"]) and unit["output_order"]


def test_a_runs_provenance_is_its_config_and_its_commit(tmp_path):
    workdir = tmp_path / "my_run"
    workdir.mkdir()
    assert about_run(workdir) == About("my_run", "", {})
    (workdir / "config.json").write_text("{}")
    (workdir / "run.json").write_text(json.dumps({"commit": "1a2b"}))
    digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    expected = About("Mine", "mit", {"config_sha256": digest, "commit": "1a2b"})
    assert about_run(workdir, "Mine", "mit") == expected
