"""Sweeps: which members there are, duplicates, preparation first, a failing member, once more; on the real SLURM."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest

from launch.config.config import ConfigError
from launch.jobs.slurm import script_environment
from launch.jobs.sweep import Axes, members, uniform_of
from tests.helpers.cluster import wait_for
from tests.helpers.command_line import error, launch
from tests.helpers.jobs import Jobs
from tests.helpers.repository import GLOMERULI
from tests.helpers.small_runs import overrides, write_folder

# -- members, without any scheduler ---------------------------------------------------------------------------------


def test_a_sweep_is_every_combination():
    axes = Axes(gpus=(128, 256), patching=("apf", "uniform"), repeat=3, vary=(("train.lr", ("1e-3", "1e-4")),))
    found = members(["paip_16k"], axes)
    assert len(found) == 2 * 2 * 3 * 2 == len({member.run_dir for member in found})
    assert {member.experiment for member in found} == {"paip_16k", "paip_16k_uniform"}
    assert {member.config.train.seed for member in found} == {0, 1, 2}
    assert {member.config.train.lr for member in found} == {1e-3, 1e-4}
    labels = {1e-3: "_lr-1e-3", 1e-4: "_lr-1e-4"}
    assert all(member.run_dir.name.endswith(labels[member.config.train.lr]) for member in found)


def test_zip_walks_together_and_exclude_leaves_out():
    vary = (("train.lr", ("1e-3", "1e-4")), ("train.weight_decay", ("0.1", "0.2")))
    found = members(["paip_1k"], Axes(gpus=(8,), vary=vary, zipped=True))
    assert [(m.config.train.lr, m.config.train.weight_decay) for m in found] == [(1e-3, 0.1), (1e-4, 0.2)]
    rule = (("gpus", "4"), ("train.lr", "1e-3"))
    left = members(["paip_1k"], Axes(gpus=(4, 8), vary=vary[:1], exclude=(rule,)))
    assert [(m.gpus, m.config.train.lr) for m in left] == [(4, 1e-4), (8, 1e-3), (8, 1e-4)]
    with pytest.raises(ConfigError, match=r"train\.lr has 2, train\.weight_decay has 1"):
        members(["paip_1k"], Axes(vary=(vary[0], ("train.weight_decay", ("0.1",))), zipped=True))
    for wrong in ((("lr", "1e-3"),), (("train.lr", "0.001"),), (("gpus", "16"),)):
        with pytest.raises(ConfigError, match=f"--exclude {wrong[0][0]}=.* leaves nothing out"):
            members(["paip_1k"], Axes(gpus=(8,), vary=vary, exclude=(wrong,)))
    with pytest.raises(ConfigError, match="no members"):
        members(["paip_1k"], Axes(gpus=(4,), exclude=((("gpus", "4"),),)))


def test_two_members_never_share_a_folder():
    with pytest.raises(ConfigError, match="two members of the sweep would share runs/paip_1k/mine"):
        members(["paip_1k"], Axes(repeat=2), ["run_id=mine"])


def test_scaling_keeps_the_batch_or_the_images_per_rank():
    strong = members(["paip_1k"], Axes(gpus=(1, 2, 8), scaling="strong"))
    weak = members(["paip_1k"], Axes(gpus=(1, 2, 8), scaling="weak"))
    assert [m.config.train.batch for m in strong] == [8, 8, 8]
    assert [m.config.train.batch for m in weak] == [1, 2, 8]
    assert {str(m.run_dir.parent) for m in strong} == {"runs/scaling-strong/paip_1k"}
    with pytest.raises(ConfigError, match="3 ranks do not divide the 8"):
        members(["paip_1k"], Axes(gpus=(3, 8), scaling="strong"))


def test_every_paip_experiment_has_a_uniform_partner():
    assert uniform_of("paip_64k") == "paip_64k_uniform"
    with pytest.raises(ConfigError, match="rivit has no uniform variant"):
        uniform_of("rivit")


def test_what_cannot_be_submitted_is_one_line(tmp_path: Path):
    here = f"run_root={tmp_path}"
    for site, account in (("frontier", "PROJECT"), ("perlmutter", "PROJECT_g")):
        done = launch("submit", "paip_1k", "--site", site, "--dry-run")
        assert error(done).endswith(f"{site} needs an account: --account {account}")
    assert "no such folder" in error(launch("submit", "paip_1k", "--site", "generic-cuda", "--dry-run", here))
    assert "did you mean paip_1k" in error(launch("submit", "paip_1kk", "--dry-run"))
    assert "unknown site 'mars'" in error(launch("submit", "paip_1k", "--site", "mars", "--dry-run"))
    assert "not a state" in error(launch("submit", "--only", "borken", "--runs", tmp_path))
    assert "--mode strong|weak" in error(launch("submit", "scaling", "--gpus", "1,2"))
    assert "leave train.lr=1 out" in error(launch("submit", "--only", "failed", "train.lr=1"))
    assert "leave --gpus out" in error(launch("submit", "--only", "failed", "--gpus", "4"))
    assert "--slides /nowhere: no such folder" in error(launch("submit", "paip_1k", "--slides", "/nowhere", here))
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_built_is_refused_before_it_waits(files: Path, tmp_path: Path):
    words = ["submit", "smoke", *overrides(files, tmp_path, data__length=24), "--dry-run"]
    words += ["--vary", "model.decoder=token,raster"]
    said = error(launch(*words))
    assert "_decoder-raster: model.name=unetr: " in said and "24" in said.partition("model.name")[2]
    with mock.patch.dict("sys.modules", {"torch": None}):  # a login node without it
        assert launch(*words).returncode == 0


def test_a_dry_run_says_what_each_job_will_be(files: Path, tmp_path: Path):
    words = [*small_here(files, tmp_path), "train.batch=2048", "--gpus", "1,2048", "--account", "PROJ", "--dry-run"]
    done = launch("submit", "paip_1k", "--site", "frontier", "--hours", "9", *words)
    assert done.returncode == 0, done.stderr
    one, many, last = done.stdout.splitlines()
    assert one.startswith("   1 gpus  1 x 1, 2 h  ") and many.startswith("2048 gpus  256 x 8, 9 h  ")
    assert last == "2 runs on frontier (sbatch --account=PROJ); a dry run, nothing was written"
    assert not (tmp_path / "runs").exists()
    words = ["submit", "scaling", "paip_1k", "--mode", "weak", "--gpus", "1,2", "--dry-run", "--site", "generic-cuda"]
    done = launch(*words, *small_here(files, tmp_path))
    assert [line.split("  ")[-2] for line in done.stdout.splitlines()[:2]] == ["1 x 1, 4 h", "1 x 2, 4 h"]


def test_slides_without_token_files_are_prepared_first(files: Path, tmp_path: Path):
    """Half a folder of token files, as a preparation leaves it that was killed, is not trained on."""
    slides = tmp_path / "slides"
    slides.mkdir()
    (slides / "a.svs").touch()
    words = ("submit", "paip_1k", "--gpus", "1", "--site", "local", "--slides", slides, *small_here(files, tmp_path))
    assert "prep" not in launch(*words, "--dry-run").stdout
    (slides / "new.svs").touch()
    assert f"prep  {files}\n" in launch(*words, "--dry-run").stdout
    failed = launch(*words, PYTHON="/bin/false")
    assert failed.returncode == 1
    prep, run = failed.stdout.splitlines()
    assert prep.split() == ["exit", "1", "prep", str(files)] and run.strip().startswith("not run")
    assert not list(tmp_path.glob("runs/paip_1k/*")), "the training that needs them was not started"


def test_one_folder_is_prepared_in_one_way(files: Path, tmp_path: Path):
    slides = tmp_path / "slides"
    slides.mkdir()
    (slides / "new.svs").touch()
    words = ("submit", "paip_1k", "--gpus", "1", "--site", "local", "--slides", slides, *small_here(files, tmp_path))
    lengths = ("--vary", "data.length=32,64", "--dry-run")
    said = error(launch(*words, *lengths))
    assert f"want different token files in the same {files}" in said and "_length-64" in said
    apart = launch(*words, "--zip", *lengths, "--vary", f"data.dir={tmp_path}/a/tokens,{tmp_path}/b/tokens")
    assert apart.returncode == 0, apart.stderr
    assert apart.stdout.count("prep  ") == 2 and apart.stdout.count(" gpus ") == 2
    assert "only with --masks" in error(launch(*words, "--mask-kind", "viable", "--dry-run"))
    done = launch(*words, "--masks", slides, "--mask-kind", "viable", PYTHON="/bin/false")
    assert done.stdout.split()[:3] == ["exit", "1", "prep"], done.stderr
    (script,) = tmp_path.glob("runs/prep/*/job.sh")
    assert f"--masks {slides} --mask-kind viable data.dir={files}" in script.read_text()
    other = launch(*words, "--masks", slides, f"data.dir={tmp_path}/other/{files.name}", PYTHON="/bin/false")
    assert other.returncode == 1 and len(list(tmp_path.glob(f"runs/prep/{files.name}_*/job.sh"))) == 2


def test_variants_must_be_there_before_slides_are_prepared(files: Path, tmp_path: Path):
    slides = tmp_path / "slides"
    slides.mkdir()
    (slides / "new.svs").touch()
    other = tmp_path / "other"
    words = (
        "submit",
        "paip_1k",
        "--gpus",
        "1",
        "--site",
        "local",
        "--slides",
        slides,
        *small_here(files, tmp_path),
        f"data.variants=[{other}]",
        "--dry-run",
    )
    assert f"data.variants: {other}: no such folder; `python -m launch prep" in error(launch(*words))
    other.mkdir()
    assert f"data.variants: {other}: no token file for any slide" in error(launch(*words))
    write_folder(tmp_path / "third")
    words = (*words[:-2], f"data.variants=[{tmp_path / 'third'}]", "--dry-run")
    assert f"prep  {files}\n" in launch(*words).stdout


def test_fields_of_view_go_to_the_preparation_that_wants_them(files: Path, tmp_path: Path):
    for name in ("slides", "fov"):
        (tmp_path / name).mkdir()
    (tmp_path / "slides" / "new.svs").touch()
    words = (
        "submit",
        "paip_1k",
        "--gpus",
        "1",
        "--site",
        "local",
        "--slides",
        tmp_path / "slides",
        *small_here(files, tmp_path),
    )
    view = ("--fov", tmp_path / "fov")
    assert "says where masks count: add --masks DIR" in error(launch(*words, *view, "data.fov=true"))
    assert f"{view[1]}: only with --slides" in error(launch("submit", "paip_1k", "--site", "local", *view))
    words = (*words, "--masks", tmp_path / "slides")
    assert "data.fov=true, without --fov: add --fov DIR" in error(launch(*words, "data.fov=true"))
    assert "none of these runs has data.fov=true" in error(launch(*words, *view))
    assert "--fov elsewhere: no such folder" in error(launch(*words, "data.fov=true", "--fov", "elsewhere"))
    assert not list(tmp_path.glob("runs/**/*.sh")), "nothing was written"
    failed = launch(*words, *view, "data.fov=true", PYTHON="/bin/false")
    assert failed.returncode == 1 and failed.stdout.split()[:3] == ["exit", "1", "prep"]
    (script,) = tmp_path.glob("runs/prep/*/*.sh")
    assert f"--fov {tmp_path / 'fov'}" in script.read_text()


def test_a_submitted_job_inherits_no_choice_and_no_job_around_it(monkeypatch: pytest.MonkeyPatch):
    for name in ("EXPERIMENT", "PATCHING", "SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_CONF", "PREFLIGHT"):
        monkeypatch.setenv(name, "1")
    kept = script_environment()
    assert {"SLURM_CONF", "PREFLIGHT", "PATH"} <= set(kept)
    assert not {"EXPERIMENT", "PATCHING", "SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT"} & set(kept)


def small_here(files: Path, tmp_path: Path) -> list[str]:
    return overrides(
        files,
        tmp_path / "runs",
        model__decoder="leaf",
        train__max_steps=4,
        train__precision="fp32",
        train__schedule="constant",
    )


@pytest.mark.slow
def test_without_a_scheduler_runs_are_done_here(files: Path, tmp_path: Path):
    words = ("submit", "paip_1k", "--gpus", "1", "--site", "local", *small_here(files, tmp_path))
    done = launch(*words, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert launch("status", tmp_path / "runs").stdout.splitlines()[-1] == "1 ok"
    assert "is finished" in error(launch(*words))


@pytest.mark.slow
def test_a_scaling_study_on_this_machine(files: Path, tmp_path: Path):
    done = launch(
        "submit",
        "scaling",
        "paip_1k",
        "--mode",
        "strong",
        "--gpus",
        "1,2",
        "--site",
        "local",
        *small_here(files, tmp_path),
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert launch("status", tmp_path / "runs").stdout.splitlines()[-1] == "2 ok"
    records = [json.loads(p.read_text()) for p in (tmp_path / "runs").glob("scaling-strong/paip_1k/*/record.json")]
    assert sorted(r["gpus"] for r in records) == [1, 2] and {r["global_batch"] for r in records} == {2}


# -- on the real SLURM ----------------------------------------------------------------------------------------------


def test_a_failing_member_is_told_and_only_it_runs_again(jobs: Jobs, tmp_path: Path):
    good, bad = (write_folder(tmp_path / name) for name in ("good", "bad"))
    damaged = bad / "a.tokens.h5"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    small = jobs.settings("x", train__max_steps=2, eval__pictures_px=0, data__split=f"{good}/split.json")
    small = [word for word in small if not word.startswith(("run_id", "data.dir"))]
    words = ["submit", "paip_1k", "--gpus", "1", "--site", "generic-cuda", "--vary", f"data.dir={good},{bad}", *small]
    env = jobs.cluster.env
    done = launch(*words, **env)
    assert done.returncode == 0, done.stderr
    numbers = [line.split()[0] for line in done.stdout.splitlines()]
    jobs.track(*numbers)
    assert "already" in error(launch(*words, **env)), "the same sweep twice is refused while it lives"
    assert [jobs.cluster.wait_job(number) for number in numbers] == ["COMPLETED", "FAILED"]
    shown = launch("status", jobs.runs, **env).stdout
    assert "1 ok, 1 failed" in shown or "1 failed, 1 ok" in shown, shown
    assert "a.tokens.h5" in next(iter((jobs.runs / "paip_1k").glob("*bad/slurm/*.out"))).read_text()
    assert "is finished" in error(launch(*words, **env))

    damaged.write_bytes(whole)
    (run,) = (jobs.runs / "paip_1k").glob("*bad")
    (run / "slurm" / "1.0.bad_nodes").write_text("node1\nnode2\n")  # as preflight leaves it
    dry = launch("submit", "--only", "failed,missing", "--runs", jobs.runs, "--dry-run", **env)
    assert [line.split() for line in dry.stdout.splitlines()] == [["without", "node1,node2"], ["failed", str(run)]]
    again = launch("submit", "--only", "failed,missing", "--runs", jobs.runs, "--hours", "2", **env)
    _, line = again.stdout.splitlines()
    assert line.endswith("_dir-bad"), again.stdout + again.stderr
    jobs.track(line.split()[0])
    assert jobs.cluster.wait_job(line.split()[0]) == "COMPLETED"
    job = jobs.cluster.job(line.split()[0])
    assert job["ExcNodeList"] == "node[1-2]" and job["TimeLimit"] == "02:00:00", job
    assert "2 ok" in launch("status", jobs.runs, **env).stdout
    nothing = launch("submit", "--only", "failed,missing", "--runs", jobs.runs, **env)
    assert nothing.stdout.startswith("nothing under"), nothing.stdout


@pytest.mark.slow
def test_a_run_that_began_anew_goes_on_when_submitted_again(jobs: Jobs):
    small = jobs.settings("anew", train__max_steps=100_000)
    words = ("submit", "paip_64k", "--gpus", "1", "--site", "generic-cuda", *small, "force=true")
    run, env = jobs.run_dir("anew"), jobs.cluster.env
    first = launch(*words, **env).stdout.split()[0]
    jobs.track(first)
    jobs.wait_steps("anew", int(first), 3)
    (run / "STOP").touch()
    assert jobs.cluster.wait_job(first) == "FAILED"
    assert "sbatch it again with force=false" in (run / "slurm" / f"{first}.out").read_text()
    (run / "STOP").unlink(missing_ok=True)
    steps = jobs.record("anew")["steps"]
    second = launch("submit", "--only", "preempted", "--runs", jobs.runs, **env).stdout.split()[0]
    jobs.track(second)
    log = run / "slurm" / f"{second}.out"
    wait_for(lambda: log.exists() and f"resumed at step {steps} " in log.read_text(), 90, "a second start that goes on")


def test_a_run_whose_preparation_was_lost_gets_it_again(jobs: Jobs):
    """The preparation fails this time too, so SLURM takes the training out of the queue."""
    prep, run = jobs.runs / "prep" / "x", jobs.runs / "paip_1k" / "waits"
    for folder, code in ((prep, 1), (run, 0)):
        (folder / "slurm").mkdir(parents=True)
        (folder / "job.sh").write_text(f"#!/bin/bash\n#SBATCH --output={folder}/slurm/%j.out\nexit {code}\n")
    about = {"job": "999999", "prep": str(prep), "gpus": 1, "sbatch": ["--dependency=afterok:999998"], "earlier": []}
    (run / "submission.json").write_text(json.dumps(about))
    done = launch("submit", "--only", "missing", "--runs", jobs.runs, **jobs.cluster.env)
    assert done.returncode == 0, done.stderr
    (first, *what), (second, place) = (line.split() for line in done.stdout.splitlines())
    jobs.track(first, second)
    assert what == ["prep", str(prep)] and place == str(run)
    assert jobs.cluster.wait_job(first) == "FAILED" and jobs.cluster.wait_job(second) == "CANCELLED"
    assert json.loads((run / "submission.json").read_text())["earlier"] == ["999999"]


@pytest.mark.slow
def test_token_files_are_made_before_the_training_that_needs_them(jobs: Jobs, tmp_path: Path):
    slides = tmp_path / "slides"
    slides.mkdir()
    for path in sorted((GLOMERULI / "images").glob("*.jpg"))[:5]:
        (slides / path.name).symlink_to(path)
    of_data = ("data.dir", "data.split", "data.resolution", "data.patch", "data.length", "train.batch")
    small = jobs.settings("made", train__max_steps=2, eval__pictures_px=0)
    small = [word for word in small if not word.startswith(of_data)]
    data = [f"data.dir={tmp_path}/tokens", "data.resolution=1024", "data.patch=16", "data.length=64", "train.batch=1"]
    done = launch(
        "submit",
        "paip_1k",
        "--gpus",
        "1",
        "--site",
        "generic-cuda",
        "--slides",
        slides,
        "--masks",
        GLOMERULI / "masks",
        "--sbatch=--cpus-per-task=1",
        *small,
        *data,
        "data.fractions=[0.4,0.2,0.4]",
        **jobs.cluster.env,
    )
    assert done.returncode == 0, done.stderr
    prep, train = (line.split()[0] for line in done.stdout.splitlines())
    jobs.track(prep, train)
    logs = lambda: [path.read_text() for path in tmp_path.rglob("slurm/*.out")]  # noqa: E731
    waits = jobs.cluster.job(train)["Dependency"].startswith(f"afterok:{prep}")
    assert waits or jobs.cluster.job(prep)["JobState"] == "COMPLETED", logs()
    assert jobs.cluster.wait_job(prep) == "COMPLETED", logs()
    assert jobs.cluster.wait_job(train) == "COMPLETED", logs()
    assert len(list((tmp_path / "tokens").glob("*.tokens.h5"))) == 5
