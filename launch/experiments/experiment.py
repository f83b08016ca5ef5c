"""What an experiment is: one line of text, and its settings as people type them; must not import torch."""

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
        settings: Words `section.key=value` with a blank between them; of one key the last word counts.
    """

    text: str
    settings: str

    def but(self, text: str, settings: str) -> Experiment:
        """The same with other settings; a word `model.name=...` puts all settings of the old model aside."""
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
