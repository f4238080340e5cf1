"""The published bits of Stable Diffusion 1.5, and those of SnapGen's UNet: counted from shapes."""

import collections

import pytest

from configs.bits import sd15, t2i
from snapgen_jax.config import load_experiment
from snapgen_jax.networks.module import build, flatten
from snapgen_jax.networks.quantise import average_bits, bits_of, quantisable
from snapgen_jax.networks.sd_unet import SDUNetConfig
from snapgen_jax.networks.time_cache import cached_values, depends_on_time_alone
from snapgen_jax.networks.unet import UNetConfig

SD15 = SDUNetConfig.preset("sd15")
LAYERS = quantisable(SD15)
FREE = {name: layer for name, layer in LAYERS.items() if layer.fixed is None}
BITS = sd15.published_bits()


def test_the_published_bits_name_each_of_the_256_layers_and_no_other():
    assert set(BITS) == set(FREE) and len(FREE) == 256
    counts = collections.Counter(BITS.values())
    assert [counts[b] for b in range(1, 8)] == [66, 59, 67, 45, 9, 7, 3]
    weights = sum(layer.size for layer in FREE.values())
    shares = [sum(FREE[n].size for n in FREE if BITS[n] == b) / weights for b in (1, 2, 3, 4)]
    assert weights == pytest.approx(831.20e6, abs=5e3)
    assert shares == pytest.approx([0.605, 0.258, 0.097, 0.036], abs=5e-4)


def test_their_average_is_the_published_one_by_its_count_and_more_of_what_is_stored():
    bits = bits_of(LAYERS, BITS, default=8)
    stored, cached = sum(layer.size for layer in LAYERS.values()), cached_values(SD15, 50)
    flat = flatten(build(SD15)[1])
    of_time = sum(
        leaf.size for path, leaf in flat.items() if path[-1] == "kernel" and depends_on_time_alone(SD15, path)
    )
    total = average_bits(LAYERS, bits) * stored + 16 * cached
    assert of_time == pytest.approx(27.85e6, abs=5e3) and cached == 50 * 20_160
    assert total / (stored + of_time) == pytest.approx(1.988, abs=5e-4)
    assert total / stored == pytest.approx(2.055, abs=5e-4)


def test_their_size_is_the_published_219_megabytes():
    bits = bits_of(LAYERS, BITS, default=8)
    flat, stored = flatten(build(SD15)[1]), {(*name.split("/"), "kernel") for name in LAYERS}
    rest = sum(leaf.size for path, leaf in flat.items() if path not in stored and not depends_on_time_alone(SD15, path))
    weights = average_bits(LAYERS, bits) * sum(layer.size for layer in LAYERS.values()) / 8
    scales = sum(layer.scales for layer in LAYERS.values())
    floats = 4 * (rest + scales + cached_values(SD15, 50))
    assert weights + floats == pytest.approx(219e6, rel=0.01)
    whole = 2 * sum(leaf.size for leaf in flat.values())
    assert whole / (weights + floats) == pytest.approx(7.9, abs=0.05)


def test_snapgens_unet_has_two_bits_on_average():
    layers = quantisable(UNetConfig.preset("t2i"))
    bits = bits_of(layers, t2i.BITS, default=2)
    free = {name: bits[name] for name, layer in layers.items() if layer.fixed is None}
    assert average_bits(layers, free) == pytest.approx(2.0, abs=0.005)
    assert average_bits(layers, bits) == pytest.approx(2.0, abs=0.01)


@pytest.mark.parametrize("config", ["sd15", "sd15:data", "sd15:runlocal", "t2i", "t2i:data", "t2i:runlocal"])
def test_configs_say_what_they_quantise(config):
    name, _, arg = config.partition(":")
    recipe = load_experiment(f"configs/bits/{name}.py{':' + arg if arg else ''}").recipe
    assert recipe.learns_from == ("data" if arg == "data" else "network")
    assert recipe.network.kind == {"sd15": "sd_unet", "t2i": "unet"}[name]
    assert recipe.schedule.density_power == 3.0 and recipe.optimizer.weight_decay == 0
    assert bits_of(quantisable(recipe.network), recipe.bits, recipe.default_bits)
