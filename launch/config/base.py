"""What all sections share: frozen groups of settings, empty values of the command line."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


def none_from_text(value: Any) -> Any:
    """`key=null` and `key=none` on the command line mean no value."""
    return None if isinstance(value, str) and value.lower() in ("null", "none", "") else value


def number_from_text(value: Any) -> Any:
    """`key=2` on the command line is text, but a list of allowed numbers holds numbers."""
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
