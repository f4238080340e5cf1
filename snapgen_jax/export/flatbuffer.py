"""What a `.tflite` file says about itself: operators, tensors, inputs and outputs, read from the flatbuffer.

No interpreter is made and no weight is copied, so that a file of gigabytes is described in milliseconds. Apart from
what rewrites a graph (means.py), this is the one place that knows the generated schema.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import mmap
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of the graph: `name`, static `shape`, `dtype` ("float32"), whether it is a stored constant, whether
    every dimension is fixed, and the index of the `buffer` that holds a constant, which several may share."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    constant: bool
    static: bool
    buffer: int = 0


@dataclasses.dataclass(frozen=True)
class Operator:
    """One node of a graph. `name` is the builtin's ("CONV_2D"), or "CUSTOM:<code>" for anything else; `graph` is the
    index of the graph."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    graph: int = 0


@dataclasses.dataclass(frozen=True)
class Description:
    """The graphs of one file. `inputs` and `outputs` are {signature name: {tensor name of the signature: Tensor}};
    `orphans` are tensors that no operator makes or reads, and that are no input or output; `graphs` is {signature name:
    index of its graph}."""

    operators: tuple[Operator, ...]
    tensors: tuple[Tensor, ...]
    inputs: dict[str, dict[str, Tensor]]
    outputs: dict[str, dict[str, Tensor]]
    orphans: tuple[Tensor, ...] = ()
    graphs: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def histogram(self) -> dict[str, int]:
        """{operator: number of nodes}, the most frequent first."""
        return _counted(self.operators)

    def histogram_of(self, signature: str) -> dict[str, int]:
        """The same of the graph of one signature; of a file with one, of all graphs, its branches among them."""
        if len(self.graphs) == 1:
            return self.histogram
        return _counted(operator for operator in self.operators if operator.graph == self.graphs[signature])

    @property
    def max_rank(self) -> int:
        """The highest rank of any tensor."""
        return max((len(tensor.shape) for tensor in self.tensors), default=0)


def _counted(operators: Iterable[Operator]) -> dict[str, int]:
    counts = collections.Counter(operator.name for operator in operators)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def describe(path: str | pathlib.Path) -> Description:
    """Reads a `.tflite` file. Raises `ValueError` where the file is no TFLite model."""
    from ai_edge_litert import schema_py_generated as schema

    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
        if buffer[4:8] != b"TFL3":
            raise ValueError(f"{path} is not a TFLite model: it starts with {buffer[:8]!r}, expected the mark 'TFL3'")
        return _Reader(schema, schema.Model.GetRootAs(buffer, 0)).read()


@dataclasses.dataclass(frozen=True)
class Constant:
    """A tensor whose numbers are stored in the file.

    Attributes:
        graph, name, shape, dtype: of the tensor.
        offset, bytes: where its numbers lie in the file; tensors may share them.
        scale_offset, scales: where its float32 scales lie, and how many there are; 0 where it has none.
        channel: the axis that has a scale each.
    """

    graph: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    bytes: int
    scale_offset: int
    scales: int
    channel: int


def constants(path: str | pathlib.Path) -> Iterator[Constant]:
    """The constants of a `.tflite` file, with the places of their bytes, so that they can be changed in place."""
    from ai_edge_litert import schema_py_generated as schema

    data: Any = np.memmap(path, np.uint8, "r")
    model: Any = schema.Model.GetRootAs(memoryview(data), 0)
    types = _names(schema.TensorType)

    def place(view) -> int:
        return view.ctypes.data - data.ctypes.data

    for i in range(model.SubgraphsLength()):
        graph = model.Subgraphs(i)
        for tensor in map(graph.Tensors, range(graph.TensorsLength())):
            buffer, quantised = model.Buffers(tensor.Buffer()), tensor.Quantization()
            # A file near 2 GB has its numbers behind the flatbuffer, at an offset.
            length = buffer.DataLength() or buffer.Size()
            if not length:
                continue
            scales = quantised.ScaleLength() if tensor.Quantization() else 0
            yield Constant(
                graph=i,
                name=(tensor.Name() or b"").decode(),
                shape=tuple(int(tensor.Shape(j)) for j in range(tensor.ShapeLength())),
                dtype=types[tensor.Type()],
                offset=place(buffer.DataAsNumpy()) if buffer.DataLength() else buffer.Offset(),
                bytes=length,
                scale_offset=place(quantised.ScaleAsNumpy()) if scales else 0,
                scales=scales,
                channel=quantised.QuantizedDimension() if scales else 0,
            )


