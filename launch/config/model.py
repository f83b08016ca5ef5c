"""The model's section: a settings class of `hpc_models`, checked like the other sections."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import BeforeValidator, Field, create_model

from hpc_models import registry
from hpc_models.settings import ModelSettings
from launch.config.base import Section, none_from_text

# A U-Net trains on crops only, under the name that says so.
MODELS = tuple(sorted({*registry.MODELS, *registry.ALIASES} - {"unet"}))
NAME = "registered name of the model"


@cache
def _section(name: str) -> type[Section]:
    """The fields of a model's settings as a section, which reads texts of the command line and names faults."""
    settings = registry.settings_class(name)
    found: dict[str, Any] = {"name": (Literal[name], Field(default=name))}
    types = get_type_hints(settings)
    for item in fields(settings):
        hint = types[item.name]
        if NoneType in get_args(hint):
            hint = Annotated[hint, BeforeValidator(none_from_text)]
        found[item.name] = (hint, Field(default=item.default, **item.metadata))
    return create_model(settings.__name__, __base__=Section, **found)


def checked(settings: type[ModelSettings], values: dict[str, Any]) -> ModelSettings:
    """The settings in a configuration's `model` section.

    Raises:
        ValidationError: an unknown key, or a value of another type or out of range.
        ValueError: values that do not go together.
    """
    section = _section(settings.name).model_validate(values)
    return settings(**{item.name: getattr(section, item.name) for item in fields(settings)})


def rows(model: ModelSettings) -> list[tuple[str, Any, str]]:
    """Key, value and description of every setting, the name first."""
    own = [(item.name, getattr(model, item.name), item.metadata["description"]) for item in fields(model)]
    return [("name", model.name, NAME), *own]
