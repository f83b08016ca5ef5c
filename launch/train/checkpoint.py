"""Distributed checkpoints that are complete or absent, checked before use, and loadable on any number of ranks.

A checkpoint is written as `step-N.tmp`, renamed to `step-N`, and counts once the file COMPLETE with the sizes and
checksums of all its files is in it. Knows nothing of engines: it saves trees of tensors.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.utils._pytree import tree_map_only

from data_prep.system.files import write_atomic
from launch.engines.ranks import on_first_rank

COMPLETE = "COMPLETE"
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Place:
    """Where a checkpoint goes, and which others stay.

    Attributes:
        folder: Folder of all checkpoints of the run.
        step: Finished steps.
        keep: Newest checkpoints to keep.
        best: Step of the checkpoint with the best score, which is kept too.
    """

    folder: Path
    step: int
    keep: int
    best: int | None = None

    @property
    def target(self) -> Path:
        """The finished checkpoint."""
        return self.folder / f"step-{self.step}"

    @property
    def temporary(self) -> Path:
        """The one that is being written."""
        return self.folder / f"step-{self.step}.tmp"

    @property
    def replaced(self) -> Path:
        """An earlier one of the same step, until the new one counts."""
        return self.folder / f"step-{self.step}.old"


def save(
    place: Place, state: dict[str, Any], notes: dict[str, Any], native: Callable[[Path], None] | None = None
) -> None:
    """Save a checkpoint together with all ranks; afterwards the newest `place.keep` remain, and the best one.

    Args:
        place: Where, and what to keep.
        state: Tree of (sharded) tensors, the same keys on every rank; an empty one is not written.
        notes: JSON values that come back with it.
        native: Writes an engine's own files into the folder it is given; called on every rank.

    Raises:
        Exception: Writing failed on some rank (full disk...); raised on every rank. Earlier checkpoints stay, and
            what was written of this one is removed, so that a full disk has room for the record that tells of it.
    """
    prepare(place, notes)

    if native is not None:
        # Not caught: an engine that fails on one rank leaves the others inside its own collectives.
        native(place.temporary)
        dist.barrier()

    def write() -> dict[str, list[int]]:
        if state:
            wait_for_shards(lambda: save_shards(state, storage_writer=Writer(place.temporary)))
        own = fingerprints(place.temporary) if state else {}
        return own if native is None else own | _native_fingerprints(place.temporary)

    publish(place, write)


def prepare(place: Place, notes: dict[str, Any]) -> None:
    """Make the folder of a checkpoint that is about to be written, together with all ranks."""

    def work() -> None:
        shutil.rmtree(place.temporary, ignore_errors=True)
        place.temporary.mkdir(parents=True)
        write_atomic(place.temporary / "notes.json", json.dumps(notes).encode())

    on_first_rank(work)


def publish(place: Place, written: Callable[[], dict[str, list[int]]]) -> None:
    """Give a checkpoint its name and its mark once all ranks have written it, then remove the oldest.

    Args:
        place: Where.
        written: Writes, or waits for, what is this rank's; returns the fingerprints of these files.

    Raises:
        Exception: What `written` raised on any rank; raised on every rank, and the folder is removed.
    """
    try:
        mine: dict[str, list[int]] = {}
        failure: Exception | None = None
        try:
            mine = written()
        except Exception as error:
            failure = error
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (mine, failure))
        for cause in (failure, *(other for _, other in everyone)):
            if cause is not None:
                raise cause
        files = {name: value for part, _ in everyone for name, value in part.items()}
        on_first_rank(lambda: _name_and_mark(place, files))
    except BaseException:
        if dist.get_rank() == 0:
            clean(place.folder)
        raise


def _name_and_mark(place: Place, files: dict[str, list[int]]) -> None:
    if place.target.exists():  # saved again with a score: it stays until the new one is complete
        shutil.rmtree(place.replaced, ignore_errors=True)
        place.target.replace(place.replaced)
    place.temporary.replace(place.target)
    write_atomic(place.target / COMPLETE, json.dumps({"step": place.step, "files": files}).encode())
    shutil.rmtree(place.replaced, ignore_errors=True)
    for old_step in _steps(place.folder)[place.keep :]:
        if old_step != place.best:
            shutil.rmtree(place.folder / f"step-{old_step}", ignore_errors=True)


class Writer(FileSystemWriter):
    """Writes as torch does, but a full disk is an OSError: torch's archive writer hides it behind an error of its own.

    It has to be found here, on the rank where it happened: what torch sends to the other ranks has lost it.
    """

    def write_data(self, plan: Any, planner: Any) -> Any:
        """See `FileSystemWriter`."""
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            root: BaseException | None = error
            while root is not None and not isinstance(root, OSError):
                root = root.__cause__ or root.__context__
            if root is None:
                raise
            raise root from None


def wait_for_shards(save: Callable[[], Any]) -> None:
    """Call what saves, or waits for it; what went wrong on any rank is raised bare: torch wraps it in many lines."""
    try:
        save()
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from error


def fingerprints(temporary: Path) -> dict[str, list[int]]:
    """Of the shards that this rank wrote; rank 0 adds the index and the notes."""
    rank = dist.get_rank()
    mine = {path.name: _fingerprint(path) for path in sorted(temporary.glob(f"__{rank}_*"))}
    if rank == 0:
        mine |= {name: _fingerprint(temporary / name) for name in (".metadata", "notes.json")}
    return mine


def _native_fingerprints(temporary: Path) -> dict[str, list[int]]:
    """Of this rank's share of the files that an engine wrote by itself."""
    paths = sorted(p for p in temporary.rglob("*") if p.is_file() and not p.name.startswith(("__", ".metadata")))
    share = paths[dist.get_rank() :: dist.get_world_size()]
    return {path.relative_to(temporary).as_posix(): _fingerprint(path) for path in share}


