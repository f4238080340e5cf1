"""PyTorch's side, in a process of its own: `python -m benchmarks.gpu` starts it with a Python that has torch.

The UNet is the port of `benchmarks/torch_unet.py`; Stable Diffusion 3.5 is diffusers'. Convolutions lie in
channels_last, autocast computes in bfloat16, and `torch.compile` compiles (on a CPU without Inductor, which would take
minutes there for the tests). What has a fixed shape and no optimizer runs as a CUDA graph too.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable
from typing import Any

import torch  # pyright: ignore[reportMissingImports]

from benchmarks.gpu.side import Line, first, rates, serve, timed
from benchmarks.torch_unet import (
    MASKED,
    ResidualBlock,
    TransformerBlock,
    UNet,
    fields_of,
    randomise,
    rope_table,
    time_features,
)

Call = Callable[[], Any]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXAMPLES = torch.channels_last


def wait(_: Any = None) -> None:
    """Waits for all that was started."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def compiled(function: Callable) -> Callable:
    """By torch.compile."""
    return torch.compile(
        function, fullgraph=True, dynamic=False, backend="inductor" if DEVICE == "cuda" else "aot_eager"
    )


def autocast() -> Any:
    """bfloat16 where it is safe."""
    return torch.autocast(DEVICE, dtype=torch.bfloat16)


