"""Distributed checkpoints that are complete or absent, checked before use, and loadable on any number of ranks.

A checkpoint is written as `step-N.tmp` and renamed to `step-N`. It counts once the file COMPLETE, with the sizes and
checksums of all its files, is in it. The module knows no engines: it saves trees of tensors.
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
    """Where a checkpoint goes, and which others stay."""

    folder: Path  # of all checkpoints of the run
    step: int  # finished steps
    keep: int  # newest checkpoints to keep
    best: int | None = None  # step of the best checkpoint, which is kept too

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
    """Save a checkpoint together with all ranks; afterwards the newest `place.keep` and the best one remain.

    Args:
        place: Where, and what to keep.
        state: Tree of (sharded) tensors, the same keys on every rank; an empty one is not written.
        notes: JSON values that come back with it.
        native: Writes an engine's own files into the folder it is given; called on every rank.

    Raises:
        Exception: Writing failed on some rank, as on a full disk; raised on every rank. Earlier checkpoints stay. The
            new one is removed, so that the record has room.
    """
    prepare(place, notes)
    if native is not None:
        # Errors are not caught: an engine that fails on one rank leaves the others in its own collectives.
        native(place.temporary)
        dist.barrier()

    def write() -> dict[str, list[int]]:
        if state:
            wait_for_shards(lambda: save_shards(state, storage_writer=Writer(place.temporary)))
        own = fingerprints(place.temporary) if state else {}
        return own if native is None else own | _native_fingerprints(place.temporary)

    publish(place, write)


def prepare(place: Place, notes: dict[str, Any]) -> None:
    """Make the folder of a new checkpoint, together with all ranks."""

    def work() -> None:
        shutil.rmtree(place.temporary, ignore_errors=True)
        place.temporary.mkdir(parents=True)
        write_atomic(place.temporary / "notes.json", json.dumps(notes).encode())

    on_first_rank(work)


def publish(place: Place, written: Callable[[], dict[str, list[int]]]) -> None:
    """Give a checkpoint its name and its mark once all ranks have written it, then remove the oldest.

    `written` writes this rank's files, or waits for them, and returns their fingerprints.

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
    if place.target.exists():  # saved again with a score: the old one stays until the new one is complete
        shutil.rmtree(place.replaced, ignore_errors=True)
        place.target.replace(place.replaced)
    place.temporary.replace(place.target)
    write_atomic(place.target / COMPLETE, json.dumps({"step": place.step, "files": files}).encode())
    shutil.rmtree(place.replaced, ignore_errors=True)
    for old_step in _steps(place.folder)[place.keep :]:
        if old_step != place.best:
            shutil.rmtree(place.folder / f"step-{old_step}", ignore_errors=True)


class Writer(FileSystemWriter):
    """Torch's writer, but a full disk stays an OSError: torch hides it behind an error of its own.

    The OSError must be found here, on its rank: what torch sends to the other ranks has lost it.
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
    """Call what saves, or waits for it; torch's wrapper around the error of any rank is taken off."""
    try:
        save()
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from error


def fingerprints(temporary: Path) -> dict[str, list[int]]:
    """Fingerprints of the shards that this rank wrote; rank 0 adds the index and the notes."""
    rank = dist.get_rank()
    mine = {path.name: _fingerprint(path) for path in sorted(temporary.glob(f"__{rank}_*"))}
    if rank == 0:
        mine |= {name: _fingerprint(temporary / name) for name in (".metadata", "notes.json")}
    return mine


def _native_fingerprints(temporary: Path) -> dict[str, list[int]]:
    """Fingerprints of this rank's share of an engine's own files."""
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

    The state is copied to host memory first. A thread writes the copy and talks to the other ranks over its own group.
    All ranks publish together, at a step at which all have finished. Until then the checkpoint before is the newest.
    All ranks call all methods together, except `writing`.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._stager = DefaultStager(StagingOptions(False, False, False, False))
        self._files: Future[dict[str, list[int]]] | None = None
        self._place: Place | None = None

    def begin(self, place: Place, state: dict[str, Any], notes: dict[str, Any]) -> None:
        """Publish what is under way, copy `state` and start writing it; the arguments are as in `save`.

        Raises:
            Exception: The folder cannot be made, or the checkpoint under way failed.
        """
        self.publish()
        prepare(place, notes)
        # Torch copies no CPU tensors, and training would change them while they are written.
        copy = tree_map_only(torch.Tensor, lambda t: t.detach().clone() if t.device.type == "cpu" else t, state)
        saved = async_save(
            copy, storage_writer=Writer(place.temporary), process_group=self._group, async_stager=self._stager
        )
        self._place, self._files = place, self._thread.submit(_finish, saved, place.temporary)

    @property
    def writing(self) -> bool:
        """Is this rank still writing?"""
        return self._files is not None and not self._files.done()

    def publish(self) -> None:
        """Wait for what is under way on any rank, and give it its name; raises as `publish` does."""
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
    wait_for_shards(saved.result)
    return fingerprints(temporary)


def _steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints, newest first."""
    names = [path.parent.name for path in folder.glob(f"step-*/{COMPLETE}")]
    return sorted((int(n[5:]) for n in names if n[5:].isdigit()), reverse=True)


def newest_complete(folder: Path) -> Path | None:
    """The newest complete checkpoint below `folder`, or None; checksums are not compared."""
    steps = _steps(folder)
    return folder / f"step-{steps[0]}" if steps else None


def find_sound(folder: Path, which: str, say: Callable[[str], None]) -> Path | None:
    """The folder of a complete checkpoint whose checksums are right, or None; needs no other rank.

    Args:
        folder: Folder of all checkpoints of the run.
        which: `last`, `best` (by the score on val that the newest one remembers) or a step.
        say: Gets one line for every newer checkpoint that is damaged.
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

    Rank 0 alone lists the checkpoints, since other ranks may see the file system differently. The ranks share the work
    of checking the files. A damaged checkpoint is skipped for the one before it.

    Args:
        folder: Folder of all checkpoints of the run.
        state: Tree with the tensors to fill in place, sharded as this run shards them.
        say: Gets one line for every checkpoint that is skipped; called on rank 0 only.
        native: Reads an engine's own files from the folder it is given; called on every rank.
        only: Look at this step's checkpoint alone.
        check: Gets the notes before anything is read; raises when this run cannot read the checkpoint.

    Returns:
        The notes of the checkpoint; None when there is no sound one, and then `state` is as it was.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    damaged: list[Path] = []
    for step in on_first_rank(lambda: [s for s in _steps(folder) if only in (None, s)]):
        source = folder / f"step-{step}"
        # Each rank checks its share of the files.
        faults: list[Any] = [None] * world
        dist.all_gather_object(faults, _fault(source, rank, world))
        fault = next((f for f in faults if f), None)
        if fault is None:
            # Read it.
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
    """Remove half-written checkpoints and put back what they would have replaced; on rank 0, when nobody saves."""
    for path in folder.glob("step-*"):
        if path.suffix == ".tmp" or not (path / COMPLETE).exists():
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("step-*.old"):
        target = path.with_suffix("")
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.replace(target)
