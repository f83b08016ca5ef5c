"""The two objects that every model takes: its settings, and the shape of its data.

A model's settings are a frozen dataclass beside it, in `segmentation.settings` or `classification.settings`. Each field
says in a sentence what it means and which values it takes, so a configuration can be checked on a login node.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")
Attention = Literal["full", "packed", "window", "performer_relu", "performer_softmax", "nystrom"]
Norm = Literal["instance", "batch", "none"]
PositionCode = Literal["slot", "geom", "both", "none"]
TaskName = Literal["segmentation", "classification"]
Inputs = Literal["tokens", "tiles", "images"]
NORMALISE = "map the input from [0, 1] to [-1, 1] first"
CHECKPOINTING = "recompute activations in the backward pass"

# Bounds of a field by the names that pydantic gives them too: in words, and as a test.
_BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "gt": ("greater than", operator.gt),
    "ge": ("at least", operator.ge),
    "lt": ("less than", operator.lt),
    "le": ("at most", operator.le),
    "multiple_of": ("a multiple of", lambda value, unit: value % unit == 0),
}


def option(default: T, description: str, **bounds: float) -> T:
    """A field of a settings class.

    Args:
        default: its value where none is given.
        description: what it means, for people.
        **bounds: gt, ge, lt, le or multiple_of, which its values keep.
    """
    return field(default=default, metadata={"description": description, **bounds})


@dataclass(frozen=True, kw_only=True)
class DataShape:
    """What the data gives a model.

    Attributes:
        size_px: side R of the frame, or of the crops that a network of tiles sees.
        patch: p, cells per token side.
        length: L, tokens per sequence after padding. (R / p)^2 means uniform patching, the only tiling of that length:
            tokens then take the place that they have in the frame, whatever their order.
        classes: K logits per cell, or classes of a picture.
        in_channels: channels of the input.
        image_hw: height and width of pictures; None: not known yet.
    """

    size_px: int = 1
    patch: int = 1
    length: int = 1
    classes: int = 1
    in_channels: int = 3
    image_hw: tuple[int, int] | None = None


def assumed(**values: Any) -> Mapping[str, Any]:
    """The fields of `DataShape` that a model reads, with the values it assumes; `...` where it has to be told."""
    return MappingProxyType(values)


TOKENS = assumed(size_px=..., patch=..., length=..., classes=1, in_channels=3)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Base of all settings.

    Attributes:
        name: registered name of the model.
        task: what the model answers.
        inputs: the kinds of data it can be trained on.
        has_attention: whether it has attention whose kernel a record should name.
        gives_token: whether it can append its class token to the logits, for distillation between sizes.
        data: what it reads of `DataShape`, see `assumed`.

    Raises:
        ValueError: a value out of range, or values that do not go together.
    """

    name: ClassVar[str]
    task: ClassVar[TaskName] = "segmentation"
    inputs: ClassVar[tuple[Inputs, ...]] = ("tokens",)
    has_attention: ClassVar[bool] = True
    gives_token: ClassVar[bool] = False
    data: ClassVar[Mapping[str, Any]] = TOKENS

    @property
    def decoder_name(self) -> str:
        """The decoder as records name it."""
        return str(getattr(self, "decoder", "conv"))

    @property
    def reconstruction(self) -> bool:
        """Whether its numbers are our guess at a paper's that are not known."""
        return False

    def __post_init__(self) -> None:
        types = get_type_hints(type(self))
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None:
                _check(item.name, value, types[item.name], item.metadata)


def _check(name: str, value: Any, hint: Any, bounds: Mapping[str, Any]) -> None:
    if get_origin(hint) is Literal and value not in get_args(hint):
        raise ValueError(f"{name} must be one of {', '.join(get_args(hint))}, got {value!r}")
    kept = {_BOUNDS[key]: bounds[key] for key in _BOUNDS if key in bounds}
    if all(holds(value, limit) for (_, holds), limit in kept.items()):
        return
    words = "be " + " and ".join(f"{word} {limit}" for (word, _), limit in kept.items())
    if bounds.keys() >= {"gt", "lt"}:
        words = f"lie between {bounds['gt']} and {bounds['lt']}"
    elif bounds.keys() >= {"ge", "le"}:
        *most, last = range(bounds["ge"], bounds["le"] + 1)
        words = f"be {', '.join(map(str, most))} or {last}" if len(most) < 3 else f"be {most[0]} to {last}"
    raise ValueError(f"{name} must {words}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class TransformerSizes(ModelSettings):
    """Sizes of a stack of transformer blocks, ViT-B by default."""

    width: int = option(768, "channels of a token", gt=0)
    depth: int = option(12, "transformer blocks", gt=0)
    heads: int = option(12, "attention heads; must divide width", gt=0)
    mlp_dim: int | None = option(None, "hidden channels of a block's MLP; null: 4 * width", gt=0)
    dropout: float = option(0.0, "in attention and MLP", ge=0, lt=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}")