def _fingerprint(path: Path) -> list[int]:
    """Size and CRC-32 of a file."""
    crc = 0
    with path.open("rb") as source:
        while block := source.read(_BLOCK):
            crc = zlib.crc32(block, crc)
    return [path.stat().st_size, crc]


class BackgroundSaver:
    """Writes checkpoints while training goes on, at most one at a time.

    What is to be saved is copied to host memory first; a thread then writes the copy, talking to the other ranks over a
    group of its own. All ranks publish together, at a step at which all have finished: until then the checkpoint before
    is the newest. All methods but `writing` are called by all ranks together.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._stager = DefaultStager(StagingOptions(False, False, False, False))
        self._files: Future[dict[str, list[int]]] | None = None
        self._place: Place | None = None

    def begin(self, place: Place, state: dict[str, Any], notes: dict[str, Any]) -> None:
        """Copy `state` and write it from now on; what was under way is published first.

        Args:
            place: Where, and what to keep.
            state: Tree of (sharded) tensors, the same keys on every rank.
            notes: JSON values that come back with it.

        Raises:
            Exception: The folder cannot be made, or the checkpoint under way failed.
        """
        self.publish()
        prepare(place, notes)
        # What lies on the CPU already is not copied by torch, and training would change it under the writer's hands.
        copy = tree_map_only(torch.Tensor, lambda t: t.detach().clone() if t.device.type == "cpu" else t, state)
        saved = async_save(
            copy, storage_writer=Writer(place.temporary), process_group=self._group, async_stager=self._stager
        )
        self._place, self._files = place, self._thread.submit(_finish, saved, place.temporary)

    @property
    def under_way(self) -> bool:
        """Is a checkpoint not published yet? The same on all ranks."""
        return self._files is not None

    @property
    def writing(self) -> bool:
        """Is this rank still writing?"""
        return self._files is not None and not self._files.done()

    def publish(self) -> None:
        """Wait for what is under way on any rank, and give it its name.

        Raises:
            Exception: Writing failed on some rank (full disk...); raised on every rank. What was written is removed.
        """
        if self._files is None or self._place is None:
            return
        place, mine = self._place, self._files
        self._place = self._files = None
        publish(place, mine.result)

    def close(self) -> None:
        """Publish what is under way and end the thread."""
        self.publish()
        self._thread.shutdown()
        self._stager.close()


def _finish(saved: Any, temporary: Path) -> dict[str, list[int]]:
    """Fingerprints of this rank's files, once they are written."""
    wait_for_shards(saved.result)
    return fingerprints(temporary)


