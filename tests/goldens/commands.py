"""Command lines of the packages, run in this process: `python tests/goldens/commands.py FILE` runs a JSON list of them.

The first that fails ends it; `commands.py FILE RESULTS` goes on, and writes there what each returned and said.

Goldens know the packages by their command lines alone, so that they outlive every move of a module. Starting Python
takes most of the time of a small command, hence many share one process, or the ranks of one `mpiexec`.
"""

import contextlib
import hashlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent
SHOWN = 5  # texts under the names of what differs
MPIEXEC = Path(sys.executable).parent / "mpiexec"


def recording() -> bool:
    """Are the goldens to be written anew?"""
    return os.environ.get("GOLDEN_RECORD") == "1"


def run(package: str, *words: object) -> int:
    """`python -m PACKAGE WORDS...` in this process; its exit code."""
    kept, handler = sys.argv, signal.getsignal(signal.SIGINT)
    sys.argv = [package, *map(str, words)]
    try:
        runpy.run_module(package, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = kept
        sys.unraisablehook = sys.__unraisablehook__
        signal.signal(signal.SIGINT, handler)
    return 0


def said(package: str, *words: object) -> tuple[int, str, str]:
    """The exit code of `python -m PACKAGE WORDS...`, its standard output and its standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(package, *words)
    return code, out.getvalue(), err.getvalue()


def flat(tree: object, name: str = "") -> dict[str, str]:
    """The leaves of nested dicts by their path."""
    if not isinstance(tree, dict):
        return {name: str(tree)}
    return {k: v for key, value in tree.items() for k, v in flat(value, f"{name}: {key}" if name else key).items()}


def differences(old: dict, new: dict, texts: dict[str, str] | None = None) -> str:
    """One line per leaf that differs; under the first few, the first lines of the new text if there is one."""
    was, now = flat(old), flat(new)
    wrong = [name for name in sorted(was.keys() | now.keys()) if was.get(name) != now.get(name)]
    lines = [f"{len(wrong)} of {len(was.keys() | now.keys())} values differ"] if wrong else []
    for number, name in enumerate(wrong):
        lines.append(f"{name}: {was.get(name, '(none)')} -> {now.get(name, '(none)')}")
        if number < SHOWN:
            lines += (f"    {line}" for line in (texts or {}).get(name, "").splitlines()[:12])
    return "\n".join(lines)


def changed(golden: Path, found: dict, texts: dict[str, str] | None = None) -> str:
    """How `found` differs from the golden; empty if it does not. While recording, `found` becomes the golden."""
    if recording():
        golden.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    return differences(json.loads(golden.read_text()), found, texts)


def digest(data: str | bytes) -> str:
    """The first half of a SHA-256."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:32]


def without_paths(text: str, **folders: Path) -> str:
    """The text with absolute paths replaced by words, the repository's by ROOT."""
    for name, folder in {**folders, "ROOT": ROOT}.items():
        text = text.replace(str(folder), name)
    return text


def keep_texts(name: str, texts: dict[str, str]) -> None:
    """While recording: write the texts into the folder $GOLDEN_TEXTS/NAME, for people who want to see a difference."""
    if recording() and (root := os.environ.get("GOLDEN_TEXTS")):
        for key, text in texts.items():
            path = Path(root) / name / key.replace(": ", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def _process(commands: list[list[str]], folder: Path, start: list[str], more: list[str], env: dict[str, str]) -> None:
    path = folder / "commands.json"
    path.write_text(json.dumps(commands))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PMI_", "OMPI_", "SLURM_", "MPI"))}
    done = subprocess.run(
        [*start, sys.executable, __file__, str(path), *more], cwd=ROOT, capture_output=True, text=True,
        env={**kept, "OMP_NUM_THREADS": "1", **env}, timeout=580, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def in_processes(commands: list[list[str]], folder: Path, ranks: int = 1) -> None:
    """All commands, one after the other, in one process of their own, or on the ranks of one `mpiexec`."""
    start = [str(MPIEXEC) if MPIEXEC.exists() else "mpiexec", "-n", str(ranks)] if ranks > 1 else []
    _process(commands, folder, start, [], {})


def said_in_process(commands: list[list[str]], folder: Path, **env: str) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of every command; all run in one process of their own, with more variables."""
    results = folder / "results.json"
    _process(commands, folder, [], [str(results)], env)
    return json.loads(results.read_text())


def main(commands: list[list[str]], results: Path | None) -> str | None:
    """Run them; returns what went wrong."""
    sys.path.insert(0, str(ROOT))
    if results is not None:
        results.write_text(json.dumps([said(*command) for command in commands]))
        return None
    return next((f"{' '.join(command)}: exit code {code}" for command in commands if (code := run(*command))), None)


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]) if sys.argv[2:] else None))
