"""The comparison on open data: every row of a set gets the same images and time; the command that runs it."""

import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import yaml

from data_prep.token_files.token_file import read_meta
from launch.config.config import ConfigError
from launch.experiments.load import all_experiments, load
from launch.experiments.open_data import ROWS, SETS, rows_of
from launch.jobs.body_steps import prep_arguments
from launch.jobs.study import Study
from tests.helpers.repository import ROOT

SPLITS = {
    "apf_variance": {"split_on": "variance"},
    "apf_entropy": {"split_on": "entropy"},
    "apf_fixed": {"thresholds": (100, 200)},
    "apf_cubic": {"resample": "cubic"},
}


STUDY = [sys.executable, "-m", "launch", "study"]


def script(**env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        STUDY,
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=500,
    )


IN_SEQUENCE = {"apf_token_still", "apf_token_strip", "apf_raster", "apf_still", "apf_strip"}
PLACED = {"apf_token_placed": "geom", "apf_token_blind": "none"}  # position codes beside apf_token_still's
WHOLE_FRAMES = {"apf_whole", "unetr", "apf_geometric", *IN_SEQUENCE, *PLACED}
LEAVES = {
    "apf",
    "apf_std",
    "apf_alone",
    "apf_blind",
    "apf_jittered",
    "apf_half",
    "apf_deep",
    "apf_unturned",
    "apf_drop",
    "apf_leaf",
    "apf_token",
    "uniform_leaf_unet",
    "uniform_leaf_unet_std",
    *SPLITS,
}
ALL_LEAVES = {"glomeruli": 1024, "nuclei": 1024, "vessels": 1024, "vessels_2k": 4096, "vessels_4k": 16384}


@functools.cache
def configs_of(name):
    """Row -> configuration of a set."""
    return {row: load(f"open_{name}_{row}") for row in rows_of(name)}


@pytest.mark.parametrize("name", SETS)
def test_rows_of_a_set_have_the_same_images_and_time_and_differ(name):
    configs = configs_of(name)
    whole = [config.model_copy(update={"experiment": ""}).sha256() for config in configs.values()]
    left_out = WHOLE_FRAMES if name == "vessels_4k" else set()
    assert left_out == WHOLE_FRAMES - set(configs)
    assert len(set(whole)) == len(configs) >= len(ROWS) - 2 - len(left_out)
    split = json.loads((ROOT / configs["apf"].data.split).read_text())
    parts = [set(split[part]) for part in ("train", "val", "test")]
    assert all(parts) and len(set.union(*parts)) == sum(map(len, parts))
    for config in configs.values():
        one, other = config.train, configs["apf"].train
        assert one.model_copy(update={"batch": other.batch, "lr": other.lr}) == other
        assert (config.data.split, config.data.resolution) == (configs["apf"].data.split, SETS[name].px)


@pytest.mark.parametrize("name", SETS)
def test_lengths_are_halved_and_doubled_where_a_frame_has_as_many_leaves(name):
    configs, all_there_are = configs_of(name), ALL_LEAVES[name]
    assert configs["apf"].data.length < all_there_are
    assert ("apf_double" in configs) == (2 * configs["apf"].data.length < all_there_are)
    assert ("apf_double" in configs) == (name in ("glomeruli", "vessels_4k"))
    if "apf_double" in configs:
        assert configs["apf_double"].data.length == 2 * configs["apf"].data.length
    assert configs["apf_half"].data.length == configs["apf"].data.length // 2


@pytest.mark.parametrize("name", SETS)
def test_rows_of_other_networks_change_one_setting_of_the_network(name):
    configs = configs_of(name)
    for plain in ("apf", "unet", "uniform_leaf_unet"):
        one, other = configs[f"{plain}_std"], configs[plain]
        assert one.data == other.data and (one.train.lr, other.train.lr) == (2e-3, 5e-3)
        assert one.model == replace(other.model, standardise=True) != other.model
    changes = {"apf_deep": {"depth": 4}, "apf_alone": {"seams": False}, "apf_blind": {"position": "none"}}
    for row, other in changes.items():
        assert configs[row].model == replace(configs["apf"].model, **other) != configs["apf"].model


@pytest.mark.parametrize("name", SETS)
def test_rows_on_leaves_alone_are_scored_on_what_they_have_seen(name):
    configs = configs_of(name)
    leaves = LEAVES | ({"apf_double"} & configs.keys())
    seen = {row: config.eval.part for row, config in configs.items() if config.data.part == SETS[name].part}
    assert dict.fromkeys(leaves, SETS[name].seen) == {row: seen[row] for row in leaves}
    assert all(config.eval.part is None for row, config in configs.items() if row not in leaves)