def _steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints, newest first."""
    names = [path.parent.name for path in folder.glob(f"step-*/{COMPLETE}")]
    return sorted((int(n[5:]) for n in names if n[5:].isdigit()), reverse=True)


def newest_complete(folder: Path) -> Path | None:
    """The newest complete checkpoint below `folder`, or None; its checksums are not looked at."""
    steps = _steps(folder)
    return folder / f"step-{steps[0]}" if steps else None


def find_sound(folder: Path, which: str, say: Callable[[str], None]) -> Path | None:
    """A complete checkpoint whose files have not changed, looked for by this process alone.

    Args:
        folder: Folder of all checkpoints of the run.
        which: `last`, `best` (by the score on val that the newest one remembers) or a step.
        say: Told in one line about every newer checkpoint that is damaged.

    Returns:
        Its folder; None when there is none.
    """
    steps = _steps(folder)
    if which == "best":
        newest = find_sound(folder, "last", say)
        best = None if newest is None else json.loads((newest / "notes.json").read_text()).get("best")
        steps = [int(best[1])] if best and int(best[1]) in steps else []
    elif which != "last":
        steps = [s for s in steps if str(s) == which]
    for step in steps:
        source = folder / f"step-{step}"
        fault = _fault(source, 0, 1)
        if fault is None:
            return source
        say(f"checkpoint {source} is damaged ({fault})")
    return None


def load_newest(
    folder: Path,
    state: dict[str, Any],
    say: Callable[[str], None],
    native: Callable[[Path, dict[str, Any]], None] | None = None,
    only: int | None = None,
    check: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any] | None:
    """Fill `state` from the newest sound checkpoint, together with all ranks.

    Rank 0 looks which checkpoints there are, so that ranks with another view of the file system do not choose
    otherwise; the ranks share the work of checking the files. A damaged one is passed over, for the one before it.

    Args:
        folder: Folder of all checkpoints of the run.
        state: Tree with the tensors to fill in place, sharded as this run shards them.
        say: Told in one line about every checkpoint that was passed over; called on rank 0 only.
        native: Reads an engine's own files from the folder it is given; called on every rank.
        only: Look at this step's checkpoint alone.
        check: Given the notes before anything is read; raises when this run cannot read such a checkpoint.

    Returns:
        The notes saved with the checkpoint; None when there is no sound one, and then `state` is as it was.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    damaged: list[Path] = []
    for step in on_first_rank(lambda: [s for s in _steps(folder) if only in (None, s)]):
        source = folder / f"step-{step}"
        fault = _fault(source, rank, world)
        faults: list[Any] = [None] * world
        dist.all_gather_object(faults, fault)
        fault = next((f for f in faults if f), None)
        if fault is None:
            _set_aside(damaged, rank)
            notes: dict[str, Any] = json.loads((source / "notes.json").read_text())
            if check is not None:
                check(notes)
            if state:
                load_shards(state, checkpoint_id=source)
            if native is not None:
                native(source, notes)
            return notes
        if rank == 0:
            say(f"checkpoint {source} is damaged ({fault}); trying the one before it")
        damaged.append(source)
    _set_aside(damaged, rank)
    return None


def _set_aside(damaged: list[Path], rank: int) -> None:
    """Rename damaged checkpoints, or they would count as the newest when old ones are removed."""
    if rank == 0:
        for source in damaged:
            aside = source.with_name(f"damaged-{source.name}")
            shutil.rmtree(aside, ignore_errors=True)
            source.replace(aside)


def _fault(source: Path, rank: int, world: int) -> str | None:
    """What is wrong with this rank's share of the files, or None."""
    try:
        files = json.loads((source / COMPLETE).read_text())["files"]
        for name in sorted(files)[rank::world]:
            if _fingerprint(source / name) != files[name]:
                return f"{name} has changed"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return str(error)
    return None


def clean(folder: Path) -> None:
    """Remove what was left half-written, and put back what it would have replaced. Rank 0 only, when nobody saves."""
    for path in folder.glob("step-*"):
        if path.suffix == ".tmp" or not (path / COMPLETE).exists():
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("step-*.old"):
        target = path.with_suffix("")
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.replace(target)
