"""Puts means back together: TensorFlow's converter writes them as a SUM and a product with 1/n.

The sum of the squares of an image's activations passes float16's 65504 in a network whose every activation is small,
and a GPU that computes in float16 then normalises by infinity. MEAN leaves the accumulation to the kernel.
"""

from __future__ import annotations

import collections
import math
import pathlib
from typing import Any

import numpy as np


def sums_to_means(path: pathlib.Path) -> int:
    """Rewrites each `MUL(SUM(x), 1/n)` of a `.tflite` file, n the number of summed elements, as `MEAN(x)`.

    Returns:
        How many there were.
    """
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model: Any = flatbuffer_utils.read_model(str(path))
    codes = [flatbuffer_utils.get_builtin_code_from_operator_code(code) for code in model.operatorCodes]
    builtin = schema.BuiltinOperator
    mean = schema.OperatorCodeT()
    mean.builtinCode = mean.deprecatedBuiltinCode = builtin.MEAN
    mean.version = 1
    rewritten = 0
    for graph in model.subgraphs:
        users = collections.defaultdict(list)
        for operator in graph.operators:
            for tensor in operator.inputs:
                users[tensor].append(operator)
        products = []
        for operator in graph.operators:
            (total, *_), made = operator.outputs, users[operator.outputs[0]]
            if codes[operator.opcodeIndex] != builtin.SUM or len(made) != 1 or total in graph.outputs:
                continue
            (product,) = made
            if codes[product.opcodeIndex] != builtin.MUL or product.builtinOptions.fusedActivationFunction:
                continue
            factor = _scalar(model, graph.tensors[next(t for t in product.inputs if t != total)])
            n = _size(graph.tensors[operator.inputs[0]]) / _size(graph.tensors[total])
            if factor is None or not math.isclose(factor * n, 1, rel_tol=1e-6):
                continue
            operator.opcodeIndex, operator.outputs = len(model.operatorCodes), product.outputs
            products.append(product)
        graph.operators = [operator for operator in graph.operators if not any(operator is p for p in products)]
        rewritten += len(products)
        if products:
            _drop_orphans(model, graph)
    if rewritten:
        model.operatorCodes.append(mean)
        flatbuffer_utils.write_model(model, str(path))
    return rewritten


def _drop_orphans(model: Any, graph: Any) -> None:
    """Removes the tensors that nothing uses any more; the calibration of integers fails on them."""
    lists = [graph, *graph.operators]
    used = {int(i) for item in lists for indices in (item.inputs, item.outputs) for i in indices}
    place = {old: new for new, old in enumerate(i for i in range(len(graph.tensors)) if i in used)}
    place[-1] = -1  # an input that is left out
    graph.tensors = [tensor for i, tensor in enumerate(graph.tensors) if i in used]
    for item in lists:
        item.inputs, item.outputs = ([place[int(i)] for i in indices] for indices in (item.inputs, item.outputs))
    for signature in model.signatureDefs or []:
        if model.subgraphs[signature.subgraphIndex] is graph:
            for entry in [*signature.inputs, *signature.outputs]:
                entry.tensorIndex = place[entry.tensorIndex]


def _size(tensor: Any) -> int:
    return math.prod(int(length) for length in tensor.shape)


def _scalar(model: Any, tensor: Any) -> float | None:
    """The value of a constant with one float32 element; None for any other tensor."""
    data = model.buffers[tensor.buffer].data
    if data is None or len(data) != 4 or _size(tensor) != 1:
        return None
    return float(np.frombuffer(bytes(data), "<f4")[0])
