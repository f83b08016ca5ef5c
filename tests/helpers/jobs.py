"""Submitting the committed job scripts to a test cluster, with settings that make them small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.helpers.cluster import Cluster, wait_for
from tests.helpers.repository import ROOT
from tests.helpers.small_runs import overrides


class Jobs:
    """Job scripts on `cluster`, runs and logs under `folder`."""

    def __init__(self, cluster: Cluster, files: Path, folder: Path) -> None:
        self.cluster, self.files, self.folder = cluster, files, folder
        self.runs = folder / "runs"
        self._ids: list[str] = []

    def settings(self, run_id: str, **more: object) -> list[str]:
        """Overrides that make any UNETR experiment small; `more` uses `__` for the dot."""
        small = {
            "model__decoder": "leaf",
            "train__precision": "fp32",
            "train__schedule": "constant",
            "run_id": run_id,
            "train__log_every": 1,
            "train__max_steps": 40,
        }
        return overrides(self.files, self.runs, **(small | more))

    def sbatch(self, script: str | Path, *words: str, options: tuple[str, ...] = (), **env: str) -> str:
        """Submit from the repository, as a user does; returns the job's number."""
        env = {"PREFLIGHT": "0", "OMP_NUM_THREADS": "1"} | env
        number = self.cluster.run(
            "sbatch",
            "--parsable",
            f"--chdir={ROOT}",
            f"--output={self.folder}/%j.out",
            *options,
            str(script),
            *words,
            **env,
        ).strip()
        self.track(number)
        return number

    def track(self, *numbers: str) -> None:
        """Cancel these at the end too."""
        self._ids += numbers

    def log(self, number: str) -> str:
        """What a job printed in all its lives."""
        path = self.folder / f"{number}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def run_dir(self, run_id: str, experiment: str = "paip_64k") -> Path:
        """Where a run lives."""
        return self.runs / experiment / run_id

    def record(self, run_id: str, experiment: str = "paip_64k") -> dict[str, Any]:
        """The record of a run."""
        record = json.loads((self.run_dir(run_id, experiment) / "record.json").read_text())
        assert isinstance(record, dict)
        return record

    def wait_steps(self, run_id: str, number: int, count: int) -> None:
        """Wait until a run has trained so many steps; a job that ended before is a failure with its log."""
        path = self.run_dir(run_id) / "metrics.jsonl"

        def there() -> bool:
            live = self.cluster.run("squeue", "--noheader", f"--jobs={number}", check=False).strip()
            assert live, self.log(str(number))
            return path.exists() and len(path.read_text().splitlines()) >= count

        wait_for(there, 90, f"{count} steps of {run_id}")

    def end(self) -> None:
        """Cancel what is left."""
        if self._ids:
            self.cluster.run("scancel", "--signal=KILL", *self._ids, check=False)
            self.cluster.run("scancel", *self._ids, check=False)
