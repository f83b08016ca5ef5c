"""House rules about the repository: pins, linters, sizes, names that must not be committed."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.helpers.repository import ROOT


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).exists()]


def test_git_ignores_no_module():
    """A room may have a name that .gitignore knows, and then its new files would stay where they were made."""
    question = ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "--", "*.py"]
    folders = ("analysis/", "data_prep/", "hpc_models/", "launch/", "tests/")
    done = subprocess.run(question, cwd=ROOT, capture_output=True, text=True)
    assert [name for name in done.stdout.splitlines() if name.startswith(folders)] == []


def test_environment_yml_agrees_with_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)}
    pins -= {r for r in pins if r.startswith("mpich")}  # a conda environment on a cluster uses the site's MPI
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert set(next(d["pip"] for d in environment if isinstance(d, dict))) == pins
    assert "python=3.11" in environment
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins), "every dependency is pinned exactly"


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=["check", "format", "mypy"]
)
def test_linters_are_clean(command: list[str]):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_python_files_stay_short():
    lines = {p: len(p.read_text().splitlines()) for p in tracked() if p.suffix == ".py"}
    assert not {str(p.relative_to(ROOT)): n for p, n in lines.items() if n > 500}


def test_repository_stays_light():
    sizes = {p: p.stat().st_size for p in tracked()}
    assert sum(sizes.values()) < 40e6
    assert sum(n for p, n in sizes.items() if "sample_data" in p.parts) < 25e6


def test_nothing_names_a_machine_or_a_registry():
    # The patterns are put together here so that this file does not match itself.
    words = ["/wo" + "rk/", "/tmp/ba" + "sh_jobs", r"--(extra-)?index-" + "url", r"https?://[^ ]*/sim" + "ple"]
    bad = re.compile("|".join(words))
    text = {".py", ".md", ".sh", ".toml", ".yml", ".yaml", ".json", ".csv", ".html"}
    for path in tracked():
        if path.suffix in text or path.parent.name == ".ci":
            found = bad.search(path.read_text())
            assert not found, f"{path.relative_to(ROOT)} contains {found.group()!r}"


def test_shell_scripts_parse():
    for path in tracked():
        if path.suffix == ".sh" or path.parent.name == ".ci":
            done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


def test_the_fixed_split_is_disjoint_and_complete():
    folder = ROOT / "data_prep" / "sample_data" / "glomeruli24"
    split = json.loads((folder / "split.json").read_text())
    stems = [s for part in ("train", "val", "test") for s in split[part]]
    assert len(stems) == len(set(stems)) == 24
    for kind in ("images", "masks"):
        assert set(stems) == {p.stem for p in (folder / kind).iterdir()}
