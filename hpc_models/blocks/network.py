"""What every registered model is, beside its own layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Network(nn.Module):
    """A model as the engines see it, with the switches of its settings.

    Attributes:
        normalise: map the input by (x - 0.5) / 0.5 first.
        checkpoint: recompute the model's own parts in the backward pass. Parts have this switch too.
    """

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.normalise: bool = settings.normalise
        self.checkpoint: bool = settings.checkpointing

    def set_checkpointing(self, on: bool) -> None:
        """Switch activation checkpointing of every part that has the switch. Results do not change."""
        for module in self.modules():
            if hasattr(module, "checkpoint"):
                module.checkpoint = on  # type: ignore[assignment]

    def fsdp_units(self) -> list[nn.Module]:
        """Modules to shard one by one, in forward order; the root takes the rest."""
        raise NotImplementedError

    def centred(self, x: Tensor) -> Tensor:
        """The input, mapped from [0, 1] to [-1, 1] where the settings say so."""
        return (x - 0.5) / 0.5 if self.normalise else x
