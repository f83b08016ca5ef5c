"""One start of a training run on one rank: prepare, train, write the record, exit with the right code."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from data_prep.system.files import write_atomic
from launch.config.config import Config, ConfigError
from launch.data.pictures import Files, open_files
from launch.engines import ranks as places
from launch.engines.ranks import EXIT_AGAIN, EXIT_CONFIG, EXIT_CRASH, EXIT_OK, Ranks
from launch.records.record import environment, memory_summary, read_record, to_json, write_record
from launch.records.run_dir import OpenedRun, open_run
from launch.train.checks import check_model, check_world
from launch.train.lifetime import Log, StopFlag, Watchdog
from launch.train.run_record import RunFacts, status_of, summary


def train(config: Config) -> int:
    """Run or resume a training run; ends the process itself once the ranks have met.

    It returns, with 0, only for a finished run that needed no ranks.

    Raises:
        ConfigError, RankError: A setting is wrong; exit code 64.
    """
    # Errors in the settings are reported before torch is loaded and before the ranks meet.
    ranks = places.find_ranks()
    places.end_with_launcher(ranks)
    check_world(config, ranks.world)
    if config.log.sinks:
        from launch.records.loggers import check_sinks

        check_sinks(config.log.sinks)
    files = open_files(config.data)
    run_dir = config.run_dir(ranks.world)
    if ranks.world == 1 and not config.force and _is_finished(run_dir, config):
        return _tell_finished(run_dir)
    check_model(config)
    if ranks.rank == 0 and config.train.init_from is not None:
        _tell_other_settings(config)

    # The ranks meet. Their group waits longer than the watchdog, which can say where each rank hangs.
    threads = places.share_threads(ranks, config.engine.threads)
    device = places.pick_device(config.engine.device, ranks)
    places.start(ranks, device, max(1800.0, 300.0 + (config.log.hang_seconds or 0.0)))

    # They open the run directory together, then train.
    opened = open_together(config, files, ranks, run_dir)
    if opened.finished:
        places.finish(_tell_finished(run_dir) if ranks.rank == 0 else EXIT_OK)
    facts = RunFacts(config, files, ranks, run_dir, device, opened.starts)
    return places.finish(Start(facts, Path(opened.logs), threads).run())


def _tell_other_settings(config: Config) -> None:
    from launch.train.weights import other_settings

    if others := other_settings(config):
        what = "its model was trained with other settings (there -> here)"
        print(f"note: train.init_from={config.train.init_from}: {what}: {'; '.join(others)}", file=sys.stderr)


def _is_finished(run_dir: Path, config: Config) -> bool:
    record = read_record(run_dir)
    return record is not None and record["status"] == "ok" and record["config_sha256"] == config.sha256()


def _tell_finished(run_dir: Path) -> int:
    print(f"already finished: {run_dir / 'record.json'} (force=true trains anew)", file=sys.stderr)
    return EXIT_OK


def open_together(config: Config, files: Files, ranks: Ranks, run_dir: Path) -> OpenedRun:
    """Rank 0 checks the files and opens the run directory; all ranks get its answer, or exit with its error."""
    import torch.distributed as dist

    hosts: list[Any] = [None] * ranks.world
    device = places.pick_device(config.engine.device, ranks)
    dist.all_gather_object(hosts, (os.uname().nodename, places.device_name(device)))

    def work() -> OpenedRun:
        # The data is checked first, so that a run that cannot start leaves no folder behind.
        if config.force or not _is_finished(run_dir, config):
            files.check()
        opened = open_run(run_dir, config)
        if not opened.finished and not (run_dir / "env.json").exists():
            names, devices = zip(*hosts, strict=True)
            write_atomic(run_dir / "env.json", to_json(environment(list(names), list(devices), ranks.launcher)))
        return opened

    try:
        return places.on_first_rank(work)
    except ConfigError as error:
        reason = str(error)
    except OSError as error:
        reason = f"run_root={config.run_root}: {run_dir}: {error.strerror or error}"
    if ranks.rank == 0:
        print(f"error: {reason}", file=sys.stderr)
    return places.finish(EXIT_CONFIG)


class Start:
    """One start of a run on this rank, from building the trainer to writing the record."""

    def __init__(self, facts: RunFacts, logs: Path, threads: int) -> None:
        self.facts, self.logs, self.log = facts, logs, Log(logs, facts.ranks.rank)
        config, ranks = facts.config, facts.ranks
        self.log.say(
            f"{config.experiment}: {ranks.world} rank{'s' * (ranks.world > 1)} ({ranks.launcher}), "
            f"{facts.device.type}, {threads} thread{'s' * (threads > 1)} each, {config.engine.name}, "
            f"{config.train.precision} -> {facts.run_dir}"
        )

    def run(self) -> int:
        """Train, write the record and return the exit code; an error on this rank ends the process."""
        # Watch for signals and for a standstill.
        facts, rank = self.facts, self.facts.ranks.rank
        stop = StopFlag(facts.run_dir / "STOP" if rank == 0 else None)
        stop.install()
        watchdog = Watchdog(facts.config.log.hang_seconds, self.logs, rank, self._hangs)
        try:
            from launch.train.trainer import Trainer

            watchdog.start()
            trainer = facts.trainer = Trainer(
                facts.config, facts.files, facts.ranks, facts.device, facts.run_dir, stop, self.log.say, self.logs
            )
            # Every forward pass, in training and in evaluation, is a sign of life.
            trainer.engine.module.register_forward_pre_hook(watchdog.beat)
            # Train, then write the record.
            outcome = trainer.run()
            record = facts.final_record(outcome)
            if rank == 0:
                write_record(facts.run_dir, record)
            trainer.close()
            watchdog.stop()
        except ConfigError as error:  # the model or the engine refused; every rank sees it
            self._fail(error, EXIT_CONFIG)
        except BaseException as error:  # any failure becomes a record
            self._fail(error)
        self.log.say(summary(record))
        return EXIT_AGAIN if outcome.stopped_by else EXIT_OK

    def _hangs(self, where: str) -> None:
        """Called by the watchdog's thread."""
        self._fail(TimeoutError(f"{where}; stacks of all threads in {self.logs}"))

    def _fail(self, error: BaseException, code: int = EXIT_CRASH) -> NoReturn:
        """Write the failure down and exit at once: the other ranks wait in a collective and cannot be asked."""
        try:
            self._write_failure(error)
        except BaseException as second:  # a full disk must not keep the ranks alive
            print(f"error: {error} (and no record could be written: {second})", file=sys.stderr)
        finally:
            places.leave(code)

    def _write_failure(self, error: BaseException) -> None:
        rank = self.facts.ranks.rank
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")
        record = self.facts.record(status_of(error), f"rank {rank}: {reason}")
        first = write_record(self.facts.run_dir, record, first_wins=True)
        with contextlib.suppress(OSError):  # on a full disk the record matters more than the traceback
            tail = "".join(traceback.format_exception(error))[-8000:]
            (self.logs / f"error-rank-{rank}.txt").write_text(tail)
            if record["status"] == "oom":
                (self.logs / f"memory-rank-{rank}.txt").write_text(memory_summary(self.facts.device))
        if first:
            print(f"error: {reason} (rank {rank}; traceback in {self.logs})", file=sys.stderr)
