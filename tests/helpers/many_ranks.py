"""Several runs one after the other on the same ranks: `python -m tests.helpers.many_ranks FILE`.

FILE holds a JSON list of settings: a list of overrides of `smoke`, or of the experiment that its first word names; or
`["as if killed", RUN, STEPS]`, which leaves a run directory as a run killed after so many steps leaves it. Importing
torch takes most of the time of a small run, so tests that compare many settings share one start of the processes.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from launch.data.pictures import open_files
from launch.engines import ranks as places
from launch.experiments.load import load
from launch.train.run import Start, open_together
from launch.train.run_record import RunFacts


def leave_as_if_killed(run_dir: Path, steps: int) -> None:
    """Take away what a run directory has beyond a number of steps, but for its metrics."""
    (run_dir / "record.json").unlink()
    for checkpoint in (run_dir / "checkpoints").glob("step-*"):
        if int(checkpoint.name[5:]) > steps:
            shutil.rmtree(checkpoint)


if __name__ == "__main__":
    ranks = places.find_ranks()
    device = torch.device("cpu")
    torch.set_num_threads(1)
    places.start(ranks, device)
    for words in json.loads(Path(sys.argv[1]).read_text()):
        if words[0] == "as if killed":
            if ranks.rank == 0:
                leave_as_if_killed(Path(words[1]), words[2])
            dist.barrier()
            continue
        config = load("smoke", words) if "=" in words[0] else load(words[0], words[1:])
        files, run_dir = open_files(config.data), config.run_dir(ranks.world)
        opened = open_together(config, files, ranks, run_dir)
        facts = RunFacts(config, files, ranks, run_dir, device, opened.starts)
        assert Start(facts, Path(opened.logs), 1).run() == 0
    places.finish(0)
