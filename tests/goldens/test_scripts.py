"""Digests of the job scripts of every site, and of the settings of every experiment: a refactoring changes none.

`GOLDEN_RECORD=1 python -m pytest tests/goldens` writes scripts.json anew; with GOLDEN_TEXTS=FOLDER also the texts.

Scripts of experiments come from `python -m launch submit` with an `sbatch` that only says a number, and without torch,
as on a login node, so that no model is made. Site `local` has no scheduler and no scripts.
"""

import json
import os
from pathlib import Path

import pytest
import yaml

from tests.goldens.commands import FOLDER, ROOT, changed, digest, flat, keep_texts, said_in_process, without_paths

GOLDEN = FOLDER / "scripts.json"
SITES = sorted(
    path.stem for path in (ROOT / "jobs" / "sites").glob("*.yaml") if yaml.safe_load(path.read_text()).get("slurm")
)
# What every site is asked for besides one script per experiment.
SWEEPS = {
    "sweep": ["paip_1k", "--gpus", "4,8", "--patching", "apf,uniform", "--repeat", "2", "--vary", "train.lr=1e-3,1e-4"],
    "scaling": ["scaling", "--mode", "strong", "--gpus", "8,16,32"],
    "weak": ["scaling", "--mode", "weak", "--gpus", "8,16,32", "--hours", "1.5"],
}


def make_inputs(folder: Path) -> None:
    """An sbatch that takes everything, a torch that cannot be imported, a slide without token file, some pictures."""
    for name in ("bin", "slides", "masks", "fov", "pictures"):
        (folder / name).mkdir()
    (folder / "bin" / "sbatch").write_text("#!/bin/sh\necho 1\n")
    (folder / "bin" / "sbatch").chmod(0o755)
    (folder / "torch.py").write_text("raise ImportError('a login node has no torch')\n")
    (folder / "slides" / "slide.svs").touch()
    names = [f"picture{i}" for i in range(12)]
    for name in names:
        (folder / "pictures" / f"{name}.png").touch()
    (folder / "labels.csv").write_text("name,label\n" + "".join(f"{name},{i % 2}\n" for i, name in enumerate(names)))


def submission(folder: Path, site: str, settings: dict) -> list[str]:
    """The command that makes the scripts of one experiment for one site."""
    words = ["launch", "submit", settings["experiment"], "--site", site, "--account", "PROJECT"]
    words += ["--slides", f"{folder}/slides", f"run_root={folder}/{site}"]
    if settings["data"]["kind"] == "images":
        words += [f"data.dir={folder}/pictures", f"data.labels={folder}/labels.csv", "data.split=null"]
    if settings["data"].get("fov"):
        words += ["--masks", f"{folder}/masks", "--fov", f"{folder}/fov"]
    if settings["data"].get("variants"):  # they would have to be there
        words += ["data.variants=[]"]
    return words


def scripts_below(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*.sh"))}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Settings of all experiments, scripts of all jobs and experiments for every site, and what sites refuse."""
    folder = tmp_path_factory.mktemp("scripts")
    make_inputs(folder)
    env = {"PYTHONPATH": str(folder), "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    ((_, groups, _),) = said_in_process([["launch", "experiments"]], folder, **env)
    words = [line[:15].split() for line in groups.splitlines()[:-1]]
    listed = said_in_process([["launch", "experiments", *group] for group in words], folder, **env)
    names = [line.split()[0] for _, out, _ in listed for line in out.splitlines()]
    shown = said_in_process([["launch", "show", name] for name in names], folder, **env)
    settings = {name: yaml.safe_load(out) for name, (_, out, _) in zip(names, shown, strict=True)}
    found = {"settings": {name: json.dumps(tree, indent=1, sort_keys=True) for name, tree in settings.items()}}
    commands = {}
    for site in SITES:
        commands[site, "render"] = ["launch", "render", "--site", site, "--out", f"{folder}/jobs/{site}"]
        commands |= {(site, name): submission(folder, site, tree) for name, tree in settings.items()}
        for name, words in SWEEPS.items():
            for suffix, more in (("", []), ("_dry", ["--dry-run"])):
                at = ["--site", site, "--account", "PROJECT", "--slides", f"{folder}/slides"]
                root = f"run_root={folder}/{site}/{name}{suffix}"
                commands[site, f"{name}{suffix}"] = ["launch", "submit", *words, *at, root, *more]
    done = dict(zip(commands, said_in_process(list(commands.values()), folder, **env), strict=True))
    for site in SITES:
        found[f"jobs of {site}"] = scripts_below(folder / "jobs" / site)
        found[f"experiments on {site}"] = scripts_below(folder / site)
        found[f"answers on {site}"] = {
            name: f"{code}\n{out}{err}" for (where, name), (code, out, err) in done.items() if where == site
        }
    return {
        group: {name: without_paths(text, TMP=folder) for name, text in named.items()} for group, named in found.items()
    }


def test_scripts_and_settings_are_the_recorded_ones(texts: dict[str, dict[str, str]]):
    by_name = flat(texts)
    keep_texts("scripts", by_name)
    digests = {group: {name: digest(text) for name, text in named.items()} for group, named in texts.items()}
    wrong = changed(GOLDEN, digests, by_name)
    if wrong:
        pytest.fail(wrong, pytrace=False)


def test_committed_scripts_are_the_recorded_ones(texts: dict[str, dict[str, str]]):
    rendered = texts["jobs of generic-cuda"]
    assert len(rendered) > 10
    for name, text in rendered.items():
        assert (ROOT / "jobs" / name).read_text() == text, name
