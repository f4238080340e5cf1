"""Packed files: bit for bit what was packed, as small as the formula says, and one clear error for any other file."""

import itertools
import json
import math
import pathlib
import struct
import tracemalloc
import zlib

import numpy as np
import pytest

from snapgen_jax.export import digits, unpacking
from snapgen_jax.export.digits import PackedError, decode, encode, group, levels, stored_bytes
from snapgen_jax.export.packed import FORMAT
from snapgen_jax.export.packing import Filling, Original, sizes, write_packed
from snapgen_jax.export.unpacking import PackedFile, Stopped
from snapgen_jax.training.exports import Stored

ROOT = pathlib.Path(__file__).parents[2]
BITS = range(1, 9)
SHAPES = [(1,), (7,), (3, 5), (3, 3, 8, 16), (1, 1, 320, 40), (2, 0, 3), ()]


def draw(bits: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    half = levels(bits) // 2
    return np.random.default_rng(seed).integers(-half, half + 1, shape)


def stored(bits: int, shape: tuple[int, ...], seed: int = 0) -> Stored:
    scale = np.random.default_rng(seed + 1).uniform(0.01, 1, shape[-1:]).astype(np.float32)
    return Stored(draw(bits, shape, seed), scale, bits)


@pytest.fixture
def packed(tmp_path):
    """A file with a weight of each number of bits and two arrays."""
    weights = {f"net/layer_{bits}/kernel": stored(bits, (3, 3, 5, 16), bits) for bits in BITS}
    others = {"net/norm/scale": np.array([1.5, -2], np.float32), "time/table": np.ones((2, 3), np.float16)}
    return write_packed(tmp_path / "net.packed", weights, others), weights, others


# --- the digits -------------------------------------------------------------------------------------------------------


def test_the_groups_are_the_best_that_fit_into_57_bits():
    assert [group(bits) for bits in BITS] == [(29, 46), (3, 7), (17, 54), (11, 45), (11, 56), (9, 55), (8, 57), (1, 8)]
    for bits in BITS:
        n, k = group(bits)
        assert 2 ** (k - 1) < levels(bits) ** n <= 2**k
        every = ((m, (levels(bits) ** m - 1).bit_length()) for m in range(1, 58))
        assert k / n == min(size / m for m, size in every if size <= 57)


def test_two_small_examples_by_hand():
    """Three quinary digits in seven bits: 1 + 2, 2 + 2, -2 + 2 is 3 + 4 * 5 + 0 * 25 = 23; then 0, 0, 0 is 62."""
    assert encode(np.array([1, 2, -2, 0, 0, 0]), 2) == (23 + (62 << 7)).to_bytes(2, "little")
    assert encode(np.array([-127, 0, 127]), 8) == bytes([0, 127, 254])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_gives_back_what_was_encoded(bits, shape):
    for seed in range(3):
        integers = draw(bits, shape, seed)
        data = encode(integers, bits)
        assert len(data) == stored_bytes(integers.size, bits)
        assert np.array_equal(decode(data, bits)[: integers.size], integers.reshape(-1))


@pytest.mark.parametrize("bits", BITS)
def test_every_length_and_the_extreme_integers_are_exact(bits):
    half = levels(bits) // 2
    for length, value in itertools.product(range(2 * 8 * group(bits)[0] + 2), (-half, half)):
        data = encode(np.full(length, value, np.int8), bits)
        assert (decode(data, bits)[:length] == value).all() and len(data) == stored_bytes(length, bits)


@pytest.mark.parametrize("bits", BITS)
def test_integers_beyond_the_levels_are_refused(bits):
    half = levels(bits) // 2
    for bad in ([0, half + 1], [-half - 1, 0]):
        with pytest.raises(PackedError, match=rf"{bits} bits lie in -{half}\.\.{half}; got"):
            encode(np.array(bad), bits)


@pytest.mark.parametrize("bits", [0, 9, 2.0, True])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(PackedError, match="1 to 8 bits"):
        group(bits)


def test_a_number_that_is_larger_than_its_digits_is_damage():
    with pytest.raises(PackedError, match="larger than 3 digits of radix 5"):
        decode(bytes([127]), 2)


# --- the file ---------------------------------------------------------------------------------------------------------


def test_a_file_gives_back_weights_scales_and_arrays_bit_for_bit(packed):
    path, weights, others = packed
    with PackedFile(path) as found:
        assert list(found.weights) == list(weights) and list(found.arrays) == list(others)
        for name, weight in weights.items():
            assert np.array_equal(found.integers(name), weight.integers) and found.integers(name).dtype == np.int8
            assert np.array_equal(found.scale(name).reshape(-1), weight.scale)
            assert found.weights[name].bits == weight.bits
        for name, array in others.items():
            assert np.array_equal(found.array(name), array) and found.array(name).dtype == array.dtype
        for ask in (found.integers, found.scale, found.array):
            with pytest.raises(PackedError, match=r"has no .* 'nothing'; it has net/"):
                ask("nothing")


def test_a_file_has_the_bytes_of_the_formula_and_a_header(packed):
    path, weights, others = packed
    found = sizes(
        [(weight.integers.shape, weight.scale.size, weight.bits) for weight in weights.values()],
        [(array.shape, array.dtype.itemsize) for array in others.values()],
    )
    (header,) = struct.unpack_from("<I", path.read_bytes(), 12)
    assert path.stat().st_size == unpacking.PREFIX.size + header + found.total
    assert found.count == 8 * 720 and found.float16 == 2 * (found.count + 8)
    assert found.information == pytest.approx(sum(720 * math.log2(levels(bits)) for bits in BITS) / 8)
    assert found.information < found.weights < 1.03 * found.information


def test_the_same_weights_give_the_same_bytes(packed, tmp_path):
    path, weights, others = packed
    assert write_packed(tmp_path / "again.packed", weights, others).read_bytes() == path.read_bytes()


def test_a_scale_of_any_shape_that_broadcasts_comes_back(tmp_path):
    for shape in ((), (1,), (4,), (3, 1), (3, 4)):
        weight = Stored(draw(2, (3, 4)), np.random.default_rng(0).random(shape, np.float32), 2)
        with PackedFile(write_packed(tmp_path / "x.packed", {"w": weight})) as found:
            used = (weight.integers * weight.scale).astype(np.float32)
            assert np.array_equal(found.integers("w") * found.scale("w"), used)


@pytest.mark.parametrize("array", [np.zeros(2), np.array(["a"]), np.zeros(2, np.complex64)])
def test_arrays_of_other_dtypes_are_refused_and_nothing_is_left(tmp_path, array):
    with pytest.raises(PackedError, match=r"'x' is .*; arrays of float32, float16"):
        write_packed(tmp_path / "x.packed", {}, {"x": array})
    assert not list(tmp_path.iterdir())


def test_a_weight_beyond_its_levels_is_named_and_what_was_there_stays(packed):
    path, *_ = packed
    before = path.read_bytes()
    with pytest.raises(PackedError, match="'net/kernel': integers of 1 bits"):
        write_packed(path, {"net/kernel": Stored(np.array([2]), np.ones(1), 1)})
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_memory_is_bounded_by_a_block_and_not_by_the_weight(tmp_path):
    weight = {"w": stored(1, (4_000_000,))}
    weight["w"] = Stored(weight["w"].integers.astype(np.int8), np.array([0.5], np.float32), 1)
    original = _original(tmp_path, weight["w"], "int8")
    path = write_packed(tmp_path / "w.packed", weight, original=original)
    tracemalloc.start()
    with PackedFile(path) as found:
        found.expand(tmp_path / "w")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16e6  # seven blocks of numbers of 64 bits
    assert (tmp_path / "w").stat().st_size == original.path.stat().st_size > 4_000_000


# --- the expanded file ------------------------------------------------------------------------------------------------


def _original(folder, weight: Stored, fill: unpacking.Fill, axes: tuple[int, ...] = (0,)) -> Original:
    """A file of some text, the weight, more text, its scales, and nothing after them."""
    integers = weight.integers.transpose(axes)
    scale = np.broadcast_to(weight.scale, weight.integers.shape).transpose(axes)
    numbers = integers.astype(np.int8) if fill == "int8" else (integers * scale).astype("<f4")
    body, scales = numbers.tobytes(), weight.scale.astype("<f4").tobytes()
    path = folder / f"original_{fill}"
    path.write_bytes(b"head " * 1000 + body + b" between " + scales)
    fillings = [
        Filling(5009 + len(body), len(scales), "scale", "w"),  # in any order
        Filling(5000, len(body), fill, "w"),
    ]
    return Original(path, fillings, {"w": axes})


@pytest.mark.parametrize("fill", ["int8", "float32"])
@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (3, 0, 1, 2)])
def test_a_file_expands_to_its_original_byte_for_byte(tmp_path, fill, axes):
    weight = stored(3, (3, 3, 40, 24))
    original = _original(tmp_path, weight, fill, axes)
    path = write_packed(tmp_path / "w.packed", {"w": weight}, original=original)
    assert path.stat().st_size < stored_bytes(weight.integers.size, 3) + 600
    told = []
    with PackedFile(path) as found:
        found.expand(tmp_path / "made", lambda done, total: told.append((done, total)))
        assert np.array_equal(found.integers("w"), weight.integers)
        used = (weight.integers * weight.scale).astype(np.float32)
        assert np.array_equal(found.integers("w") * found.scale("w"), used)
    made = (tmp_path / "made").read_bytes()
    assert made == original.path.read_bytes()
    assert told == sorted(told) and told[-1] == (len(made), len(made))


