"""Several runs of the `smoke` experiment one after the other on the same ranks: `python -m tests.launch.many FILE`.

FILE holds a JSON list of override lists. Importing torch takes most of the time of a small run, so tests that compare
many settings share one start of the processes.
"""

import json
import sys
from pathlib import Path

import torch

from launch import ranks as places
from launch.config import load
from launch.data import TokenFiles
from launch.run import Start, open_together

if __name__ == "__main__":
    ranks = places.find_ranks()
    device = torch.device("cpu")
    torch.set_num_threads(1)
    places.start(ranks, device)
    for words in json.loads(Path(sys.argv[1]).read_text()):
        config = load("smoke", words)
        files, run_dir = TokenFiles(config.data), config.run_dir(ranks.world)
        opened = open_together(config, files, ranks, run_dir)
        assert Start(config, files, ranks, run_dir, device, opened, 1).run() == 0
    places.finish(0)
