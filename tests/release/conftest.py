"""Three runs whose workdirs are gone: what is left are their folders of weights."""

import jax
import numpy as np
import pytest

from snapgen_jax.config import from_json
from snapgen_jax.generation import load
from snapgen_jax.release.card import Licence
from snapgen_jax.release.writer import export_weights
from snapgen_jax.training.metrics import MetricWriter
from tests.released_for_tests import PROMPTS, Released, saved


@pytest.fixture(scope="package")
def released(tmp_path_factory):
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    root = tmp_path_factory.mktemp("released")
    runs, folders = root / "runs", {name: root / name for name in ("clip", "autoencoder", "student", "student_trained")}
    states = {name: saved(f"shapes/{name}", runs / name) for name in ("clip", "autoencoder")}
    clip, autoencoder = (from_json((runs / name / "config.json").read_text()) for name in ("clip", "autoencoder"))
    on_them = [
        f"inputs.text={clip.inputs.text.to_dict()}",
        "inputs.codec.kind=autoencoder",
        f"inputs.codec.autoencoder={autoencoder.autoencoder.to_dict()}",
        "network.latent_channels=4",
    ]
    places = [f"inputs.text_workdir={runs / 'clip'}", f"inputs.codec.workdir={runs / 'autoencoder'}"]
    states["student"] = saved("shapes/quickstart", runs / "student", *on_them, *places)
    writer = MetricWriter(runs / "student", 2, tensorboard=False)
    writer.evaluation(2, "frechet|<b>", {"fid": 31.25}, {"grid": np.zeros((4, 4, 3), np.uint8)})
    export_weights(runs / "student", folders["student"], title="A <script>", licence=Licence("apache-2.0"))
    export_weights(runs / "student", folders["student_trained"], kept="trained", shard_bytes=20_000)
    for name in ("clip", "autoencoder"):
        export_weights(runs / name, folders[name])
    images = load(runs / "student").generate(PROMPTS, seed=3)
    embeddings = load(runs / "clip").run(PROMPTS)["text"]
    runs.rename(root / "moved")
    yield Released(folders, states, root / "moved", on_them, images, embeddings)
    jax.config.update("jax_disable_most_optimizations", before)
