"""Recipes of other shapes than text to image, each a few numbers large: what a bundle must be able to hold."""

import jax
import jax.numpy as jnp
import numpy as np

from snapgen_jax.diffusion.samplers import sample
from snapgen_jax.networks.codec import from_uint8, to_uint8
from snapgen_jax.training.exports import ExportPlan, ExportUnit, GoldenInputs, Stored
from snapgen_jax.training.recipe import NoOptions


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def conv(x, kernel):
    """`[N, h, w, c]` by a kernel `[k, k, c, d]`, with as many pixels out as in."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) / np.sqrt(np.prod(shape[:-1]))


def flow(step=None, **changes):
    """A program of one denoiser "net" over x of one number, without conditions; changed."""
    plain = {"unit": "net", "rule": "euler", "prediction": {"kind": "velocity"}, "guidance": 1.0}
    return {
        "schema": 3,
        "kind": "flow",
        "inputs": {},
        "outputs": {"latent": {"shape": [2], "dtype": "float32"}},
        "latent_shape": [2],
        "times": [1.0, 0.5, 0.0],
        "step": {**plain, **(step or {})},
        "decoder": None,
        **changes,
    }


class SketchRecipe:
    """An image translator: one call, no noise, no text. Its kernel takes three values."""

    options = NoOptions()
    INTEGERS = np.random.default_rng(0).integers(-1, 2, (3, 3, 3, 3))
    SCALE = np.float32([0.2, 0.3, 0.1])

    def params(self):
        return {"net": {"conv": {"kernel": (self.INTEGERS * self.SCALE).astype(np.float32), "bias": draw(1, 3)}}}

    def weights(self, params, frozen):
        return {**params, **frozen}

    @staticmethod
    def translate(weights, *, image):
        layer = weights["net"]["conv"]
        return {"image": jnp.tanh(conv(image, layer["kernel"]) + layer["bias"]), "edges": image[..., :1]}

    def exports(self):
        picture = {"shape": [8, 8, 3], "dtype": "uint8"}
        program = {
            "schema": 3,
            "kind": "feed_forward",
            "unit": "translator",
            "inputs": {"image": picture},
            "outputs": {"image": picture, "edges": {"shape": [8, 8, 1], "dtype": "float32"}},
        }
        stored = {"net/conv/kernel": Stored(self.INTEGERS, self.SCALE, bits=1)}
        unit = ExportUnit("translator", self.translate, ("net",), {"image": array(1, 8, 8, 3)}, stored)
        images = np.random.default_rng(2).integers(0, 256, (2, 8, 8, 3), np.uint8)
        return ExportPlan([unit], program, GoldenInputs(arrays={"image": images}))

    def generate(self, params, frozen, conditions, keys, options):
        out = self.translate({**params, **frozen}, image=from_uint8(conditions["image"]))
        return {"image": to_uint8(out["image"]), "edges": out["edges"]}


class ClipRecipe:
    """A class-conditional sampler of clips of four frames.

    At every other time a short network runs, which reuses what the full one left in the cache; both are of one file.
    The networks predict
    noise of a variance-preserving process, and are told the index of the time. Guidance leaves the last channel alone.
    The decoder takes two frames at a time.
    """

    options = NoOptions()
    FRAMES, STEPS, GUIDANCE = 4, 4, (3.0, 2.0, 1.0)
    TIMES = np.float32([0.9, 0.7, 0.5, 0.2, 0.0])

    def __init__(self):
        t = self.TIMES
        alpha, sigma = (1 - t) / np.hypot(t, 1 - t), t / np.hypot(t, 1 - t)
        # x = z / (alpha + sigma), z = alpha x_0 + sigma eps, v = eps - x_0 = ((alpha + sigma) eps - z) / alpha
        self.scale = alpha + sigma
        self.x, self.out = -self.scale / alpha, self.scale / alpha

    def params(self):
        kernels = {name: draw(seed, 3, 3, 3, 3) for seed, name in enumerate(("first", "last", "decoder"))}
        return {"net": {**kernels, "label": draw(5, 2, 3), "time": draw(6, 5, 3)}}

    def weights(self, params, frozen):
        return {**params, **frozen}

    @staticmethod
    def full(weights, *, latent, time, label, cache):
        net = weights["net"]
        time = time @ net["time"]
        cache = 0.5 * cache + jnp.tanh(conv(latent, net["first"]) + (time + label @ net["label"])[:, None, None])
        return {"prediction": conv(cache, net["last"]), "cache": cache}

    @staticmethod
    def reuse(weights, *, latent, label, cache):
        net = weights["net"]
        return {"prediction": conv(cache, net["last"]) + 0.1 * latent + (label @ net["label"])[:, None, None]}

    @staticmethod
    def decode(weights, *, latent):
        return {"image": jnp.tanh(conv(latent, weights["net"]["decoder"]))}

    def exports(self):
        latent = [self.FRAMES, 4, 4, 3]
        kinds = [{"unit": "full", "time": {"kind": "index", "size": 5}}, {"unit": "reuse"}]
        program = {
            "schema": 3,
            "kind": "flow",
            "inputs": {"label": {"shape": [2], "dtype": "float32", "null": 0}},
            "outputs": {"image": {"shape": latent, "dtype": "uint8"}},
            "latent_shape": latent,
            "times": self.TIMES.tolist(),
            "initial_scale": 0.5,
            "step": {"rule": "euler", "guidance": list(self.GUIDANCE)},
            "steps": [
                {
                    **kinds[i % 2],
                    "scale": float(self.scale[i]),
                    "prediction": {"kind": "linear", "x": float(self.x[i]), "out": float(self.out[i])},
                }
                for i in range(self.STEPS)
            ],
            "state": {"cache": {"shape": latent, "dtype": "float32", "initial": "zeros"}},
            "decoder": {"kind": "network", "unit": "decoder", "chunk": 2},
        }
        shared = {"latent": array(*latent), "label": array(1, 2), "cache": array(*latent)}
        units = [
            ExportUnit("full", self.full, ("net",), {**shared, "time": array(1, 5)}, file="frames"),
            ExportUnit("reuse", self.reuse, ("net",), shared, file="frames"),
            ExportUnit("decoder", self.decode, ("net",), {"latent": array(2, *latent[1:])}),
        ]
        return ExportPlan(units, program, GoldenInputs(arrays={"label": np.eye(2, dtype=np.float32)}, seed=3))

    def generate(self, params, frozen, conditions, keys, options):
        weights, scale = {**params, **frozen}, jnp.asarray(self.GUIDANCE)

        def one(noise, label):
            def ask(x, i, cache, label):
                z = {"latent": jnp.asarray(self.scale)[i] * x, "label": label[None], "cache": cache}
                full, reuse = self.full(weights, time=jax.nn.one_hot(i, 5)[None], **z), self.reuse(weights, **z)
                eps = jnp.where(i % 2 == 0, full["prediction"], reuse["prediction"])
                v = jnp.asarray(self.x)[i] * x + jnp.asarray(self.out)[i] * eps
                return v, jnp.where(i % 2 == 0, full["cache"], cache)

            def denoise(x, t, i, caches):
                v, cache = ask(x, i, caches[0], label)
                v_null, null_cache = ask(x, i, caches[1], jnp.zeros(2))
                return v_null + scale * (v - v_null), (cache, null_cache)

            empty = jnp.zeros(noise.shape)
            return sample(denoise, 0.5 * noise, self.TIMES, carry=(empty, empty))[0]

        latent = jax.vmap(one)(conditions["noise"], conditions["label"])
        return {"image": to_uint8(jax.vmap(lambda x: self.decode(weights, latent=x)["image"])(latent))}
