"""What a phone does not run is refused, with the operator and the tensor named."""

import importlib.util

import jax.numpy as jnp
import pytest

from snapgen_jax import cli
from snapgen_jax.export.compat import IncompatibleModelError, Requirements, breaches, check
from snapgen_jax.export.convert import BACKENDS, ConversionError, to_tflite
from snapgen_jax.export.flatbuffer import Description, Operator, Tensor, describe

from .conftest import QUICK, array
from .files import binary_file

FLOAT = Tensor("x", (1, 4), "float32", constant=False, static=True)


def graph(*operators: Operator, io: Tensor = FLOAT) -> Description:
    tensors = (io, *(t for op in operators for t in op.outputs))
    return Description(operators, tensors, {"f": {"x": io}}, {"f": {"y": io}})


def op(name: str, *outputs: Tensor) -> Operator:
    return Operator(name, (FLOAT,), outputs or (FLOAT,))


@pytest.mark.parametrize(
    "name, message",
    [
        ("CUSTOM:FlexErf", "CUSTOM:FlexErf needs TensorFlow's own kernels"),
        ("CUSTOM:my_op", "CUSTOM:my_op is a custom operator"),
        ("STABLEHLO_CONVOLUTION", "STABLEHLO_CONVOLUTION was not lowered"),
        ("WHILE", "WHILE is control flow"),
    ],
)
def test_an_operator_outside_the_builtins_is_named(name, message):
    (found,) = breaches(graph(op("ADD"), op(name)), Requirements())
    assert found.startswith(message) and "'x' [1, 4]" in found


def test_a_gather_is_for_the_cpu_only():
    assert not breaches(graph(op("GATHER_ND")), Requirements())
    (found,) = breaches(graph(op("GATHER_ND")), Requirements(gpu=True))
    assert "GATHER_ND is not run by the GPU accelerator" in found


@pytest.mark.parametrize(
    "one, other, wrong",
    [
        ((6, 8), (1, 6, 8), True),  # tokens without their batch, and a table of positions
        ((1, 6, 8), (6, 8), True),
        ((4, 8), (1, 4, 4, 8), True),
        ((4, 4, 8), (1, 4, 4, 8), True),
        ((1, 4, 4, 8), (1, 4, 4, 8), False),
        ((1, 8), (1, 4, 4, 8), False),
        ((8,), (1, 4, 4, 8), False),
        ((), (1, 4, 8), False),
    ],
)
def test_ranks_that_a_gpu_misreads_are_refused_in_a_real_file(tmp_path, one, other, wrong):
    path = binary_file(tmp_path / "add.tflite", "ADD", one, other)
    check(path)  # a CPU computes all of them
    if not wrong:
        check(path, Requirements(gpu=True))
        return
    with pytest.raises(
        IncompatibleModelError, match=r"ADD of '.' \[.*\] and '.' \[.*\] is computed wrongly by the GPU"
    ):
        check(path, Requirements(gpu=True))


def test_a_tensor_that_nothing_uses_is_named(tmp_path):
    path = binary_file(tmp_path / "add.tflite", "ADD", (1, 8), (1, 8), orphan=(3, 2))
    with pytest.raises(IncompatibleModelError, match=r"tensor 'orphan' \[3, 2\] is used by no operator"):
        check(path)


def test_a_missing_operator_is_named():
    assert breaches(graph(op("MUL")), Requirements(required=("DEPTHWISE_CONV_2D",))) == [
        "there is no DEPTHWISE_CONV_2D in the graph"
    ]


def test_inputs_of_other_dtypes_and_open_shapes_are_named():
    (found,) = set(breaches(graph(io=Tensor("x", (1,), "int64", False, True)), Requirements())) - {
        "output 'y' is int64; float32 or int32 was expected"
    }
    assert found == "input 'x' is int64; float32 or int32 was expected"
    (found,) = breaches(graph(io=Tensor("x", (1, 4), "float32", False, False)), Requirements())
    assert found == "tensor 'x' has a shape that is only known at run time"


def test_rank_five_is_refused_in_a_real_file(tmp_path):
    def shuffle(params, *, x):
        y = x.reshape(1, 4, 2, 2, 6).transpose(0, 2, 1, 3, 4)
        return {"y": (y * params["w"]).reshape(1, 8, 2, 6)}

    path = to_tflite(shuffle, {"w": jnp.arange(6.0)}, {"x": array(1, 4, 4, 6)}, "shuffle", tmp_path / "x.tflite", QUICK)
    with pytest.raises(IncompatibleModelError, match=r"TRANSPOSE makes .* of shape \[1, 2, 4, 2, 6\]: rank 5"):
        check(path)
    assert check(path, Requirements(max_rank=5)).max_rank == 5


def test_a_file_describes_its_signature_and_operators(toy):
    found = describe(toy.folder / "net_f32.tflite")
    assert {name: tensor.shape for name, tensor in found.inputs["net"].items()} == {
        "latent": (1, 4, 4, 3),
        "time": (1, 16),
        "sequence": (1, 6, 8),
        "mask": (1, 6),
        "pooled": (1, 8),
    }
    assert found.outputs["net"]["prediction"].dtype == "float32"
    assert sum(found.histogram.values()) == len(found.operators) and found.histogram["TANH"] == 1
    assert any(tensor.constant for tensor in found.tensors)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "x.tflite").write_bytes(b"not a model at all")
    with pytest.raises(ValueError, match="is not a TFLite model"):
        describe(tmp_path / "x.tflite")


def test_what_does_not_export_is_said_before_or_by_the_converter(tmp_path):
    target = tmp_path / "x.tflite"
    with pytest.raises(ValueError, match="input 'x' is bfloat16; a file takes float32 and int32 only"):
        to_tflite(lambda p, x: {"y": x}, {}, {"x": array(1, 4, dtype=jnp.bfloat16)}, "f", target, QUICK)
    with pytest.raises(ValueError, match="unknown export backend 'onnx'"):
        to_tflite(lambda p, x: {"y": x}, {}, {"x": array(1, 4)}, "f", target, "onnx")
    weights = jnp.ones((1, 4, 4))

    def bfloat16_inside(params, *, x):
        return {"y": jnp.matmul(x.astype(jnp.bfloat16), params.astype(jnp.bfloat16)).astype(jnp.float32)}

    with pytest.raises(ConversionError, match=r"f: the '\w+' backend failed"):
        to_tflite(bfloat16_inside, weights, {"x": array(1, 4, 4)}, "f", target, QUICK)
    with pytest.raises(TypeError, match="dot_general requires contracting dimensions"):  # the function's own error
        to_tflite(lambda params, x: {"y": x @ params}, weights, {"x": array(1, 4, 5)}, "f", target, QUICK)


@pytest.mark.parametrize(("backend", "extra"), [("jax2tf", "export"), ("litert", "export-litert")])
def test_a_converter_that_is_not_installed_is_named_before_a_run_is_read(backend, extra, tmp_path, monkeypatch, capsys):
    library = BACKENDS[backend][0]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == library else find(name, *rest))
    assert cli.main(["export", f"--workdir={tmp_path}/run", f"--backend={backend}"]) == 78
    assert f"needs {library}, which is not installed: pip install 'snapgen-jax[{extra}]'" in capsys.readouterr().err
    with pytest.raises(ImportError, match=library):
        to_tflite(lambda p, x: {"y": x}, {}, {"x": array(1, 4)}, "f", tmp_path / "x.tflite", backend)
