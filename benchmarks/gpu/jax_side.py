"""Our side, in a process of its own: `python -m benchmarks.gpu` starts it and says which rows it wants."""

from __future__ import annotations

import dataclasses
import functools
import platform
import time
from collections.abc import Callable, Iterable
from typing import Any, cast

import flax
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from flax import nnx

from benchmarks.gpu.side import Line, first, rates, serve, timed
from snapgen_jax.inputs.stored import StoredConfig
from snapgen_jax.networks.attention import rope_table
from snapgen_jax.networks.attention_kernels import key_mask, real_first
from snapgen_jax.networks.attention_table import kernel_of
from snapgen_jax.networks.depthwise import DepthwiseConv
from snapgen_jax.networks.mmdit import MMDiTConfig
from snapgen_jax.networks.module import Network, Platform, Tree, apply, build, compute_dtype, for_platform, stand_in
from snapgen_jax.networks.text import TextContext
from snapgen_jax.networks.time_features import time_features
from snapgen_jax.networks.unet import UNetConfig
from snapgen_jax.networks.unet_blocks import ResidualBlock, TransformerBlock
from snapgen_jax.parallel.mesh import MeshConfig, make_mesh
from snapgen_jax.recipes._sampling import SamplingConfig
from snapgen_jax.recipes.flow_matching import FlowMatching, FlowMatchingConfig
from snapgen_jax.training.optimizer import OptimizerConfig
from snapgen_jax.training.state import TrainState
from snapgen_jax.training.step import carry, lower_abstract_step

Call = Callable[[], Any]
wait = jax.block_until_ready


