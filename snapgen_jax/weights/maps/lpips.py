"""VGG-16 and the learnt weights of LPIPS -> `networks.lpips.PerceptualDistance`.

VGG-16 by torchvision's names, `features.0.weight`, or by those of the lpips package, whose whole state is one file:

    import lpips, safetensors.torch
    state = {k: v.contiguous() for k, v in lpips.LPIPS(net="vgg").state_dict().items() if not k.startswith("lins.")}
    safetensors.torch.save_file(state, "DIR/lpips.safetensors")
"""

from __future__ import annotations

from snapgen_jax.networks.lpips import LPIPSConfig
from snapgen_jax.weights.mapping import Rule, WeightMap, conv, one


def weight_map(config: LPIPSConfig) -> WeightMap:
    """Every tensor of the distance. Files with VGG's classifier, or the constants of lpips, are taken too."""
    rules: list[Rule] = []
    aliases: list[tuple[str, str]] = []
    number = 0  # torchvision counts convolutions, ReLUs and pools
    for i, layers in enumerate(config.layers):
        for j in range(layers):
            name = f"features.{number}"
            rules += conv(f"convolutions/block_{i:02d}/block_{j:02d}", name)
            aliases += [(f"net.slice{i + 1}.{number}.{part}", f"{name}.{part}") for part in ("weight", "bias")]
            number += 2
        number += 1
        rules.append(one(f"lins/block_{i:02d}/kernel", f"lin{i}.model.1.weight", "conv"))
    ignored = (r"classifier\..*", r"head\..*", r"pre_logits\..*", r"scaling_layer\..*")
    return WeightMap(tuple(rules), tuple(aliases), ignored)
