"""The comparison on open data, on this machine: token files, every row of every set for the same time, tables, a page.

Nothing is done twice, so the same command goes on after Ctrl-C or a kill. Must not import torch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from data_prep.system.ctrl_c import INTERRUPTED
from launch.config.config import ConfigError
from launch.engines.ranks import EXIT_AGAIN, EXIT_CONFIG, EXIT_OK
from launch.experiments.load import load
from launch.experiments.open_data import ROWS, SETS, left_out, prep_options
from launch.jobs.sweep import Axes, Member, members

# Where experiments have their files; `out` takes its place.
_ROOT = "runs/open"
_NOTHING_TO_COMPARE = 66
_POLL_S = 0.2


@dataclass(frozen=True)
class Study:
    """What to run.

    Attributes:
        data: Folder of the sets. Missing sets are left out.
        sets: Names of `SETS`.
        rows: Names of `ROWS`.
        seeds: Seeds of every row.
        seconds: Training seconds of every run.
        jobs: Runs at once, each on its share of the cores.
        out: Where everything goes.
    """

    data: Path
    sets: tuple[str, ...]
    rows: tuple[str, ...] = tuple(ROWS)
    seeds: tuple[int, ...] = (0, 1, 2)
    seconds: float = 150
    jobs: int = 1
    out: Path = Path(_ROOT)

    def moved(self, folder: str) -> str:
        """The folder of an experiment, in `out`."""
        return f"{self.out}{folder.removeprefix(_ROOT)}"

    def sets_there(self) -> list[str]:
        """The sets with all their folders; messages name the others.

        Raises:
            ConfigError: An unknown set, or none is there.
        """
        there = []
        for name in self.sets:
            if name not in SETS:
                raise ConfigError(f"SETS: {name} is none of {' '.join(SETS)}")
            folder = self.data / SETS[name].folder
            parts = ("images", "masks", "fov") if SETS[name].fov else ("images", "masks")
            lacks = [str(folder / part) for part in parts if not (folder / part).is_dir()]
            if lacks:
                _say(f"{name} is left out: no {lacks[0]} (DATA names the folder of the sets)")
            else:
                there.append(name)
        if not there:
            raise ConfigError(f"none of the sets is in {self.data}: set DATA")
        return there

    def experiments(self) -> dict[str, str]:
        """The experiments to run, each with its set; messages name the rows that a set does not have.

        Raises:
            ConfigError: An unknown row, or nothing is left to run.
        """
        found = {}
        for name in self.sets_there():
            why = left_out(name)
            for row in self.rows:
                if row in why:
                    _say(f"open_{name}_{row} is left out: {why[row]}")
                else:
                    load(f"open_{name}_{row}")
                    found[f"open_{name}_{row}"] = name
        if not found:
            raise ConfigError("no row is left to run")
        return found

    def settings(self, experiment: str) -> list[str]:
        """Settings of an experiment for every seed: where its files are, and how long it trains."""
        data = load(experiment).data
        variants = [self.moved(folder) for folder in data.variants]
        return [
            f"run_root={self.moved(f'{_ROOT}/runs')}",
            f"data.dir={self.moved(data.dir)}",
            *([f"data.variants={json.dumps(variants)}"] if variants else []),
            f"engine.threads={_cores() // self.jobs}",
            f"train.max_seconds={self.seconds:g}",
        ]

    def members(self, experiments: Iterable[str]) -> list[Member]:
        """All runs, seed by seed, so that every row has one run before any has two."""
        settings = {name: self.settings(name) for name in experiments}
        return [
            member
            for seed in self.seeds
            for name, words in settings.items()
            for member in members([name], Axes(), [*words, f"train.seed={seed}"])
        ]

    def preparations(self, experiments: dict[str, str]) -> dict[str, list[str]]:
        """Folders of token files, each with the words of `python -m launch prep` that make it."""
        found: dict[str, list[str]] = {}
        for name, of_set in experiments.items():
            data, source = load(name).data, self.data / SETS[of_set].folder
            for folder in (data.dir, *data.variants):
                words = [name, "--slides", str(source / "images"), "--masks", str(source / "masks")]
                words += ["--jobs", str(_cores()), f"data.dir={self.moved(folder)}", *prep_options(of_set, folder)]
                found.setdefault(folder, words + (["--fov", str(source / "fov")] if data.fov else []))
        return found


class _Processes:
    """Runs side by side. A signal lets them save and end; `stopped` is then the exit code, and no other run starts."""

    def __init__(self, at_once: int) -> None:
        self.stopped = EXIT_OK
        self._at_once = at_once
        self._running: dict[subprocess.Popen[bytes], Member] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.stopped = INTERRUPTED
        for process in list(self._running):
            process.terminate()

    def train(self, member: Member) -> None:
        """Start a run as soon as there is room for it."""
        self.wait(self._at_once - 1)
        if not self.stopped:
            words = [sys.executable, "-m", "launch", "train", member.experiment, *member.overrides]
            # Ctrl-C reaches only this process, which sends SIGTERM so that the runs save.
            process = subprocess.Popen(words, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
            self._running[process] = member
            if self.stopped:  # meanwhile
                process.terminate()

    def wait(self, most: int) -> None:
        """Wait until at most so many are running."""
        while True:
            for process in [process for process in self._running if process.poll() is not None]:
                self._ended(self._running.pop(process), process.returncode)
            if len(self._running) <= most:
                return
            time.sleep(_POLL_S)

    def _ended(self, member: Member, code: int) -> None:
        what = f"{member.experiment}, seed {member.config.train.seed},"
        if code == EXIT_CONFIG:  # perhaps a run of other settings is there, which must not mix with the rest
            _say(f"{what} was refused: if there are runs of other settings already, choose another OPEN_DIR")
        elif code not in (EXIT_OK, EXIT_AGAIN, INTERRUPTED) and not self.stopped:
            _say(f"{what} ended with {code}; its record says why")
        if code in (EXIT_CONFIG, EXIT_AGAIN, INTERRUPTED):
            self.stopped = self.stopped or (EXIT_CONFIG if code == EXIT_CONFIG else INTERRUPTED)


def run(study: Study) -> int:
    """Run the study; returns the exit code.

    Raises:
        ConfigError: An unknown set or row, or nothing to run.
    """
    # Everything that can be wrong is found before the first run.
    if not 1 <= study.jobs <= _cores():
        raise ConfigError(f"JOBS: {study.jobs} runs at once on {_cores()} cores")
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    experiments = study.experiments()
    found = study.members(experiments)
    processes = _Processes(study.jobs)

    _step(f"1/3 token files of {' '.join(dict.fromkeys(experiments.values()))}")
    for words in study.preparations(experiments).values():
        code, said = _python("launch", "prep", *words)
        print(said.strip().rpartition("\n")[2], flush=True)  # the last line, which sums up all slides
        if processes.stopped or code:
            return processes.stopped or code

    _step(f"2/3 training, {study.seconds:g} s each, {study.jobs} at once on {_cores() // study.jobs} cores each")
    for member in found:
        processes.train(member)
    processes.wait(0)
    if processes.stopped:
        return processes.stopped

    _step("3/3 tables, gains, page")
    runs = f"{study.out}/runs"
    for command, folder in (("tables", "tables"), ("gains", "tables"), ("report", "report")):
        # Another process, since launch must not import analysis.
        code, said = _python("analysis", command, runs, "--out", f"{study.out}/{folder}")
        print(said, end="", flush=True)
        if command == "gains" and code == _NOTHING_TO_COMPARE:
            _say("no gains: they hold apf against other rows, and what ran has no such pair")
        elif processes.stopped or code:
            return processes.stopped or code
    _step(f"done. The page: {study.out}/report/index.html")
    return EXIT_OK


def _python(*words: str) -> tuple[int, str]:
    """Exit code and output of `python -m WORDS`."""
    done = subprocess.run([sys.executable, "-m", *words], stdout=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stdout


def _cores() -> int:
    return len(os.sched_getaffinity(0))


_START_S = time.monotonic()


def _step(text: str) -> None:
    print(f"\n[study {time.monotonic() - _START_S:.0f}s] {text}", flush=True)


def _say(text: str) -> None:
    print(f"study: {text}", file=sys.stderr, flush=True)
