import json
import os
from pathlib import Path
from typing import get_args

import pytest

from analysis.runs.records import RunsError, load
from launch.records.record import RECORD_KEYS, Record
from tests.helpers.repository import ROOT
from tests.helpers.run_folders import record, runs_in, write_run

STATUSES = get_args(Record.model_fields["status"].annotation)


def kinds(runs) -> dict[str, str]:
    return {p.kind: p.reason for p in runs.problems}


def test_a_whole_record_is_read(tmp_path: Path):
    raw = record()
    folder = write_run(tmp_path, raw)
    runs = load(tmp_path)
    (run,) = runs_in(tmp_path)
    assert not runs.problems
    assert run.folder == folder
    for key in RECORD_KEYS:
        assert getattr(run, key) == raw[key], key
    kinds = {key: runs.ok[key].dtype.name for key in ("steps", "dice", "model", "dice_per_slide")}
    assert kinds == {"steps": "Int64", "dice": "float64", "model": "object", "dice_per_slide": "object"}


def test_one_run_folder_is_a_folder_of_runs(tmp_path: Path):
    assert len(load(write_run(tmp_path, record())).ok) == 1


def test_null_stays_missing(tmp_path: Path):
    write_run(tmp_path, record(dice=None, dice_per_slide=None, floors=None, mfu=None, seconds_per_image=None))
    (run,) = runs_in(tmp_path)
    assert run.dice is None
    assert run.seconds_per_image is None
    assert run.dice_per_slide is None


@pytest.mark.parametrize("status", [s for s in STATUSES if s != "ok"])
def test_a_failure_is_listed_with_its_reason(tmp_path: Path, status):
    write_run(tmp_path, record(status=status, reason="because"))
    runs = load(tmp_path)
    assert runs.ok.empty
    assert kinds(runs) == {status: "because"}


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"schema_version": 0}, "broken", "0"),
        ({"schema_version": 2}, "newer-schema", "2"),
        ({"schema_version": None}, "broken", "schema_version"),
        ({"schema_version": True}, "broken", "schema_version"),
        ({"status": "fine"}, "broken", "fine"),
        ({"run_id": None}, "broken", "run_id"),
        ({"dice": "0.5"}, "broken", "dice"),
        ({"dice": 1.5}, "broken", "dice"),
        ({"seconds_per_image": -1}, "broken", "seconds_per_image"),
        ({"steps": 1.5}, "broken", "steps"),
        ({"steps": 10**400}, "broken", "steps"),
        ({"loss_final": -(10**400)}, "broken", "loss_final"),
        ({"accuracy": 1.01}, "broken", "accuracy"),
        ({"steps": True}, "broken", "steps"),
        ({"dice_per_slide": [0.1]}, "broken", "dice_per_slide"),
        ({"dice_per_slide": {"a": "x"}}, "broken", "dice_per_slide[a]"),
        ({"optimiser": {"name": "AdamW"}}, "broken", "optimiser"),
    ],
)
def test_a_record_that_cannot_be_used_is_listed(tmp_path: Path, changes, kind, says):
    write_run(tmp_path, {**record(), **changes})
    runs = load(tmp_path)
    assert runs.ok.empty
    assert says in kinds(runs)[kind]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 1', "\x00\x01", "[" * 100_000])
def test_a_broken_file_is_listed(tmp_path: Path, text):
    write_run(tmp_path, record("demo_uniform_patch"))
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "record.json").write_text(text)
    runs = load(tmp_path)
    assert len(runs.ok) == 1
    assert [p.path for p in runs.problems] == [bad]
    assert runs.problems[0].kind == "broken"
    assert "\n" not in runs.problems[0].reason


def test_bytes_that_are_no_text_are_listed(tmp_path: Path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "record.json").write_bytes(b"\xff\xfe{}")
    assert load(tmp_path).problems[0].kind == "broken"


