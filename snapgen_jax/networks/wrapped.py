"""The config of a network that another network is made into: what it does not say itself is that of the other."""

from __future__ import annotations

import dataclasses
from typing import Any

from snapgen_jax.networks.module import Rules


@dataclasses.dataclass(frozen=True)
class WrappedConfig:
    """The config of a network made of another one. Its other attributes are those of `network`; a subclass says what
    the module is.

    Attributes:
        network: the config of the other network.
    """

    network: Any

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "network":
            raise AttributeError(name)
        return getattr(self.network, name)

    @property
    def kind(self) -> str:
        """That of the network."""
        return self.network.kind

    def rules(self) -> Rules:
        """Those of the network; what it does not have is replicated."""
        return self.network.rules()

    def input_spec(self, *args: Any, **sizes: Any) -> tuple[Any, ...]:
        """As of the network."""
        return self.network.input_spec(*args, **sizes)

    def tap_names(self) -> tuple[str, ...]:
        """As of the network."""
        return self.network.tap_names()
