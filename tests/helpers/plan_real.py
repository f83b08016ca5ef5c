"""Counts the third step of real runs with torch's own tools: `python -m tests.helpers.plan_real FILE`, on every rank.

FILE holds a JSON list of [name, overrides]; the counts of rank 0 go to FILE.counts, by name. FLOPs come from
FlopCounterMode, collectives from CommDebugMode and from a mode that knows nothing of the planner, the peak of memory
from the allocations that torch's profiler recorded since before the model was made.
"""

import contextlib
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from launch.data.token_files import TokenFiles
from launch.engines import ranks as places
from launch.experiments.load import load
from launch.train import trainer
from launch.train.run import Start, open_together
from launch.train.run_record import RunFacts

STEP = 3
# Which argument of an operation of c10d is the whole tensor.
WHOLE = {
    "allreduce_": 0,
    "_allgather_base_": 0,
    "allgather_": 0,
    "_reduce_scatter_base_": 1,
    "all_reduce": 0,
    "all_to_all_single": 0,
    "broadcast_": 0,
}
QUIET = ("wait_tensor", "_wrap_tensor_autograd")  # they send nothing
# FlopCounterMode has no formula for attention on CPUs.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *a, **b: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *a, **b: sdpa_backward_flop_count(g, q, k, v)
    ),
}


class CollectiveBytes(TorchDispatchMode):
    """Name -> [number, bytes of the whole tensor] of every operation of c10d."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        library, _, name = func._schema.name.partition("::")
        if library in ("c10d", "_c10d_functional") and name not in QUIET:
            tensors = tree_leaves(args[WHOLE[name]])
            row = self.seen.setdefault(name, [0, 0])
            row[0] += 1
            row[1] += sum(t.numel() * t.element_size() for t in tensors)
        return func(*args, **(kwargs or {}))


def counted_run(words: list[str], ranks: places.Ranks) -> dict[str, Any]:
    """One run of `smoke` whose third step is counted."""
    device, window = torch.device("cpu"), []
    config = load("smoke", words)
    flops = FlopCounterMode(display=False, custom_mapping=ATTENTION)
    comm, bytes_seen = CommDebugMode(), CollectiveBytes()
    counting = contextlib.ExitStack()
    real_agree, real_step = trainer.Trainer._agree, trainer.Trainer._train_step

    def agree(self: trainer.Trainer) -> tuple[str, float]:
        if self.step == STEP - 1:
            for mode in (flops, *([comm] if config.train.accumulate == 1 else []), bytes_seen):
                counting.enter_context(mode)  # CommDebugMode cannot follow FSDP through two backward passes
            window.append(time.time_ns())
        return real_agree(self)

    def step(self: trainer.Trainer, *args: Any) -> None:
        real_step(self, *args)
        if self.step == STEP:
            window.append(time.time_ns())
            counting.close()

    files, run_dir = TokenFiles(config.data), config.run_dir(ranks.world)
    gc.collect()  # what the run before left must not be freed, and so subtracted, in this one
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded,
        patch.object(trainer.Trainer, "_agree", agree),
        patch.object(trainer.Trainer, "_train_step", step),
    ):
        opened = open_together(config, files, ranks, run_dir)
        facts = RunFacts(config, files, ranks, run_dir, device, opened.starts)
        assert Start(facts, Path(opened.logs), 1).run() == 0
    return {
        "flops": flops.get_total_flops(),
        "collectives": bytes_seen.seen,
        "comm": comm.get_total_counts(),
        "peak_bytes": peak_of(recorded, *window),
    }


def peak_of(recorded: profile, start_ns: int, end_ns: int) -> int:
    """Largest sum of allocations minus frees within a time window."""
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = best = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        if start_ns <= event.start_ns() <= end_ns:
            best = max(best, live)
    return best


if __name__ == "__main__":
    ranks = places.find_ranks()
    torch.set_num_threads(1)
    places.start(ranks, torch.device("cpu"))
    path = Path(sys.argv[1])
    results = {name: counted_run(words, ranks) for name, words in json.loads(path.read_text())}
    if dist.get_rank() == 0:
        path.with_suffix(".counts").write_text(json.dumps(results))
    places.finish(0)