def test_a_record_that_is_a_folder_is_unreadable(tmp_path: Path):
    write_run(tmp_path, record())
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "record.json").symlink_to(tmp_path / "gone")
    assert [p.kind for p in load(tmp_path).problems] == ["unreadable"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read_is_listed(tmp_path: Path):
    write_run(tmp_path, record())
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    assert [(p.kind, p.path) for p in load(tmp_path).problems] == [("unreadable", closed)]


def test_not_a_number_becomes_missing_and_is_listed(tmp_path: Path):
    write_run(tmp_path, {**record(), "loss_final": float("nan"), "mfu": float("inf")})
    runs = load(tmp_path)
    assert runs_in(tmp_path)[0].loss_final is None
    assert [p.kind for p in runs.problems] == ["missing number", "missing number"]


def test_a_run_without_record_is_unfinished_and_its_inside_is_not_searched(tmp_path: Path):
    live = tmp_path / "e" / "live"
    (live / "checkpoints" / "step-3").mkdir(parents=True)
    (live / "config.yaml").write_text("a: 1")
    (live / "checkpoints" / "step-3" / "record.json").write_text(json.dumps(record()))
    runs = load(tmp_path)
    assert runs.ok.empty
    assert [(p.kind, p.path) for p in runs.problems] == [("unfinished", live)]


def test_links_are_followed_once(tmp_path: Path):
    """Runs of another file system, a link to a folder that is there as well, one upwards and one to nothing."""
    here, far = tmp_path / "runs", tmp_path / "scratch"
    write_run(far, record(run_id="far"))
    folder = write_run(here / "near", record(run_id="near"))
    (here / "a_link").symlink_to(folder.parent)
    (here / "far").symlink_to(far)
    (far / "up").symlink_to(here)
    (here / "gone").symlink_to(tmp_path / "nowhere")
    runs = load(here)
    assert {run.run_id: run.folder.relative_to(here).parts[0] for run in runs_in(here)} == {"far": "far", "near": "near"}
    assert not runs.problems
    runs = load(here / "far")
    assert set(runs.ok.run_id) == {"far", "near"} and not runs.problems


def test_of_duplicates_the_finished_and_newest_counts(tmp_path: Path):
    write_run(tmp_path, record(finished_at="2026-01-02", dice=0.2), folder="a")
    write_run(tmp_path, record(finished_at="2026-01-03", dice=0.3), folder="b")
    write_run(tmp_path, record(finished_at="2026-01-04", status="failed"), folder="c")
    runs = load(tmp_path)
    assert runs.ok.dice.tolist() == [0.3]
    assert sorted(p.path.name for p in runs.problems if p.kind == "duplicate") == ["a", "c"]


def test_nothing_is_lost(tmp_path: Path):
    for i, status in enumerate(STATUSES):
        write_run(tmp_path, record(seed=i, status=status, reason=status))
    runs = load(tmp_path)
    assert len(runs.ok) + len(runs.problems) == len(STATUSES)


def test_missing_and_empty_folders(tmp_path: Path):
    with pytest.raises(RunsError, match="no such folder") as missing:
        load(tmp_path / "gone")
    assert missing.value.exit_code == 64
    with pytest.raises(RunsError, match=r"no record\.json") as empty:
        load(tmp_path)
    assert empty.value.exit_code == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(RunsError, match="not a folder"):
        load(tmp_path / "file")


def test_an_experiment_may_have_any_name(tmp_path: Path):
    for name in ("logs", "checkpoints", "predictions"):
        write_run(tmp_path, record(experiment=name))
    assert load(tmp_path).ok.experiment.tolist() == ["checkpoints", "logs", "predictions"]


def test_the_same_run_on_another_machine_is_no_duplicate(tmp_path: Path):
    write_run(tmp_path, record(), folder="a")
    write_run(tmp_path, record(device_name="NVIDIA H200"), folder="b")
    runs = load(tmp_path)
    assert len(runs.ok) == 2
    assert not runs.problems


def test_the_measured_records_of_this_repository_are_whole():
    runs = load(ROOT / "analysis" / "measured")
    assert {"demo_apf", "demo_uniform_patch", "demo_uniform_tokens"} <= set(runs.ok.experiment)
    assert not runs.problems