@pytest.mark.parametrize("name", SETS)
def test_uniform_rows_have_as_many_tokens_or_as_small_patches(name):
    configs = configs_of(name)
    length = configs["apf"].data.length
    assert length <= configs["uniform_tokens"].data.length < 4 * length
    rows = "uniform_patch" if "uniform_patch" in configs else "uniform_tokens"
    assert configs[rows].data.patch == configs["apf"].data.patch


@pytest.mark.parametrize("name", SETS)
def test_rows_of_other_trees_change_one_setting_of_the_tree_and_have_their_own_files(name):
    configs = configs_of(name)
    for row, split in SPLITS.items():
        alike = {"experiment": configs["apf"].experiment, "data": configs["apf"].data}
        assert configs[row].model_copy(update=alike) == configs["apf"]
        own = {"dir": configs[row].data.dir, **split}
        assert configs["apf"].data.model_copy(update=own) == configs[row].data
    trees = ("apf", "apf_half", *(["apf_double"] if "apf_double" in configs else []), *SPLITS)
    assert len({configs[row].data.dir for row in trees}) == len(trees)


@pytest.mark.parametrize("name", SETS)
def test_rows_in_sequence_differ_in_packing_or_position_alone(name):
    configs, all_there_are = configs_of(name), ALL_LEAVES[name]
    if WHOLE_FRAMES <= configs.keys():
        for strip, still in (("apf_strip", "apf_still"), ("apf_token_strip", "apf_token_still")):
            one, other = configs[strip], configs[still]
            assert one.model == replace(other.model, packing="strip") != other.model
            assert (one.data, one.train) == (other.data, other.train) and not other.data.flips
            assert other.data.dir == configs["apf_raster"].data.dir
        for row, position in PLACED.items():
            one, other = configs[row], configs["apf_token_still"]
            assert one.model == replace(other.model, position=position) != other.model
            assert (one.data, one.train) == (other.data, other.train)
    # Of three of them the sequence is a picture; with as many leaves as the grid has it would be read as the grid.
    for row in {"apf_geometric", *IN_SEQUENCE} & configs.keys():
        assert configs[row].data.length == SETS[name].square < all_there_are
        assert math.isqrt(SETS[name].square) ** 2 == SETS[name].square


@pytest.mark.parametrize("name", SETS)
def test_rows_of_other_draws_change_one_setting_of_the_data(name):
    configs = configs_of(name)
    jittered, apf = configs["apf_jittered"], configs["apf"]
    dirs = [f"{apf.data.dir}_q80", f"{apf.data.dir}_q95"]
    assert [*jittered.data.variants] == dirs and not apf.data.variants
    assert jittered.data.model_copy(update={"variants": ()}) == apf.data and jittered.model == apf.model
    unturned = configs["apf_unturned"]
    assert unturned.data == apf.data.model_copy(update={"flips": False}) and unturned.model == apf.model
    dropped = configs["apf_drop"].data.model_copy(update={"dir": unturned.data.dir})
    assert dropped == unturned.data and configs["apf_drop"].data.dir != unturned.data.dir


def test_token_files_of_one_folder_are_made_alike():
    made: dict[str, list[str]] = {}
    for name in SETS:
        for row in rows_of(name):
            view = ["--fov", "views"] if SETS[name].fov else []
            words = prep_arguments(f"open_{name}_{row}", "slides", "masks", view)
            folder = words[words.index("--out") + 1]
            assert made.setdefault(folder, words) == words


def test_token_files_are_split_as_the_row_says():
    def words(row: str, *more: str) -> list[str]:
        return prep_arguments(f"open_nuclei_{row}", "slides", None, list(more))[4:]

    length = words("apf")[-1]
    assert words("apf")[-2:] == ["--length", length]
    assert words("apf_variance")[-3:] == [length, "--split-on", "variance"]
    assert words("apf_entropy")[-3:] == [length, "--split-on", "entropy"]
    assert words("apf_fixed")[-3:] == [length, "--thresholds", "100,200"]
    assert words("apf_cubic")[-3:] == [length, "--resample", "cubic"]
    assert words("apf", "data.thresholds=[90,180]", "--jobs", "2")[-4:] == ["--thresholds", "90,180", "--jobs", "2"]


def test_vessels_are_prepared_with_their_field_of_view_and_nothing_else_is():
    assert {name for name in SETS if load(f"open_{name}_unet").data.fov} == {"vessels", "vessels_2k", "vessels_4k"}
    words = prep_arguments("open_vessels_apf", "slides", "masks", ["--fov", "views"])
    assert words[-4:] == ["--masks", "masks", "--fov", "views"]
    assert prep_arguments("open_vessels_apf", "slides", "masks", ["--fov=views"])[-1] == "--fov=views"
    with pytest.raises(ConfigError, match=r"data\.fov=true, without --fov: add --fov DIR, or set data\.fov=false"):
        prep_arguments("open_vessels_apf", "slides", "masks", [])
    with pytest.raises(ConfigError, match=r"data\.fov=false, with --fov: leave it out, or set data\.fov=true"):
        prep_arguments("open_nuclei_apf", "slides", "masks", ["--fov", "views"])


