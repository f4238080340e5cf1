"""PyTorch's half of `benchmarks/beside_torch.py`: a process that runs what it is asked for on the CPU.

It reads lines of JSON: first what to build (`{"what": "update" or "sd_unet", ...}`), then for each turn a form and how
often to call it. It answers each with a line. It imports neither JAX nor this project's package.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch  # pyright: ignore[reportMissingImports]

from benchmarks.torch_unet import UNet, fields_of, randomise, time_features

Forms = dict[str, Callable[[], Any]]


def update(task: dict[str, Any]) -> Forms:
    """An update of the UNet by the quickstart's rule: loss of a predicted image, clipping, AdamW, average."""
    config, batch, side, tokens = fields_of(task["unet"]), task["batch"], task["side"], task["tokens"]
    forms: Forms = {"eager": _updates(config, batch, side, tokens, task["rule"], lambda f: f)}
    if task["compile"]:
        forms["compiled"] = _updates(config, batch, side, tokens, task["rule"], torch.compile)
    return forms


def _updates(
    config: Any, batch: int, side: int, tokens: int, rule: dict[str, float], wrap: Callable[[Any], Any]
) -> Callable[[], Any]:
    model = UNet(config)
    randomise(model)
    model = model.to(memory_format=torch.channels_last).place(side, side)
    params = list(model.parameters())
    plain = [p for name, p in model.named_parameters() if name.endswith("bias") or "norm" in name]
    others = [p for p in params if all(p is not q for q in plain)]
    groups = [{"params": others, "weight_decay": rule["weight_decay"]}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rule["learning_rate"], fused=True)
    average = [p.detach().clone() for p in params]
    x_0 = torch.randn(batch, config.latent_channels, side, side).contiguous(memory_format=torch.channels_last)
    text = torch.randn(batch, tokens, config.context_width), torch.ones(batch, tokens)
    pooled = torch.randn(batch, config.pooled_width)

    @wrap
    def loss(eps: Any, t: Any, sequence: Any, mask: Any, pooled: Any) -> Any:
        s = t[:, None, None, None]
        x_t = (1 - s) * x_0 + s * eps
        image = model(x_t, time_features(t, config.time_width), sequence, mask, pooled)
        v = (x_t - image) / s.clamp(min=rule["t_min"])
        error = (v - (eps - x_0)).square().mean(dim=(1, 2, 3))
        return (error * (t / rule["full_from"]).clamp(max=1.0).square()).mean()

    def step() -> Any:
        t = torch.sigmoid(rule["mean"] + rule["std"] * torch.randn(batch))
        kept = (torch.rand(batch) >= 0.1).float()
        told = text[0] * kept[:, None, None], text[1] * kept[:, None], pooled * kept[:, None]
        optimizer.zero_grad(set_to_none=True)
        loss(torch.randn_like(x_0), t, *told).backward()
        torch.nn.utils.clip_grad_norm_(params, rule["clip_norm"], foreach=True)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, params, 1 - rule["ema_decay"])

    return step


def sd_unet(task: dict[str, Any]) -> Forms:
    """The forward pass of diffusers' UNet in both layouts of images, and compiled where that is asked for."""
    from diffusers import UNet2DConditionModel  # pyright: ignore[reportMissingImports]

    model = UNet2DConditionModel(**task["config"]).eval()
    x = torch.randn(task["batch"], model.config.in_channels, task["side"], task["side"])
    states = torch.randn(task["batch"], task["tokens"], model.config.cross_attention_dim)
    step = torch.full((task["batch"],), 500)
    last = UNet2DConditionModel(**task["config"]).eval().to(memory_format=torch.channels_last)
    x_last = x.contiguous(memory_format=torch.channels_last)
    forms: Forms = {
        "eager": lambda: model(x, step, encoder_hidden_states=states).sample,
        "eager, channels_last": lambda: last(x_last, step, encoder_hidden_states=states).sample,
    }
    if task["compile"]:
        compiled = torch.compile(last)
        forms["compiled"] = lambda: compiled(x_last, step, encoder_hidden_states=states).sample
    return {name: torch.inference_mode()(call) for name, call in forms.items()}


def main() -> None:
    """Answers until standard input ends."""
    task = json.loads(sys.stdin.readline())
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print too
    torch.set_num_threads(task["threads"])
    forms = {"update": update, "sd_unet": sd_unet}[task["what"]](task)
    print(json.dumps({"forms": list(forms), "torch": torch.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        turn = json.loads(line)
        for _ in range(turn["calls"]):
            forms[turn["form"]]()
        print(json.dumps({"done": turn}), file=answers, flush=True)


if __name__ == "__main__":
    main()
