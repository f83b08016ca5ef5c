"""All named experiments, and `load(name, overrides)`, which gives the settings of one."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterator, Sequence

from launch.config.config import Config, ConfigError, apply_overrides
from launch.config.model import MODELS
from launch.experiments.experiment import Experiment

# The modules of this room that have experiments, in the order of the list and of the search.
FAMILIES = ("demo", "paip", "btcv", "open_data", "classification", "mammography", "resolution")
_CLOSE = 5


def family(name: str) -> dict[str, Experiment]:
    """The experiments of a family, by name."""
    found: dict[str, Experiment] = importlib.import_module(f"launch.experiments.{name}").EXPERIMENTS
    return found


def all_experiments() -> dict[str, Experiment]:
    """The experiments of all families, by name."""
    return {name: made for each in FAMILIES for name, made in family(each).items()}


def load(name: str, overrides: Sequence[str] = ()) -> Config:
    """The experiment `name` with `section.key=value` overrides.

    Families are imported one after another until one has the name.

    Raises:
        ConfigError: Unknown experiment or key, or a bad value.
    """
    for each in FAMILIES:
        if name in family(each):
            return apply_overrides(family(each)[name].config(name), overrides)
    listed = "`python -m launch experiments` lists the experiments"
    if name in MODELS:
        raise ConfigError(f"{name} is a model: give an experiment and model.name={name}; {listed}")
    close = ", ".join(difflib.get_close_matches(name, all_experiments(), _CLOSE))
    raise ConfigError(f"unknown experiment {name!r}{f' (did you mean {close}?)' if close else ''}; {listed}")


def describe(word: str = "") -> Iterator[str]:
    """The lines of the list: all families with their sizes, or the experiments that a word picks.

    The word is a family, or a part of a name or a description.

    Raises:
        ConfigError: Nothing has the word.
    """
    if not word:
        for each in FAMILIES:
            doc = importlib.import_module(f"launch.experiments.{each}").__doc__ or ""
            yield f"{each.replace('_', ' '):<15}{len(family(each)):>4}  {doc.partition(chr(10))[0]}"
        yield "python -m launch experiments WORD lists a group, or what has the word in its name or its description"
        return
    asked = word.lower()
    found = family(asked.replace(" ", "_")) if asked.replace(" ", "_") in FAMILIES else {}
    found = found or {n: e for n, e in all_experiments().items() if asked in n or asked in e.text.lower()}
    if not found:
        raise ConfigError(f"no experiment has {word!r} in its name or its description")
    width = max(map(len, found))
    for name, made in found.items():
        yield f"{name:<{width}}  {made.text}"