class _Reader:
    """Walks the generated accessors, which are methods that take an index."""

    def __init__(self, schema, model) -> None:
        self.model = model
        self.types = _names(schema.TensorType)
        self.builtins = _names(schema.BuiltinOperator)

    def read(self) -> Description:
        graphs = [self.model.Subgraphs(i) for i in range(self.model.SubgraphsLength())]
        tensors = [[self._tensor(graph.Tensors(i)) for i in range(graph.TensorsLength())] for graph in graphs]
        operators, orphans = [], []
        for g, (graph, known) in enumerate(zip(graphs, tensors, strict=True)):
            for i in range(graph.OperatorsLength()):
                node = graph.Operators(i)
                inputs = tuple(known[node.Inputs(j)] for j in range(node.InputsLength()) if node.Inputs(j) >= 0)
                outputs = tuple(known[node.Outputs(j)] for j in range(node.OutputsLength()))
                operators.append(Operator(self._operator_name(node.OpcodeIndex()), inputs, outputs, g))
            used = _used(graph)
            orphans += [tensor for i, tensor in enumerate(known) if i not in used]
        inputs, outputs, places = {}, {}, {}
        for i in range(self.model.SignatureDefsLength()):
            signature = self.model.SignatureDefs(i)
            index, key = signature.SubgraphIndex(), signature.SignatureKey().decode()
            graph, known, places[key] = graphs[index], tensors[index], index
            order = [graph.Inputs(j) for j in range(graph.InputsLength())]
            inputs[key] = _mapped(signature.Inputs, signature.InputsLength(), known, order)
            order = [graph.Outputs(j) for j in range(graph.OutputsLength())]
            outputs[key] = _mapped(signature.Outputs, signature.OutputsLength(), known, order)
        return Description(
            tuple(operators), tuple(t for known in tensors for t in known), inputs, outputs, tuple(orphans), places
        )

    def _tensor(self, tensor) -> Tensor:
        buffer = self.model.Buffers(tensor.Buffer())
        # A weight lies in the flatbuffer or, in a file near 2 GB, behind it at an offset.
        constant = buffer.DataLength() > 0 or buffer.Size() > 0
        signature = [tensor.ShapeSignature(i) for i in range(tensor.ShapeSignatureLength())]
        shape = tuple(int(tensor.Shape(i)) for i in range(tensor.ShapeLength()))
        static = all(n >= 0 for n in signature)
        name, dtype = (tensor.Name() or b"").decode(), self.types[tensor.Type()]
        return Tensor(name, shape, dtype, constant, static, tensor.Buffer())

    @functools.cache  # noqa: B019 (the reader lives for one file)
    def _operator_name(self, index: int) -> str:
        code = self.model.OperatorCodes(index)
        # Files written before the field grew to 32 bits hold the code in the deprecated 8-bit field.
        builtin = self.builtins[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
        return f"CUSTOM:{(code.CustomCode() or b'?').decode()}" if builtin == "CUSTOM" else builtin


def _used(graph) -> set[int]:
    """Indices of the tensors that an operator or the graph's own signature names."""
    nodes = [graph.Operators(i) for i in range(graph.OperatorsLength())]
    used = {node.Inputs(j) for node in nodes for j in range(node.InputsLength())}
    used |= {node.Outputs(j) for node in nodes for j in range(node.OutputsLength())}
    used |= {graph.Inputs(j) for j in range(graph.InputsLength())}
    return used | {graph.Outputs(j) for j in range(graph.OutputsLength())}


def _mapped(item, length: int, tensors: list[Tensor], order: list[int]) -> dict[str, Tensor]:
    """The named tensors of a signature in the order of its graph, by which LiteRT's CompiledModel counts buffers."""
    entries = sorted((item(i) for i in range(length)), key=lambda entry: order.index(entry.TensorIndex()))
    return {entry.Name().decode(): tensors[entry.TensorIndex()] for entry in entries}


def _names(enum: type) -> dict[int, str]:
    lower = enum.__name__ == "TensorType"
    return {v: k.lower() if lower else k for k, v in vars(enum).items() if isinstance(v, int)}
