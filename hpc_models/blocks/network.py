"""What every registered model is, beside its own layers; imports torch only."""

from __future__ import annotations

from torch import Tensor, nn


class Network(nn.Module):
    """A model as the engines see it.

    Attributes:
        normalise: map the input by (x - 0.5) / 0.5 first.
        checkpoint: recompute the model's own parts in the backward pass; parts have a switch of that name, too.
    """

    normalise = True
    checkpoint = False

    def set_checkpointing(self, on: bool) -> None:
        """Switch activation checkpointing of every part that knows it; results do not change."""
        for module in self.modules():
            if hasattr(module, "checkpoint"):
                module.checkpoint = on  # type: ignore[assignment]

    def fsdp_units(self) -> list[nn.Module]:
        """Modules to shard one by one, in forward order; what is left belongs to the root."""
        raise NotImplementedError

    def centred(self, x: Tensor) -> Tensor:
        """The input from [0, 1] to [-1, 1], where the model wants that."""
        return (x - 0.5) / 0.5 if self.normalise else x
