"""`python -m analysis collect`: many run folders into one file."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from analysis.commands.answer import answer
from analysis.output.formats import write_files
from analysis.runs.records import STUDY, Problem, RunsError, find
from analysis.runs.run_files import PARTS
from launch.records.record import SCHEMA_VERSION

HELP = "records, settings, curves and scores of many runs in one file, which reads like their folder"
_EPILOG = """\
The file has one line of JSON a run: its folder, record, settings, environment, curves, scores of the test items and
tokens of its slides. Every command of `python -m analysis` reads FILE like the folder RUNS, and FILE/FOLDER like one
of its runs. A run without a usable record becomes a line that says why. Pictures of test slides are large: only
--pictures takes them along, and only then can FILE draw the figure of predictions.

examples:
  python -m analysis collect runs --out study.jsonl
  python -m analysis tables study.jsonl
  python -m analysis compare study.jsonl/demo_apf study.jsonl/demo_uniform_patch

exit codes: 0 done; 1 there is no run; 64 wrong arguments.
"""


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add its arguments."""
    parser.description = "Write everything that the tables and figures of a folder of runs need into one file."
    parser.epilog = _EPILOG
    parser.add_argument("runs", type=Path, metavar="RUNS", help="folder of runs")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=f"file to write, NAME{STUDY}")
    parser.add_argument("--pictures", action="store_true", help="also the pictures of test slides")


def run(args: argparse.Namespace) -> int:
    """Write it; returns the exit code.

    Raises:
        RunsError: RUNS cannot be read, or has no run.
        ValueError: The file cannot be written, or has another name.
    """
    if args.out.suffix != STUDY:
        raise ValueError(f"--out {args.out}: the name must end in {STUDY}")
    lines = list(_lines(args.runs, args.pictures))
    if not lines:
        raise RunsError(f"{args.runs}: no run in this folder or below it", 1)
    head = {"study": args.out.stem, "schema_version": SCHEMA_VERSION, "runs": len(lines)}
    write_files(args.out.parent, {args.out.name: "".join(json.dumps(line) + "\n" for line in (head, *lines))})
    return answer(f"{len(lines)} runs\n", [args.out])


def _lines(root: Path, pictures: bool) -> Iterator[dict[str, Any]]:
    """One line for each run, in the order of their folders, and for each folder that could not be read."""
    problems: list[Problem] = []
    found = sorted(find(root, problems), key=lambda entry: entry.files.folder.as_posix())
    for entry in found:
        line: dict[str, Any] = {"folder": entry.files.folder.relative_to(root).as_posix()}
        if entry.raw is not None:
            parts = {name: entry.files.part(name) for name in PARTS if pictures or name != "pictures"}
            yield line | {"record": entry.raw} | {name: value for name, value in parts.items() if value}
        elif entry.problem is not None:
            yield line | _problem(entry.problem)
    for problem in problems if found else ():
        yield {"folder": problem.path.relative_to(root).as_posix()} | _problem(problem)


def _problem(problem: Problem) -> dict[str, Any]:
    return {"problem": {"kind": problem.kind, "reason": problem.reason}}
