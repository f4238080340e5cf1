"""An example as bytes, and back: what a record of a shard holds.

MessagePack, in which names are sorted, so that equal examples are equal bytes. An array is kept with its dtype,
bfloat16 included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  # registers bfloat16 with NumPy by name
import msgpack
import numpy as np

_ARRAY = 1  # MessagePack's code of an extension type; 0 to 127 are the application's


def pack(example: Mapping[str, Any]) -> bytes:
    """The bytes of an example.

    Args:
        example: `{name: array, string, bytes, number, bool, None, or a list or mapping of these}`. A scalar of NumPy
            is an array without axes.

    Raises:
        TypeError: a value is none of these.
    """
    packed = msgpack.packb(_ordered(example), default=_extension, strict_types=False)
    assert packed is not None
    return packed


def unpack(record: bytes) -> dict[str, Any]:
    """The example of some bytes. Arrays are read-only views of them.

    Raises:
        ValueError: the bytes hold no example.
    """
    try:
        example = msgpack.unpackb(record, ext_hook=_value)
    except (msgpack.UnpackException, TypeError, ValueError) as error:
        raise ValueError(f"a record holds no example: {error}") from error
    if not isinstance(example, dict):
        raise ValueError(f"a record holds no example but {type(example).__name__}")
    return example


def _ordered(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _ordered(value[name]) for name in sorted(value)}
    if isinstance(value, np.float64):  # a Python float too, which MessagePack would take it for
        return np.asarray(value)
    return [_ordered(item) for item in value] if isinstance(value, list | tuple) else value


def _extension(value: Any) -> msgpack.ExtType:
    array = np.asarray(value)
    if array.dtype.kind in "OSUM" or not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"an example holds {type(value).__name__}; expected arrays of numbers, strings, bytes, lists")
    header = msgpack.packb([array.dtype.name, list(array.shape)])
    assert header is not None
    return msgpack.ExtType(_ARRAY, header + np.ascontiguousarray(array).tobytes())


def _value(code: int, data: bytes) -> Any:
    if code != _ARRAY:
        raise ValueError(f"an unknown extension type, {code}")
    unpacker = msgpack.Unpacker()
    unpacker.feed(data)
    name, shape = unpacker.unpack()
    return np.frombuffer(data, np.dtype(name), offset=unpacker.tell()).reshape(shape)
