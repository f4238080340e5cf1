"""Random parameters for a reference network, none of which is where its initialisation left it.

Fresh networks hold ones, zeros and equal blocks, with which a swapped norm, a forgotten bias or a permuted block passes
unseen.
"""

from __future__ import annotations

import torch


def randomise(module: torch.nn.Module, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """Draws every parameter anew: gains around one, biases around zero, matrices that keep the variance.

    The values are representable in `dtype`, so that a checkpoint stored in it loses nothing; the module stays float32
    and is put in evaluation mode.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                value = noise / parameter[0].numel() ** 0.5
            else:
                value = 0.3 * noise + (1.0 if name.endswith("weight") else 0.0)
            parameter.copy_(value.to(dtype))
    return module.eval()
