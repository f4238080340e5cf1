"""Loading a checkpoint: every file form, every sharding, every way in which a folder can be wrong."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from safetensors.numpy import save_file

from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.parallel.sharding import tree_shardings
from snapgen_jax.weights import checkpoint
from snapgen_jax.weights.checkpoint import WeightsError
from snapgen_jax.weights.loader import load
from snapgen_jax.weights.mapping import WeightMap, at, conv, fused, linear, one, stack, stacked, to_reference
from snapgen_jax.weights.sources import SOURCES, source

WEIGHT_MAP = WeightMap(
    rules=(
        one("table", "embed.weight"),
        *linear("head", "head"),
        *conv("patch", "patch"),
        stack("blocks/kernel", "layers.{}.weight", range(3), "linear"),
        stack("blocks/gain", "layers.{}.gain", range(3)),
    ),
    aliases=(("tied.weight", "embed.weight"),),
    ignored=(r"decoder\..*",),
    prefixes=("", "model."),
)
SHAPES = {
    "embed.weight": (16, 6),
    "head.weight": (8, 40),
    "head.bias": (8,),
    "patch.weight": (8, 3, 2, 2),
    "patch.bias": (8,),
    **{f"layers.{i}.weight": (8, 24) for i in range(3)},
    **{f"layers.{i}.gain": (8,) for i in range(3)},
}
RULES = [
    ("table", PartitionSpec("fsdp", None)),
    ("head/kernel", PartitionSpec("fsdp", None)),
    ("patch/kernel", PartitionSpec(None, None, None, "fsdp")),
    ("blocks/kernel", PartitionSpec(None, "fsdp", "data")),
]


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    """A checkpoint whose values all three file dtypes hold exactly."""
    random = np.random.default_rng(0)
    return {name: random.integers(-128, 128, shape).astype(np.float32) / 64 for name, shape in SHAPES.items()}


def ours(t: dict[str, np.ndarray]) -> dict:
    """The parameters that the checkpoint should become, written out by hand."""
    return {
        "table": t["embed.weight"],
        "head": {"kernel": t["head.weight"].T, "bias": t["head.bias"]},
        "patch": {"kernel": t["patch.weight"].transpose(2, 3, 1, 0), "bias": t["patch.bias"]},
        "blocks": {
            "kernel": np.stack([t[f"layers.{i}.weight"].T for i in range(3)]),
            "gain": np.stack([t[f"layers.{i}.gain"] for i in range(3)]),
        },
    }


def spec(t: dict[str, np.ndarray]) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), ours(t))


def write(folder, tensors, *, dtype=np.float32, files=1, index=True, stem="model"):
    folder.mkdir(exist_ok=True)
    tensors = {name: np.ascontiguousarray(value.astype(dtype)) for name, value in tensors.items()}
    if files == 1:
        save_file(tensors, folder / f"{stem}.safetensors")
        return folder
    weight_map = {name: f"{stem}-{i % files + 1:05d}-of-{files:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    if index:
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def load_here(folder, tensors, **options):
    return load(folder, WEIGHT_MAP, spec(tensors), SingleDeviceSharding(jax.devices()[0]), **options)


def assert_equal(params, tensors, dtype=jnp.float32):
    for path, (got, want) in enumerate(zip(jax.tree.leaves(params), jax.tree.leaves(ours(tensors)), strict=True)):
        assert got.dtype == dtype
        np.testing.assert_array_equal(np.asarray(got, np.float32), want, err_msg=str(path))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_files_of_every_dtype_load_as_the_dtype_asked_for(tmp_path, tensors, dtype, wanted):
    assert_equal(load_here(write(tmp_path, tensors, dtype=dtype), tensors, dtype=wanted), tensors, wanted)


@pytest.mark.parametrize(("files", "index"), [(1, False), (2, True), (3, True), (3, False)])
def test_any_number_of_files_with_or_without_an_index(tmp_path, tensors, files, index):
    folder = write(tmp_path, tensors, files=files, index=index, stem="diffusion_pytorch_model")
    assert_equal(load_here(folder, tensors, dtype=jnp.float32), tensors)


@pytest.mark.parametrize(("data", "fsdp"), [(1, 8), (2, 4), (8, 1)])
def test_parameters_arrive_sharded_and_a_host_reads_only_slices(tmp_path, tensors, monkeypatch, data, fsdp):
    largest = []
    read = checkpoint.Reader.read
    monkeypatch.setattr(
        checkpoint.Reader, "read", lambda self, *args: largest.append((args[0], read(self, *args))) or largest[-1][1]
    )
    shardings = tree_shardings(spec(tensors), RULES, make_mesh(MeshConfig(data, fsdp)))
    params = load(write(tmp_path, tensors, files=2), WEIGHT_MAP, spec(tensors), shardings, dtype=jnp.float32)
    assert_equal(params, tensors)
    assert jax.tree.map(lambda x: x.sharding, params) == shardings
    assert params["table"].addressable_shards[0].data.shape == (16 // fsdp, 6)
    reads = [array for name, array in largest if name == "head.weight"]
    assert len(reads) == fsdp  # once for every different shard, not once a device
    assert all(array.shape == (8, 40 // fsdp) for array in reads)


@pytest.mark.parametrize("fsdp", [1, 4])
def test_a_part_of_a_tensor_is_read_without_the_others(tmp_path, monkeypatch, fsdp):
    names = ("query", "key", "value")
    weight_map = WeightMap(
        (
            *fused([f"{name}/kernel" for name in names], "qkv.weight", "linear"),
            *fused([f"{name}/bias" for name in names], "qkv.bias"),
            *stacked(at("blocks", fused(("a", "b"), "blocks.{}")), range(2)),
        )
    )
    random = np.random.default_rng(0)
    tensors = {"qkv.weight": (24, 5), "qkv.bias": (24,), "blocks.0": (16, 3), "blocks.1": (16, 3)}
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in tensors.items()}
    cuts = {name: slice(8 * i, 8 * i + 8) for i, name in enumerate(names)}
    expected = {
        **{
            name: {"kernel": tensors["qkv.weight"][rows].T, "bias": tensors["qkv.bias"][rows]}
            for name, rows in cuts.items()
        },
        "blocks": {
            name: np.stack([tensors[f"blocks.{layer}"][8 * i : 8 * i + 8] for layer in range(2)])
            for i, name in enumerate("ab")
        },
    }
    sizes = []
    read = checkpoint.Reader.read
    monkeypatch.setattr(checkpoint.Reader, "read", lambda *args: sizes.append(read(*args)) or sizes[-1])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), expected)
    rules = [("kernel", PartitionSpec(None, "fsdp")), ("bias", PartitionSpec("fsdp")), ("blocks", PartitionSpec())]
    shardings = tree_shardings(shapes, rules, make_mesh(MeshConfig(8 // fsdp, fsdp)))
    params = load(write(tmp_path, tensors), weight_map, shapes, shardings, dtype=jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert max(array.shape[0] for array in sizes) == 8 and {array.shape for array in sizes} >= {(8 // fsdp, 5)}
    written = to_reference(weight_map, params)
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor)


def test_a_snapshot_of_a_hub_which_is_links_into_its_cache_is_read(tmp_path, tensors):
    blobs = write(tmp_path / "blobs", tensors, files=2)
    snapshot = tmp_path / "snapshots" / "1a2b"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(blobs.iterdir())):
        file.rename(blobs / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert_equal(load_here(snapshot, tensors, dtype=jnp.float32), tensors)


def test_a_tied_tensor_may_have_either_name_or_both(tmp_path, tensors):
    renamed = {("tied.weight" if name == "embed.weight" else name): value for name, value in tensors.items()}
    assert_equal(load_here(write(tmp_path / "a", renamed), tensors, dtype=jnp.float32), tensors)
    both = {**tensors, "tied.weight": tensors["embed.weight"]}
    assert_equal(load_here(write(tmp_path / "b", both), tensors, dtype=jnp.float32), tensors)


def test_a_prefix_and_tensors_of_other_parts_are_accepted_where_the_map_says_so(tmp_path, tensors):
    whole = {f"model.{name}": value for name, value in tensors.items()} | {"decoder.weight": np.zeros(3)}
    assert_equal(load_here(write(tmp_path, whole), tensors, dtype=jnp.float32), tensors)


@pytest.mark.parametrize("other", ["model.fp16", "model.non_ema", "model.backup", "a.b.c"])
def test_what_lies_beside_the_plain_files_under_a_name_of_its_own_is_left_alone(tmp_path, tensors, other):
    write(tmp_path, {name: 2 * value for name, value in tensors.items()}, stem=other)
    write(tmp_path, tensors)
    assert_equal(load_here(tmp_path, tensors, dtype=jnp.float32), tensors)


@pytest.mark.parametrize("variant", checkpoint.VARIANTS)
def test_the_only_variant_there_is_is_read(tmp_path, tensors, variant):
    write(tmp_path, {name: 2 * value for name, value in tensors.items()}, stem="model.backup")
    write(tmp_path, tensors, stem=f"model.{variant}")
    assert_equal(load_here(tmp_path, tensors, dtype=jnp.float32), tensors)


@pytest.mark.parametrize(
    ("shard", "index"),
    [
        ("diffusion_pytorch_model.fp16-0000{}-of-00002.safetensors", "safetensors.index.fp16.json"),
        ("diffusion_pytorch_model-0000{}-of-00002.fp16.safetensors", "safetensors.fp16.index.json"),
        ("diffusion_pytorch_model.fp16-0000{}-of-00002.safetensors", ""),
    ],
)
def test_a_variant_of_several_files_is_read_by_its_index_or_without(tmp_path, tensors, shard, index):
    halves = {1: dict(list(tensors.items())[::2]), 2: dict(list(tensors.items())[1::2])}
    for number, half in halves.items():
        save_file({name: np.ascontiguousarray(value) for name, value in half.items()}, tmp_path / shard.format(number))
    if index:
        listed = {name: shard.format(number) for number, half in halves.items() for name in half}
        (tmp_path / f"diffusion_pytorch_model.{index}").write_text(json.dumps({"weight_map": listed}))
    assert_equal(load_here(tmp_path, tensors, dtype=jnp.float32), tensors)


def test_of_several_variants_without_a_plain_file_one_is_to_be_kept(tmp_path, tensors):
    for variant in ("fp16", "bf16"):
        write(tmp_path, tensors, stem=f"model.{variant}")
    said = r"several variants .* \(bf16: model\.bf16\.safetensors; fp16: model\.fp16\.safetensors\); keep the one"
    with pytest.raises(WeightsError, match=said):
        load_here(tmp_path, tensors)
    (tmp_path / "model.bf16.safetensors").unlink()
    assert_equal(load_here(tmp_path, tensors, dtype=jnp.float32), tensors)


def test_one_error_names_every_wrong_tensor_before_any_is_read(tmp_path, tensors, monkeypatch):
    def never(*_):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(checkpoint.Reader, "read", never)
    wrong = {**tensors, "head.weight": np.zeros((40, 8)), "new.a": np.zeros(2), "new.b": np.zeros(2)}
    del wrong["layers.1.gain"], wrong["patch.bias"]
    write(tmp_path, wrong)
    save_file({"head.bias": np.zeros(8, np.int32)}, tmp_path / "extra.safetensors")
    save_file({n: v.astype(np.float32) for n, v in wrong.items() if n != "head.bias"}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError) as error:
        load_here(tmp_path, tensors, source=SOURCES["gemma2_2b"])
    message = str(error.value)
    assert "(2 missing, 2 surplus, 1 misshapen, 1 dtype)" in message
    for line in (
        "missing: layers.1.gain [8]",
        "missing: patch.bias [8]",
        "surplus: new.a [2]",
        "surplus: new.b [2]",
        "misshapen: head.weight is [40, 8]; the network has [8, 40]",
        "dtype: head.bias is I32",
        "https://huggingface.co/google/gemma-2-2b (Gemma Terms of Use)",
    ):
        assert line in message


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "..\\m.safetensors"]
)
def test_an_index_may_not_leave_its_folder(tmp_path, tensors, name):
    write(tmp_path, tensors)
    write(tmp_path / "inner", {"x": np.zeros(1)})
    (tmp_path / "inner" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"embed.weight": name}}))
    with pytest.raises(WeightsError, match="may name files of its own folder only"):
        load_here(tmp_path / "inner", tensors)


def test_a_broken_index_is_refused(tmp_path, tensors):
    folder = write(tmp_path, tensors, files=2)
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {**listed["weight_map"], "embed.weight": "model.bin"}}))
    with pytest.raises(WeightsError, match=r"only safetensors files are read"):
        load_here(folder, tensors)
    index.write_text(json.dumps({"weight_map": {**listed["weight_map"], "ghost": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(WeightsError, match=r"lists tensors that its files do not hold: ghost"):
        load_here(folder, tensors)
    index.write_text("[]")
    with pytest.raises(WeightsError, match="is not an index"):
        load_here(folder, tensors)
    index.write_text(json.dumps(listed))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"names files that .* does not hold: model-00002-of-00002\.safetensors"):
        load_here(folder, tensors)


def test_a_missing_or_gated_download_is_told_where_to_come_from_and_its_licence(tmp_path, tensors):
    with pytest.raises(WeightsError) as error:
        load_here(tmp_path / "absent", tensors, source=source("sd35_large"))
    message = str(error.value)
    assert "absent is not a folder" in message
    assert "https://huggingface.co/stabilityai/stable-diffusion-3.5-large (Stability AI Community License" in message
    assert "gated" in message
    assert "hf download stabilityai/stable-diffusion-3.5-large --include 'transformer/*'" in message
    with pytest.raises(ValueError, match="did you mean 'gemma2_2b'"):
        source("gemma_2b")


def test_folders_without_usable_files_say_what_they_hold(tmp_path, tensors):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"no safetensors file; pytorch_model\.bin may execute code"):
        load_here(tmp_path, tensors)
    write(tmp_path / "text_encoder", tensors, stem="model.fp16")
    with pytest.raises(WeightsError, match="its folders text_encoder do"):
        load_here(tmp_path, tensors)
    write(tmp_path / "backup", tensors, stem="model.backup")
    with pytest.raises(WeightsError, match=r"of a known name; model\.backup\.safetensors is neither .*: rename it"):
        load_here(tmp_path / "backup", tensors)
    with pytest.raises(WeightsError, match="copy it to a local disk first"):
        load_here("gs://bucket/t5", tensors)


def test_a_half_fetched_file_is_named(tmp_path, tensors):
    file = write(tmp_path, tensors) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(WeightsError, match=r"model\.safetensors .* is not a whole safetensors file"):
        load_here(tmp_path, tensors)


def test_two_files_with_the_same_tensor_are_refused(tmp_path, tensors):
    write(tmp_path, tensors)
    write(tmp_path, tensors, stem="copy")
    with pytest.raises(WeightsError, match=r"is in copy\.safetensors and in model\.safetensors"):
        load_here(tmp_path, tensors)


def test_replicated_parameters_are_on_every_device(tmp_path, tensors):
    mesh = make_mesh(MeshConfig(8, 1))
    params = load(
        write(tmp_path, tensors), WEIGHT_MAP, spec(tensors), NamedSharding(mesh, PartitionSpec()), dtype=jnp.float32
    )
    assert_equal(params, tensors)
    assert all(len(leaf.addressable_shards) == 8 for leaf in jax.tree.leaves(params))