def test_stopping_leaves_nothing_behind(tmp_path):
    weight = stored(1, (50,))
    path = write_packed(tmp_path / "w.packed", {"w": weight}, original=_original(tmp_path, weight, "int8"))
    before = set(tmp_path.iterdir())
    with PackedFile(path) as found, pytest.raises(Stopped, match="was left at"):
        found.expand(tmp_path / "made", lambda done, total: False)
    assert set(tmp_path.iterdir()) == before


def test_what_does_not_expand_to_its_original_is_not_written(tmp_path):
    weight = stored(1, (50,))
    original = _original(tmp_path, weight, "int8")
    other = Stored(-weight.integers, weight.scale, 1)
    with pytest.raises(PackedError, match="another checksum"):
        write_packed(tmp_path / "w.packed", {"w": other}, original=original)
    assert set(tmp_path.iterdir()) == {original.path}


def test_weights_alone_expand_to_nothing(packed, tmp_path):
    with PackedFile(packed[0]) as found, pytest.raises(PackedError, match="weights alone"):
        found.expand(tmp_path / "made")


# --- other files ------------------------------------------------------------------------------------------------------


def test_a_byte_that_changed_anywhere_is_found(tmp_path):
    weight = stored(2, (9, 16))
    original = _original(tmp_path, weight, "int8", (0, 1))
    path = write_packed(tmp_path / "w.packed", {"w": weight}, {"x": np.arange(5, dtype=np.int32)}, original)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with pytest.raises(PackedError, match=r"damaged|no packed file|of version"), PackedFile(path) as found:
            found.array("x")
            found.expand(tmp_path / "made")
        assert not (tmp_path / "made").exists()


