"""How a job ended, as its record tells it; and the command that makes an experiment's token files."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.config.config import ConfigError
from launch.experiments.load import load
from launch.jobs.body_steps import prep_arguments, record_end
from launch.records.record import new_record, read_record, write_record


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    made = tmp_path / "paip_64k" / "mine"
    made.mkdir(parents=True)
    return made


@pytest.mark.parametrize(
    ("state", "status", "words"),
    [
        ("CANCELLED", "preempted", "job 7 was cancelled (scancel)"),
        ("TIMEOUT", "timeout", "job 7 reached its time limit"),
        ("NODE_FAIL", "failed", "job 7 lost a node"),
        ("RUNNING", "failed", "job 7 ended with exit code 139 and no record; see its log"),
    ],
)
def test_ranks_that_left_no_record(run_dir: Path, state: str, status: str, words: str):
    (run_dir / "config.yaml").write_text(load("paip_64k", ["train.seed=5"]).to_yaml())
    record_end(run_dir, "7", state, 139)
    record = read_record(run_dir)
    assert record is not None and (record["status"], record["reason"]) == (status, words)
    known = [record[key] for key in ("run_id", "experiment", "seed", "resolution")]
    assert known == ["mine", "paip_64k", 5, 65536]


def test_bad_settings_and_a_bad_node_are_told_in_their_own_words(run_dir: Path, tmp_path: Path):
    log = tmp_path / "7.out"
    log.write_text("error: of an earlier life\nerror: x.tokens.h5: was built with patching apf\nsrun: error: node1\n")
    record = record_end(run_dir, "7", "RUNNING", 64, log)
    assert record is not None
    assert record["reason"] == "job 7 refused its settings: x.tokens.h5: was built with patching apf"
    (run_dir / "record.json").unlink()
    record = record_end(run_dir, "7", "RUNNING", 139, log)
    assert record is not None and record["reason"].endswith(f"exit code 139 and no record; see {log}")
    (run_dir / "record.json").unlink()
    record = record_end(run_dir, "7", "RUNNING", 64, Path("pipe:[1]"))
    assert record is not None and "exit code 64" in record["reason"]
    (run_dir / "record.json").unlink()
    record = record_end(run_dir, "7", "RUNNING", 65, log, "preflight: bad nodes")
    assert record is not None and record["reason"] == "job 7 ended before its training: preflight: bad nodes"


def test_a_start_that_never_came_to_its_settings(run_dir: Path):
    record = record_end(run_dir, "7", "RUNNING", 137)
    assert record is not None and record["status"] == "failed" and record["seed"] is None


def test_what_the_ranks_wrote_stays(run_dir: Path):
    write_record(
        run_dir,
        new_record(run_id="r", experiment="e", status="preempted", reason="SIGTERM: checkpointed at step 3", steps=3),
    )
    assert record_end(run_dir, "7", "RUNNING", 75) is None
    record = record_end(run_dir, "7", "CANCELLED", 75)
    assert record is not None and record["steps"] == 3
    assert record["reason"] == "job 7 was cancelled (scancel); SIGTERM: checkpointed at step 3"


def test_a_preflight_that_fails_in_a_later_life_is_the_end_of_the_run(run_dir: Path):
    write_record(
        run_dir,
        new_record(run_id="r", experiment="e", status="preempted", reason="SIGUSR1: checkpointed at step 3", steps=3),
    )
    record = record_end(run_dir, "7", "RUNNING", 65, None, "preflight: bad nodes")
    assert record is not None and (record["status"], record["steps"]) == ("failed", 3)
    assert record["reason"] == (
        "job 7 ended before its training: preflight: bad nodes; SIGUSR1: checkpointed at step 3"
    )


def test_a_finished_run_and_one_that_goes_on_are_left_alone(run_dir: Path):
    assert record_end(run_dir, "7", "REQUEUED", 1) is None and read_record(run_dir) is None
    write_record(run_dir, new_record(run_id="r", experiment="e", status="ok"))
    before = (run_dir / "record.json").read_bytes()
    assert record_end(run_dir, "7", "CANCELLED", 143) is None
    assert (run_dir / "record.json").read_bytes() == before


def test_prep_has_the_experiments_numbers():
    words = prep_arguments("paip_16k", "slides", "masks", ["data.length=64", "--mask-kind", "viable"])
    line = " ".join(words)
    assert line.startswith("build slides --out data/paip/apf_16k_p2 --resolution 16384 --patch 2 --patching apf")
    assert "--length 64 --masks masks --mask-kind viable" in line and "data.length" not in line
    assert "--length" not in prep_arguments("paip_16k_uniform", "slides", None, [])
    with pytest.raises(ConfigError, match="rivit reads pictures"):
        prep_arguments("rivit", "slides", None, [])
