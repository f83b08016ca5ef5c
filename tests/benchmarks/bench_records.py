"""Print how long 5,000 synthetic records take to load and to become a table: 500 experiments of ten seeds, or 5,000."""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from analysis.comparison.table import as_markdown, compare
from analysis.runs.records import load
from tests.helpers.run_folders import SHAPES, record, write_run

COUNT = 5_000


def measure(experiments: int) -> None:
    """Write, load and tabulate COUNT records of so many experiments; every tenth record is broken."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        names = list(SHAPES)
        for i in range(COUNT):
            experiment = f"{names[i % 4]}_{i % experiments}"
            gpus = 2 ** (i % experiments // 4 % 4)
            raw = record(names[i % 4], seed=i // experiments, run_id=f"run{i}", experiment=experiment, gpus=gpus)
            run = write_run(root, raw, folder=f"{i % 50}/{i}")
            if i % 10 == 9:
                (run / "record.json").write_text("{")
        began_s = time.perf_counter()
        runs = load(root)
        loaded_s = time.perf_counter()
        text = as_markdown(compare(runs))
        done_s = time.perf_counter()
    print(f"{COUNT} records, {experiments} experiments: {len(runs.ok)} usable, {len(runs.problems)} listed as problems")
    print(f"load {loaded_s - began_s:.2f} s, table {done_s - loaded_s:.2f} s, {len(text) / 1e6:.1f} MB of Markdown")


if __name__ == "__main__":
    for experiments in (500, COUNT):
        measure(experiments)