def test_a_file_that_is_cut_off_anywhere_is_found_at_once(packed):
    path, *_ = packed
    whole = path.read_bytes()
    for length in (0, 5, 12, 27, 28, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(PackedError, match=r"is damaged: it has|no packed file"):
            PackedFile(path)


def test_a_newer_format_says_to_update(packed):
    path, *_ = packed
    path.write_bytes(path.read_bytes()[:8] + struct.pack("<I", 2) + path.read_bytes()[12:])
    with pytest.raises(PackedError, match=r"version 2 of the format, and this client reads 1. Update"):
        PackedFile(path)


def _with_header(path, change) -> None:
    """The file with its header changed, and signed again."""
    whole = path.read_bytes()
    _, _, length, _, _ = unpacking.PREFIX.unpack_from(whole)
    header = json.loads(zlib.decompress(whole[unpacking.PREFIX.size :][:length]))
    change(header)
    made, body = zlib.compress(json.dumps(header).encode()), whole[unpacking.PREFIX.size + length :]
    size = unpacking.PREFIX.size + len(made) + len(body)
    prefix = unpacking.PREFIX.pack(unpacking.MAGIC, 1, len(made), zlib.crc32(made), size)
    path.write_bytes(prefix + made + body)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda h: h["weights"][0].update(bits=9), "1 to 8 bits"),
        (lambda h: h["weights"][0].update(bits=3), "another number of bytes"),
        (lambda h: h["weights"][0].update(shape=[-1, 5]), "is none"),
        (lambda h: h["weights"][0].update(scale_shape=[1, 1, 1, 5]), "does not broadcast"),
        (lambda h: h["weights"][0].update(axes=[0, 0, 1, 2]), "are not those of"),
        (lambda h: h["weights"][0].update(name=h["weights"][1]["name"]), "two entries have one name"),
        (lambda h: h["weights"][0]["data"].__setitem__(0, 10**9), "outside of it"),
        (lambda h: h["arrays"][0].update(dtype="object"), "is of object"),
        (lambda h: h["arrays"][0].update(shape=[99]), "another number of bytes"),
        (lambda h: h.pop("weights"), "there is no 'weights'"),
        (lambda h: h.update(expanded={"bytes": 1}), "there is no 'holes'"),
        (lambda h: h.update(expanded={"holes": [[0, "int8", 99]]}), "cannot fill a hole with 'int8' of weight 99"),
        (lambda h: h.update(expanded={"holes": [[9, "int8", 0], [0, "int8", 0]]}), "its holes overlap"),
    ],
)
def test_a_header_that_does_not_fit_its_file_says_why(packed, change, reason):
    path, *_ = packed
    _with_header(path, change)
    with pytest.raises(PackedError, match=f"damaged: .*{reason}"):
        PackedFile(path)


def test_the_pages_say_what_the_code_does():
    page = FORMAT.read_text("utf-8")
    pages = [digits.__doc__ or "", page, (ROOT / "docs" / "packing.md").read_text("utf-8")]
    for bits in BITS:
        (n, k), radix = group(bits), levels(bits)
        assert all(f"| {bits} | {radix} | {n} | {k} |" in text for text in pages)
    assert "`17 1f`" in page and encode(np.array([1, 2, -2, 0, 0, 0]), 2) == bytes.fromhex("17 1f")
    assert f"`{unpacking.MAGIC.decode()}`" in page and f"version of the format: {unpacking.VERSION}" in page
    assert all(f"`{name}`" in page for name in (*unpacking.DTYPES, "scale_shape", "axes", "skeleton", "holes"))
