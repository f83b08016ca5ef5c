"""Checkpoints that are written while training goes on; knows nothing of engines, like `launch.train.checkpoint`.

What is to be saved is copied to host memory first; a thread then writes the copy, talking to the other ranks over a
group of its own. All ranks publish together, at a step at which all have finished: until then the checkpoint before
is the newest.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.utils._pytree import tree_map_only

from launch.train import checkpoint


class BackgroundSaver:
    """At most one checkpoint is under way. All methods but `writing` are called by all ranks together."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._stager = DefaultStager(StagingOptions(False, False, False, False))
        self._files: Future[dict[str, list[int]]] | None = None
        self._place: checkpoint.Place | None = None

    def begin(self, place: checkpoint.Place, state: dict[str, Any], notes: dict[str, Any]) -> None:
        """Copy `state` and write it from now on; what was under way is published first.

        Args:
            place: Where, and what to keep.
            state: Tree of (sharded) tensors, the same keys on every rank.
            notes: JSON values that come back with it.

        Raises:
            Exception: The folder cannot be made, or the checkpoint under way failed.
        """
        self.publish()
        checkpoint.prepare(place, notes)
        # What lies on the CPU already is not copied by torch, and training would change it under the writer's hands.
        copy = tree_map_only(torch.Tensor, lambda t: t.detach().clone() if t.device.type == "cpu" else t, state)
        saved = async_save(
            copy,
            storage_writer=checkpoint.Writer(place.temporary),
            process_group=self._group,
            async_stager=self._stager,
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
        checkpoint.publish(place, mine.result)

    def close(self) -> None:
        """Publish what is under way and end the thread."""
        self.publish()
        self._thread.shutdown()
        self._stager.close()


def _finish(saved: Any, temporary: Path) -> dict[str, list[int]]:
    """Fingerprints of this rank's files, once they are written."""
    checkpoint.wait_for_shards(saved.result)
    return checkpoint.fingerprints(temporary)
