"""What the settings of every model share: frozen sections, empty values, the base class; must not import torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def none_from_text(value: Any) -> Any:
    """`key=null` and `key=none` of the command line mean no value."""
    return None if isinstance(value, str) and value.lower() in ("null", "none", "") else value


def number_from_text(value: Any) -> Any:
    """`key=2` of the command line is text; a list of allowed numbers holds numbers."""
    return int(value) if isinstance(value, str) and value.isdigit() else value


OptionalInt = Annotated[int | None, BeforeValidator(none_from_text)]
OptionalFloat = Annotated[float | None, BeforeValidator(none_from_text)]
OptionalText = Annotated[str | None, BeforeValidator(none_from_text)]
OptionalBool = Annotated[bool | None, BeforeValidator(none_from_text)]


class Section(BaseModel):
    """A frozen group of settings that refuses names it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", coerce_numbers_to_str=True, validate_default=True, allow_inf_nan=False
    )


Attention = Literal["full", "packed", "window", "performer_relu", "performer_softmax", "nystrom"]
Task = Literal["segmentation", "classification"]
Inputs = Literal["tokens", "tiles", "images"]

# Arguments of the models that the data section gives, each only to models that have it.
FROM_DATA = ("size_px", "patch", "length", "classes", "in_channels", "image_hw")


class ModelConfig(Section):
    """What every model has; sizes, channels and the number of classes come from the data section.

    Attributes:
        task: what the model answers, as its class in `hpc_models` says.
        inputs: the kinds of data it can be trained on (`data.kind`).
        has_attention: whether it has attention whose kernel a record should name.
    """

    task: ClassVar[Task] = "segmentation"
    inputs: ClassVar[tuple[Inputs, ...]] = ("tokens",)
    has_attention: ClassVar[bool] = True

    name: str = Field(description="registered name of the model")

    @property
    def decoder_name(self) -> str:
        """The decoder as records name it."""
        return str(getattr(self, "decoder", "conv"))

    def options(self) -> dict[str, Any]:
        """Keyword arguments for `hpc_models.registry.build`, without those that the data section gives."""
        return self.model_dump(exclude={"name"})
