"""An experiment: one line of text, and its settings as people type them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from launch.config.config import Config, validate


@dataclass(frozen=True)
class Experiment:
    """A named experiment, without its name.

    Attributes:
        text: One line for the list.
        settings: Words `section.key=value` with blanks between them. The last word of a key counts.
    """

    text: str
    settings: str

    def but(self, text: str, settings: str) -> Experiment:
        """This experiment with other settings; a word `model.name=...` drops all settings of the old model."""
        return Experiment(text, f"{self.settings} {settings}")

    def config(self, name: str) -> Config:
        """The full configuration, under this name.

        Raises:
            ConfigError: An unknown key, or a value that does not fit.
        """
        tree: dict[str, Any] = {"experiment": name}
        for word in self.settings.split():
            key, _, value = word.partition("=")
            section, _, leaf = key.rpartition(".")
            if key == "model.name":
                tree["model"] = {}
            part = tree.setdefault(section, {}) if section else tree
            part[leaf] = yaml.safe_load(value) if value.startswith("[") else value
        return validate(tree)