def test_what_is_not_there_is_said(tmp_path):
    done = script(SETS="kidneys")
    assert done.returncode == 64 and "kidneys is none of" in done.stderr and "exit code 64" in done.stderr
    done = script(DATA=str(tmp_path))
    assert done.returncode == 64 and "none of the sets is in" in done.stderr and "set DATA" in done.stderr
    assert "Traceback" not in done.stderr
    for part in ("images", "masks"):
        (tmp_path / "hrf" / part).mkdir(parents=True)
    done = script(DATA=str(tmp_path), SETS="vessels")
    assert done.returncode == 64 and f"vessels is left out: no {tmp_path}/hrf/fov (DATA names" in done.stderr


def test_rows_that_run_by_default_are_all_there_are():
    study = Study(ROOT / "data_prep/sample_data", ("glomeruli",))
    found = study.experiments()
    assert [*found] == [name for name in all_experiments() if name.startswith("open_glomeruli_")]
    runs = study.members(found)
    assert [run.run_dir for run in runs] == [
        load(name, [f"train.seed={seed}"]).run_dir(1) for seed in (0, 1, 2) for name in found
    ]


def test_more_runs_than_cores_are_refused():
    for jobs in ("0", "x", str(10 * (os.cpu_count() or 1))):
        done = script(JOBS=jobs)
        assert done.returncode == 64 and f"JOBS: {jobs}" in done.stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_saves_the_runs_and_the_same_command_goes_on(sent, tmp_path):
    """SIGINT to the whole process group, as a terminal sends it."""
    env = {
        **os.environ,
        "SETS": "glomeruli",
        "ROWS": "apf uniform_tokens",
        "SEEDS": "0",
        "RUN_SECONDS": "300",
        "JOBS": str(min(2, len(os.sched_getaffinity(0)))),
        "OPEN_DIR": str(tmp_path),
    }
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(
            STUDY,
            cwd=ROOT,
            env=env,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        until = time.monotonic() + 200
        while time.monotonic() < until and not any(
            path.read_text().count("\n") > 1 for path in tmp_path.glob("runs/open_glomeruli_apf/*/metrics.jsonl")
        ):
            time.sleep(0.2)
        os.killpg(run.pid, sent) if sent == signal.SIGINT else run.send_signal(sent)
        assert run.wait(120) == 130, (tmp_path / "log").read_text()
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)  # nobody is left behind
    (record,) = tmp_path.glob("runs/open_glomeruli_apf/*/record.json")
    assert json.loads(record.read_text())["status"] == "preempted"
    assert list(tmp_path.glob("runs/open_glomeruli_apf/*/checkpoints/step-*/COMPLETE"))


@pytest.mark.slow
def test_the_jittered_row_has_its_folders(tmp_path):
    done = script(SETS="glomeruli", ROWS="apf apf_jittered", SEEDS="0", RUN_SECONDS="1", OPEN_DIR=str(tmp_path / "a b"))
    assert done.returncode == 0, done.stderr
    folders = {path.name: path for path in tmp_path.glob("a b/tokens/glomeruli/*")}
    assert sorted(folders) == ["apf", "apf_q80", "apf_q95"]
    params = {name: read_meta(next(path.glob("*.tokens.h5")))["params"] for name, path in folders.items()}
    found = {name: kept.get("auto_quantile") for name, kept in params.items()}
    assert found == {"apf": None, "apf_q80": 0.8, "apf_q95": 0.95}
    (path,) = tmp_path.glob("a b/runs/open_glomeruli_apf_jittered/*/config.yaml")
    data = yaml.safe_load(path.read_text())["data"]
    assert [data["dir"], *data["variants"]] == [str(folders[name]) for name in sorted(folders)]
    assert "open_*_apf over B = open_*_apf_jittered" in (tmp_path / "a b/tables/gains.md").read_text().replace("\\", "")


@pytest.mark.slow
def test_the_whole_way_and_again(tmp_path):
    more = {
        "SETS": "glomeruli nuclei",
        "ROWS": "apf uniform_tokens apf_strip",
        "SEEDS": "0 1",
        "RUN_SECONDS": "1",
        "OPEN_DIR": str(tmp_path),
    }
    done = script(**more)
    assert done.returncode == 0, done.stderr
    assert "nuclei is left out" in done.stderr
    assert len(list(tmp_path.glob("runs/*/*/record.json"))) == 6
    assert "open_*_apf over B = open_*_uniform_tokens" in (tmp_path / "tables/gains.md").read_text().replace("\\", "")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*/record.json")}
    assert script(**more).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    other = script(**more | {"RUN_SECONDS": "2"})
    assert other.returncode == 64 and "choose another OPEN_DIR" in other.stderr, "runs of two lengths are not mixed"
    assert {path: path.stat().st_mtime_ns for path in before} == before