class Side:
    """What a process measures its rows with."""

    def __init__(self, task: Line):
        self.task = task
        self.platform: Platform = cast(Platform, jax.default_backend())
        self.unet: UNetConfig = for_platform(UNetConfig.preset(task["unet"]), self.platform)
        product, (a, b) = jax.jit(jnp.dot), _normal(0, (2, task["matmul"], task["matmul"]), jnp.bfloat16)
        found = timed(lambda: product(a, b), wait, task["seconds"] / 4)
        self.matmul_tflop_s = 2e-9 * task["matmul"] ** 3 / found["ms"]

    def __call__(self, row: Line) -> Iterable[Line]:
        """Measures a row."""
        programs = {"train": self.train, "forward": self.forward, "sample": self.sample, "mmdit": self.mmdit}
        lower, call = programs.get(row["kind"], self.operation)(row)
        compiled, seconds = compile_twice(lower)
        ready = call(compiled)
        found = timed(ready, wait, self.task["seconds"])
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
        memory = {**memory_of(compiled), "process_peak_gb": peak / 1e9}
        yield {**found, **seconds, **memory, **rates(row, found["ms"], self.matmul_tflop_s)}

    # Each gives a function that lowers the program, and one that makes a call of the compiled one.

    def train(self, row: Line) -> tuple[Callable[[], Any], Callable[[Any], Call]]:
        """The step that `snapgen train` compiles for one device: clipping, AdamW, average, the guard of finite numbers;
        the state is given away."""
        recipe, mesh = self.recipe(row), make_mesh(MeshConfig(), jax.devices()[:1])
        (bucket,) = recipe.batch_specs()

        def lower() -> Any:
            return lower_abstract_step(recipe, 0, mesh, bucket)[0]

        def call(compiled: Any) -> Call:
            network = recipe.denoiser.network
            fresh = jax.jit(lambda: recipe.new_player({recipe.role: stand_in(network, 0)}))()
            zero = jnp.zeros((), jnp.int32)
            places, _, batch_places = compiled.input_shardings[0]
            box = [carry(TrainState(zero, zero + 0, {"model": fresh}, {}), mesh)]
            box[0] = jax.device_put(box[0], places)
            batch = jax.device_put(_batch(recipe.batch_specs()[bucket]), batch_places)

            def step() -> Any:
                box[0], metrics = compiled(box[0], {}, batch)
                return metrics

            if not bool(step()["finite"]):
                raise FloatingPointError("the first training step is not finite")
            return step

        return lower, call

    def recipe(self, row: Line) -> Any:
        """Flow matching of the UNet on stored latents and text states."""
        config = FlowMatchingConfig(
            batch_size=row["batch"],
            microbatches=min(row["microbatches"], row["batch"]),
            network=UNetConfig.preset(self.task["unet"]),
            inputs=StoredConfig(
                image_sizes=((row["side"],) * 2,),
                latent_channels=self.unet.latent_channels,
                context_tokens=self.task["tokens"]["unet"],
                context_width=self.unet.context_width,
                pooled_width=self.unet.pooled_width or 1,
            ),
            optimizer=OptimizerConfig(learning_rate=1e-4),
            ema_decay=0.9999,
        )
        return FlowMatching(config, self.platform)

    def forward(self, row: Line) -> tuple[Callable[[], Any], Callable[[Any], Call]]:
        """A call of the UNet, parameters in its compute dtype."""
        network, _ = build(self.unet)
        x, _, context = self.inputs(row)
        t = jnp.full(x.shape[:1], 0.7)

        def velocity(params: Tree, x: jax.Array, t: jax.Array, context: TextContext) -> jax.Array:
            return apply(network, params, x, time_features(t, self.unet.time_width), context)[0]

        return self.of_network(velocity, network, x, t, context)

    def sample(self, row: Line) -> tuple[Callable[[], Any], Callable[[Any], Call]]:
        """Four Euler steps without guidance, as one program; parameters in the compute dtype."""
        recipe, (noise, _, context) = self.recipe(row), self.inputs(row)
        options = SamplingConfig(steps=4, guidance=1.0, shift=3.0)

        def latent(params: Tree, noise: jax.Array, context: TextContext) -> jax.Array:
            return recipe.sample({recipe.role: params}, noise, context, context, options)[0]

        return self.of_network(latent, recipe.denoiser.network, noise, context)

    def mmdit(self, row: Line) -> tuple[Callable[[], Any], Callable[[Any], Call]]:
        """A call of Stable Diffusion 3.5 Large."""
        changes = {"dtype": "bfloat16", "attention": "cudnn"} if self.platform == "gpu" else {}
        config = MMDiTConfig.preset(self.task["mmdit"], **changes)
        network, _ = build(config)
        side = row["side"] // 8
        spec = config.input_spec(batch=row["batch"], height=side, width=side, tokens=self.task["tokens"]["mmdit"])
        return self.of_network(lambda params, *inputs: apply(network, params, *inputs)[0], network, *_inputs(spec))

    def operation(self, row: Line) -> tuple[Callable[[], Any], Callable[[Any], Call]]:
        """A part of the UNet, forward and backward: gradients of its parameters and of what goes in."""
        module, run, inputs = operation(self.unet, row, self.task["tokens"]["unet"])
        network, spec = build(Part(module))
        y = jax.eval_shape(lambda params, x: run(network, params, x), spec, inputs)
        dy = _normal(1, y.shape, y.dtype)

        def both(params: Tree, x: jax.Array, dy: jax.Array) -> Any:
            y, back = jax.vjp(functools.partial(run, network), params, x)
            return y, back(dy)

        params = jax.jit(lambda: stand_in(network, 0))()
        return lambda: jax.jit(both).lower(params, inputs, dy), lambda c: lambda: c(params, inputs, dy)

    def of_network(
        self, function: Callable[..., jax.Array], network: Network, *inputs: Any
    ) -> tuple[Callable[[], Any], Callable[[Any], Call]]:
        """A function of a network's parameters, in its compute dtype, and of inputs."""
        dtype = compute_dtype(network.config)
        params = jax.jit(lambda: jax.tree.map(lambda x: x.astype(dtype), stand_in(network, 0)))()

        def call(compiled: Any) -> Call:
            if not bool(jnp.isfinite(compiled(params, *inputs)).all()):
                raise FloatingPointError("the output is not finite")
            return lambda: compiled(params, *inputs)

        return lambda: jax.jit(function).lower(params, *inputs), call

    def inputs(self, row: Line) -> tuple[jax.Array, jax.Array, TextContext]:
        """Latent, time features and text of a row."""
        side = row["side"] // 8
        return _inputs(self.unet.input_spec(row["batch"], side, side, self.task["tokens"]["unet"]))