class Side:
    """What a process measures its rows with."""

    def __init__(self, task: Line):
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        self.task, self.unet = task, fields_of(task["unet_fields"])
        a, b = torch.randn(2, task["matmul"], task["matmul"], device=DEVICE, dtype=torch.bfloat16)
        found = timed(lambda: a @ b, wait, task["seconds"] / 4)
        self.matmul_tflop_s = 2e-9 * task["matmul"] ** 3 / found["ms"]

    def __call__(self, row: Line) -> Iterable[Line]:
        """Measures a row; a second part is the same call as a CUDA graph."""
        programs = {"train": self.train, "forward": self.forward, "sample": self.sample, "mmdit": self.mmdit}
        call = programs.get(row["kind"], self.operation)(row)
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        cold = first(call, wait)
        found = timed(call, wait, self.task["seconds"])
        peak = torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else 0.0
        torch.compiler.reset()
        warm, usual = first(call, wait), found["latency_ms"] / 1e3
        compilation = {"compile_cold_s": max(0.0, cold - usual), "compile_warm_s": max(0.0, warm - usual)}
        yield {**found, **compilation, "peak_gb": peak, **rates(row, found["ms"], self.matmul_tflop_s)}
        if DEVICE == "cuda" and row["kind"] in ("forward", "sample", "mmdit"):
            found = timed(graphed(call), wait, self.task["seconds"])
            yield {"form": "CUDA graph", **found, **rates(row, found["ms"], self.matmul_tflop_s)}

    def train(self, row: Line) -> Call:
        """Loss, gradient, clipping, fused AdamW and average, as our step has them."""
        model = self.model(row, torch.float32)
        x_0, *text = self.inputs(row)
        decayed = {name: not name.endswith("bias") and "norm" not in name for name, _ in model.named_parameters()}
        params = list(model.parameters())
        groups = [
            {"params": [p for name, p in model.named_parameters() if decayed[name] == which], "weight_decay": decay}
            for which, decay in ((True, 0.01), (False, 0.0))
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, fused=True)
        average = [p.detach().clone() for p in params]

        @compiled
        def loss(x_0: Any, eps: Any, t: Any, *text: Any) -> Any:
            s = t[:, None, None, None]
            with autocast():
                v = model((1 - s) * x_0 + s * eps, time_features(t, self.unet.time_width), *text)
            return (v - (eps - x_0)).square().mean()

        def step() -> Any:
            t = torch.sigmoid(torch.randn(row["batch"], device=DEVICE))
            kept = (torch.rand(row["batch"], device=DEVICE) >= 0.1).to(text[0].dtype)
            sequence, mask, pooled = text
            told = sequence * kept[:, None, None], mask * kept[:, None].float(), pooled * kept[:, None]
            optimizer.zero_grad(set_to_none=True)
            value = loss(x_0, torch.randn_like(x_0), t, *told)
            value.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(average, params, 1e-4)
            return value

        return step

    def forward(self, row: Line) -> Call:
        """A call of the UNet, parameters in bfloat16."""
        velocity, x, text = self.velocity(row)
        t = torch.full((row["batch"],), 0.7, device=DEVICE)
        return torch.no_grad()(lambda: velocity(x, t, *text))

    def sample(self, row: Line) -> Call:
        """Four Euler steps without guidance."""
        velocity, noise, text = self.velocity(row)
        grid = torch.linspace(1, 0, 5)
        times = (3 * grid / (1 + 2 * grid)).tolist()
        levels = [torch.full((row["batch"],), t, device=DEVICE) for t in times]

        @torch.no_grad()
        def latent() -> Any:
            x = noise
            for i in range(4):
                x = x + (times[i + 1] - times[i]) * velocity(x, levels[i], *text)
            return x

        return latent

    def velocity(self, row: Line) -> tuple[Callable, Any, list[Any]]:
        """The compiled UNet and what it is called with."""
        model = self.model(row, torch.bfloat16)

        @compiled
        def velocity(x: Any, t: Any, *text: Any) -> Any:
            with autocast():
                return model(x, time_features(t, self.unet.time_width), *text)

        x, *text = self.inputs(row)
        return velocity, x, text

    def model(self, row: Line, dtype: Any) -> UNet:
        """The UNet with random parameters."""
        with torch.device(DEVICE):
            model = UNet(self.unet)
        randomise(model)
        side = row["side"] // 8
        return model.to(dtype).to(memory_format=EXAMPLES).place(side, side)

    def inputs(self, row: Line) -> tuple[Any, ...]:
        """Latent, text states, mask and pooled text."""
        side, tokens = row["side"] // 8, self.task["tokens"]["unet"]
        x = torch.randn(row["batch"], self.unet.latent_channels, side, side, device=DEVICE)
        sequence = self.normal(row["batch"], tokens, self.unet.context_width)
        pooled = self.normal(row["batch"], self.unet.pooled_width)
        return x.contiguous(memory_format=EXAMPLES), sequence, self.mask(row["batch"]), pooled

    def normal(self, *shape: int) -> Any:
        """bfloat16."""
        return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)

    def mask(self, batch: int) -> Any:
        """A quarter of padding."""
        tokens = self.task["tokens"]["unet"]
        mask = torch.ones(batch, tokens, device=DEVICE)
        mask[:, tokens - tokens // 4 :] = 0
        return mask

    def mmdit(self, row: Line) -> Call:
        """diffusers' transformer with each block compiled; equal blocks share a program."""
        from diffusers import SD3Transformer2DModel  # pyright: ignore[reportMissingImports]

        with torch.device("meta"):
            model = SD3Transformer2DModel(**self.task["mmdit_fields"], qk_norm="rms_norm")
        model = model.to(torch.bfloat16).to_empty(device=DEVICE).eval().requires_grad_(False)
        randomise(model)
        for buffer in model.buffers():
            buffer.normal_()
        # The patches come out transposed, and would lie so through all blocks: one copy here saves many.
        model.pos_embed.register_forward_hook(lambda module, inputs, output: output.contiguous())
        for block in model.transformer_blocks:
            block.compile(fullgraph=True, dynamic=False, backend="inductor" if DEVICE == "cuda" else "aot_eager")
        batch, side, fields = row["batch"], row["side"] // 8, self.task["mmdit_fields"]
        inputs = {
            "hidden_states": self.normal(batch, fields["in_channels"], side, side),
            "encoder_hidden_states": self.normal(batch, self.task["tokens"]["mmdit"], fields["joint_attention_dim"]),
            "pooled_projections": self.normal(batch, fields["pooled_projection_dim"]),
            "timestep": torch.full((batch,), 500.0, device=DEVICE),
        }
        return torch.no_grad()(lambda: model(**inputs, return_dict=False)[0])

    def operation(self, row: Line) -> Call:
        """A part of the UNet, forward and backward."""
        module, arguments, x = self.part(row)
        with torch.device(DEVICE):
            module = module()
        randomise(module)
        module.to(memory_format=EXAMPLES)
        x.requires_grad_(True)

        @compiled
        def forward(x: Any) -> Any:
            with autocast():
                return module(x, **arguments)

        dy = torch.randn_like(forward(x).detach())
        torch.compiler.reset()  # so that the first call that is timed compiles

        def both() -> Any:
            x.grad = None
            module.zero_grad(set_to_none=True)
            y = forward(x)
            y.backward(dy)
            return y

        return both

    def part(self, row: Line) -> tuple[Callable[[], Any], dict[str, Any], Any]:
        """How it is made, its further arguments, and its input; sizes as in `jax_side.operation`."""
        config, b, side, stage = self.unet, row["batch"], row["side"], row["stage"]
        width = config.channels[stage]
        image = self.normal(b, 2 * width, side, side).contiguous(memory_format=EXAMPLES)
        sequence = self.normal(b, side * side, width)
        text = self.normal(b, self.task["tokens"]["unet"], config.context_width)
        bias = ((1.0 - self.mask(b)) * MASKED)[:, None, None, :].to(text.dtype)
        cos, sin = rope_table(side, side, config.head_dim, config.rope_theta)
        rope = cos.to(DEVICE), sin.to(DEVICE)
        flags = config.self_attention[stage], config.cross_attention[stage]
        match row["operation"]:
            case "self_attention":
                return (
                    lambda: TransformerBlock(config, width, True, False).self_attention,
                    {"rope": rope},
                    sequence,
                )
            case "cross_attention":
                told = {"context": text, "bias": bias}
                return lambda: TransformerBlock(config, width, False, True).cross_attention, told, sequence
            case "transformer":
                told = {"context": text, "bias": bias, "rope": rope if flags[0] else None}
                return lambda: TransformerBlock(config, width, *flags), told, sequence
            case "residual":
                told = {"embedding": self.normal(b, config.embedding_width)}
                return lambda: ResidualBlock(config, 2 * width, width), told, image
            case _:
                return lambda: torch.nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width), {}, image


def graphed(call: Call) -> Call:
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


if __name__ == "__main__":
    here = {"torch": torch.__version__, "cudnn": str(torch.backends.cudnn.version())}
    serve("torch", {**here, "python": platform.python_version()}, Side)
