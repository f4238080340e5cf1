"""Sharding rules of several networks in one tree."""

from __future__ import annotations

import re
from collections.abc import Mapping

from snapgen_jax.networks.module import Network, Rules

__all__ = ["Rules", "rules_of", "within"]


def within(name: str, rules: Rules) -> Rules:
    """The rules of a network, for the parameters below `name` alone: "kernel$" holds for `name/conv/kernel`."""
    return [(rf"(?:^|(?<=/)){name}/(?:.*/)?(?:{pattern})", spec) for pattern, spec in rules]


def rules_of(networks: Mapping[str, Network]) -> Rules:
    """The rules of networks by their roles, such as "unet" or "teacher/mmdit", for a train state and for a frozen tree.

    A parameter belongs to the role that comes first in its path. Of roles that begin at the same place, the longest
    counts: `teacher/text/...` belongs to "teacher/text" and not to "text". The part `text` of an MMDiT's block is no
    text encoder, since "mmdit" comes before it. The name of a player is no role: `players/<name>/...`.
    """
    roles = sorted(networks, key=len, reverse=True)
    alternatives = "|".join(map(re.escape, roles))
    before = rf"^(?:players/[^/]+/|(?!players/))(?:(?!(?:{alternatives})/)[^/]+/)*"

    def below(role: str) -> str:
        longer = "|".join(re.escape(other) for other in roles if other.startswith(f"{role}/"))
        return (rf"(?!(?:{longer})/)" if longer else "") + re.escape(role)

    return [
        (rf"{before}{below(role)}/(?:.*/)?(?:{pattern})", spec)
        for role in roles
        for pattern, spec in networks[role].config.rules()
    ]