@dataclasses.dataclass(frozen=True)
class Part:
    """The config of a part of a network."""

    make: Callable[[nnx.Rngs], nnx.Module]
    kind: str = "part"

    def module(self, rngs: nnx.Rngs) -> nnx.Module:
        """The part."""
        return self.make(rngs)

    def rules(self) -> tuple[()]:
        """None: it lies on one device."""
        return ()

    def input_spec(self, batch: int = 1) -> tuple[()]:
        """None: `operation` gives its inputs."""
        return ()

    def tap_names(self) -> tuple[str, ...]:
        """None."""
        return ()


def operation(config: UNetConfig, row: Line, tokens: int) -> tuple[Callable[..., Any], Callable[..., jax.Array], Any]:
    """How a part of the UNet is made, how it is called (`run(network, params, x)`), and its input."""
    b, side, stage, dtype = row["batch"], row["side"], row["stage"], compute_dtype(config)
    width = config.channels[stage]
    image = _normal(2, (b, side, side, 2 * width), dtype)
    sequence = _normal(3, (b, side * side, width), dtype)
    kernel = kernel_of(config)
    text = _normal(4, (b, tokens, config.context_width), dtype)
    text, mask = real_first(kernel, text, jnp.asarray(_mask((b, tokens))))
    keys = key_mask(kernel, mask)
    rope = rope_table(side, side, config.head_dim, config.rope_theta)
    flags = config.self_attention[stage], config.cross_attention[stage]

    def block(own: bool, cross: bool) -> Callable[[nnx.Rngs], Any]:
        return lambda rngs: TransformerBlock(config, width, own, cross, rngs)

    match row["operation"]:
        case "self_attention":
            return lambda rngs: block(True, False)(rngs).self_attention, lambda *a: apply(*a, rope=rope), sequence
        case "cross_attention":
            run = functools.partial(_with, text, mask=keys)
            return lambda rngs: block(False, True)(rngs).cross_attention, run, sequence
        case "transformer":
            return block(*flags), functools.partial(_with, text, keys, rope if flags[0] else None), sequence
        case "residual":
            embedding = _normal(5, (b, config.embedding_width), dtype)
            return (
                lambda rngs: ResidualBlock(config, 2 * width, width, rngs),
                functools.partial(_with, embedding),
                image,
            )
        case _:
            form = config.depthwise
            return lambda rngs: DepthwiseConv(2 * width, form=form, dtype=dtype, rngs=rngs), apply, image


def _with(*arguments: Any, **named: Any) -> jax.Array:
    *more, network, params, x = arguments
    return apply(network, params, x, *more, **named)


def compile_twice(lower: Callable[[], Any]) -> tuple[Any, Line]:
    """The compiled program; its seconds to trace and lower, to compile with an empty cache ("cold") and, as a process
    that comes later, from what that left in it ("warm")."""
    start = time.perf_counter()
    lowered = lower()
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    jax.clear_caches()
    again = lower()
    warm = first(again.compile, lambda compiled: None)
    return compiled, {"lower_s": middle - start, "compile_cold_s": end - middle, "compile_warm_s": warm}


def memory_of(compiled: Any) -> Line:
    """GB that a program needs at most, arguments included, as its compiler says."""
    found = compiled.memory_analysis()
    if found is None:
        return {}
    size = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return {"peak_gb": (size + found.temp_size_in_bytes) / 1e9}


def _normal(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def _mask(shape: tuple[int, ...]) -> np.ndarray:
    """A quarter of padding."""
    mask = np.ones(shape, np.float32)
    mask[:, shape[1] - shape[1] // 4 :] = 0
    return mask


def _inputs(spec: tuple[Any, Any, TextContext]) -> tuple[jax.Array, jax.Array, TextContext]:
    x, features, context = jax.tree.map(lambda s: _normal(s.size % 1009, s.shape, s.dtype), spec)
    return x, features, dataclasses.replace(context, mask=jnp.asarray(_mask(context.mask.shape)))


def _batch(spec: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _mask(s.shape) if name == "mask" else _normal(i, s.shape, s.dtype)
        for i, (name, s) in enumerate(spec.items())
    }


if __name__ == "__main__":
    here = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "flax": flax.__version__}
    serve("jax", {**here, "python": platform.python_version()}, Side)
