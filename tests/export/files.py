"""Small `.tflite` files, written operator by operator: what no converter can be asked for."""

import pathlib

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

Shape = tuple[int, ...]


def binary_file(path: pathlib.Path, name: str, x: Shape, table: Shape, orphan: Shape | None = None) -> pathlib.Path:
    """Writes signature "f": y = x (operator) t, where x is the input and t a constant; `orphan` adds a tensor."""
    shapes = {"x": x, "t": table, "y": np.broadcast_shapes(x, table)}
    shapes |= {} if orphan is None else {"orphan": orphan}
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version, graph.name = 3, b"main"
    model.buffers = [schema.BufferT() for _ in range(len(shapes) + 1)]
    model.buffers[2].data = np.random.default_rng(0).standard_normal(table).astype("<f4").tobytes()
    graph.tensors = []
    for i, (tensor_name, shape) in enumerate(shapes.items()):
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.buffer = tensor_name.encode(), np.array(shape, np.int32), i + 1
        tensor.type = schema.TensorType.FLOAT32
        graph.tensors.append(tensor)
    code, operator = schema.OperatorCodeT(), schema.OperatorT()
    code.builtinCode = code.deprecatedBuiltinCode = getattr(schema.BuiltinOperator, name)
    code.version, operator.opcodeIndex = 1, 0
    operator.inputs, operator.outputs = np.array([0, 1], np.int32), np.array([2], np.int32)
    operator.builtinOptions = getattr(schema, f"{name.title()}OptionsT")()
    operator.builtinOptionsType = getattr(schema.BuiltinOptions, f"{name.title()}Options")
    graph.operators, graph.inputs, graph.outputs = [operator], np.array([0], np.int32), np.array([2], np.int32)
    model.operatorCodes, model.subgraphs = [code], [graph]
    signature = schema.SignatureDefT()
    signature.signatureKey, signature.subgraphIndex = b"f", 0
    signature.inputs, signature.outputs = [_named(b"x", 0)], [_named(b"y", 2)]
    model.signatureDefs = [signature]
    flatbuffer_utils.write_model(model, str(path))
    return path


def _named(name: bytes, index: int) -> schema.TensorMapT:
    entry = schema.TensorMapT()
    entry.name, entry.tensorIndex = name, index
    return entry
