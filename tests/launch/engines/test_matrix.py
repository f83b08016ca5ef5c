"""DDP, FSDP, HSDP, ZeRO 0 to 3 and shared sequences on 1, 2 and 4 ranks: the losses of one process, to 1e-5."""

import json
import shutil
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.config.config import ConfigError
from launch.engines.sequence_parallel import spread_sequences
from launch.experiments.load import load
from launch.plan.world import pretend
from launch.records.record import read_record
from launch.train.trainer import build_model
from tests.helpers.many_ranks import leave_as_if_killed
from tests.helpers.small_runs import Group, free_port, launch_rank, losses, overrides

pytestmark = pytest.mark.gloo

STEPS = 4
BASE = {"train__max_steps": STEPS, "train__clip": 0.3, "checkpoint__every_seconds": "null", "eval__pictures_px": 0}
FSDP, HSDP = {"engine__name": "fsdp"}, {"engine__name": "fsdp", "engine__shard": 2}
ZERO = {f"zero{stage}": {"engine__name": "deepspeed", "engine__zero": stage} for stage in range(4)}
BF16, PARTS, SHARED = {"train__precision": "bf16"}, {"train__accumulate": 2}, {"engine__sequence": 2}
DENSE = {"model__decoder": "raster", "model__position": "slot", "model__feature_size": 4}
PACKED = {"model__attention": "packed"}
LEAF = {"model__decoder": "leaf_unet", "model__position": "geom", "model__leaf_base": 4}
# name: settings beyond BASE; all but those of `dense` and `leaf` belong to the same reference run.
CASES: dict[int, dict[str, dict[str, object]]] = {
    2: {
        **ZERO,
        "zero2_parts": {**ZERO["zero2"], **PARTS},
        "zero2_bf16": {**ZERO["zero2"], **BF16},
        "zero3_bf16": {**ZERO["zero3"], **BF16},
        "meta": {**FSDP, "engine__meta_init": True},
        "sp2_ddp": SHARED,
        "sp2_fsdp": {**FSDP, **SHARED},
        "dense_sp2": {**DENSE, **FSDP, **SHARED},
        "leaf_zero3": {**LEAF, **ZERO["zero3"]},
        "leaf_fsdp": {**LEAF, **FSDP},
        "packed": PACKED,
    },
    1: {
        "ddp": {},
        "dense": DENSE,
        "leaf": LEAF,
        "window": {"model__attention": "window", "model__window": 4},
        "packed": PACKED,
        "zero3": ZERO["zero3"],
    },
    4: {"ddp": {}, "fsdp": FSDP, "hsdp": HSDP, "zero3": ZERO["zero3"], "sp2_hsdp": {**HSDP, **SHARED}},
}
# Everything of {ddp, fsdp, hsdp, ZeRO 0 to 3} x {fp32, bf16} x {1, 2, 4 ranks}, and more on four ranks.
WHOLE = {
    world: {
        f"{name}{word}": {**engine, **more}
        for name, engine in {"ddp": {}, "fsdp": FSDP, **({"hsdp": HSDP} if world == 4 else {}), **ZERO}.items()
        for word, more in (("", {}), ("_bf16", BF16))
    }
    for world in (1, 2, 4)
}
MORE4 = {
    "heads4_sp4": {"engine__sequence": 4, "model__heads": 4},
    "heads4_sp4_fsdp": {**FSDP, "engine__sequence": 4, "model__heads": 4},
    "hsdp_meta": {**HSDP, "engine__meta_init": True},
}
# What a checkpoint of two ranks is read by.
AGAIN = {"zero2": 2, "zero3": 1}


def run(root: Path, world: int, jobs: list[list[object]]) -> None:
    """Run all jobs one after the other on the same ranks."""
    path = root / f"jobs{world}.json"
    path.write_text(json.dumps(jobs))
    port, program = str(free_port()), ["-m", "tests.helpers.many_ranks", str(path)]
    group = Group([launch_rank(rank, world, port, program) for rank in range(world)])
    assert group.wait(550) == [0] * world, group.errors


def jobs_of(files: Path, root: Path, world: int, cases: dict[str, dict[str, object]]) -> list[list[object]]:
    return [overrides(files, root, run_id=f"{name}@{world}", **BASE, **more) for name, more in cases.items()]


@pytest.fixture(scope="module")
def runs(apf_files: Path, tmp_path_factory) -> Path:
    """One run directory `name@world` per case, and those of AGAIN, killed after step 2 and gone on with."""
    root = tmp_path_factory.mktemp("matrix")
    jobs = {world: jobs_of(apf_files, root, world, cases) for world, cases in CASES.items()}
    for name, world in AGAIN.items():
        saved = {**BASE, **ZERO[name], "checkpoint__every_steps": 2, "checkpoint__keep": 9}
        words = overrides(apf_files, root, run_id=f"{name}_again", **saved)
        jobs[2] += [words, ["as if killed", str(root / "smoke" / f"{name}_again"), 2]]
        jobs[world].append(words)
    for world, words in jobs.items():
        run(root, world, words)
    return root / "smoke"


def check(runs: Path, name: str, world: int, reference: str) -> None:
    got, want = losses(runs / f"{name}@{world}"), losses(runs / reference)
    assert len(got) == STEPS and got == pytest.approx(want, abs=1e-5)
    first, second = (
        [json.loads(x)["grad_norm"] for x in (runs / r / "metrics.jsonl").read_text().splitlines() if "grad_norm" in x]
        for r in (f"{name}@{world}", reference)
    )
    assert max(second) > BASE["train__clip"], "clipping was not tested"
    assert first == pytest.approx(second, rel=1e-3)
    mine, theirs = read_record(runs / f"{name}@{world}"), read_record(runs / reference)
    assert mine["status"] == "ok" and mine["gpus"] == world
    assert mine["dice_per_slide"] == pytest.approx(theirs["dice_per_slide"], abs=1e-3)
    if not name.startswith("packed") and "sp" not in name:  # no padding; work that ranks of a group repeat
        # Of more ranks somewhat less: each pads to the longest of its own sequences.
        assert 0.95 * theirs["train_tflop"] < mine["train_tflop"] <= 1.000001 * theirs["train_tflop"]


def pairs(cases: dict[int, dict[str, dict[str, object]]]) -> list[tuple[str, int]]:
    kept = ("window", "dense", "leaf")
    return [
        (n, w)
        for w, c in cases.items()
        for n, more in c.items()
        if more.get("train__precision") != "bf16" and n not in kept and (n, w) != ("ddp", 1)
    ]


@pytest.mark.parametrize(("name", "world"), pairs(CASES))
def test_losses_gradients_and_dice_are_those_of_one_process(runs, name, world):
    reference = next((kind for kind in ("dense", "leaf") if name.startswith(kind)), "ddp")
    check(runs, name, world, f"{reference}@1")


@pytest.mark.parametrize("name", ["zero2_bf16", "zero3_bf16"])
def test_bf16_of_deepspeed_is_close_to_fp32(runs, name):
    got, exact = losses(runs / f"{name}@2"), losses(runs / "ddp@1")
    assert got != pytest.approx(exact, abs=1e-6), "bf16 was not used"
    assert got == pytest.approx(exact, abs=0.03)


def test_windows_are_another_model(runs):
    assert losses(runs / "window@1") != pytest.approx(losses(runs / "ddp@1"), abs=1e-5)


@pytest.mark.parametrize(("name", "ranks"), AGAIN.items())
def test_zero_goes_on_from_its_checkpoints(runs, name, ranks):
    """On another number of ranks through DeepSpeed's universal format."""
    run_dir = runs / f"{name}_again"
    assert "resumed at step 2" in (run_dir / "logs" / "local-2" / "rank-0.log").read_text()
    assert losses(run_dir) == pytest.approx(losses(runs / f"{name}@2"), abs=0 if ranks == 2 else 1e-5)
    assert read_record(run_dir)["gpus"] == ranks


@pytest.mark.slow
@pytest.mark.parametrize("world", WHOLE)
def test_the_whole_matrix(apf_files, tmp_path, world):
    run(tmp_path, 1, jobs_of(apf_files, tmp_path, 1, {"ddp": {}, "heads4": {"model__heads": 4}}))
    cases = WHOLE[world] | (MORE4 if world == 4 else {})
    cases = {name: more for name, more in cases.items() if (name, world) != ("ddp", 1)}
    run(tmp_path, world, jobs_of(apf_files, tmp_path, world, cases))
    for name in cases:
        if not name.endswith("_bf16"):
            check(tmp_path / "smoke", name, world, "heads4@1" if name.startswith("heads4") else "ddp@1")
            continue
        got, exact = losses(tmp_path / "smoke" / f"{name}@{world}"), losses(tmp_path / "smoke" / "ddp@1")
        assert got != pytest.approx(exact, abs=1e-6), f"{name}: bf16 was not used"
        assert got == pytest.approx(exact, abs=0.03), name


def start(files: Path, root: Path, world: int, **more: object) -> tuple[list[int], list[str]]:
    port = str(free_port())
    words = ["-m", "launch", "train", "smoke", *overrides(files, root, run_id="run", **more)]
    group = Group([launch_rank(rank, world, port, words) for rank in range(world)])
    return group.wait(200), group.errors


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "again"), [(1, 2), (2, 2), (3, 2), (0, 1), (1, 1), (2, 1), (3, 1)])
def test_zero_resumes_to_the_losses_of_an_undisturbed_run(apf_files, tmp_path, stage, again):
    """From step 2 to 4; on another number of ranks through DeepSpeed's universal format."""
    more = {**BASE, **ZERO[f"zero{stage}"], "checkpoint__every_steps": 2, "checkpoint__keep": 9}
    codes, errors = start(apf_files, tmp_path, 2, **more)
    assert codes == [0, 0], errors
    run_dir = tmp_path / "smoke" / "run"
    undisturbed, weights = losses(run_dir), sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    assert weights == ["step-2", "step-4"]
    leave_as_if_killed(run_dir, 2)
    codes, errors = start(apf_files, tmp_path, again, **more)
    assert codes == [0] * again, errors
    assert "resumed at step 2" in errors[0]
    assert losses(run_dir) == pytest.approx(undisturbed, abs=0 if again == 2 else 1e-5)


def test_what_deepspeed_cannot_do_is_one_line(runs, apf_files, tmp_path, capsys):
    run_dir = tmp_path / "smoke" / "run"
    shutil.copytree(runs / "zero3@1", run_dir)
    (run_dir / "record.json").unlink()
    text = (run_dir / "config.yaml").read_text()
    for changed, more, code, reason in (
        (
            text.replace("zero: 3", "zero: 2"),
            ZERO["zero2"],
            1,
            "checkpoint of engine.zero=3 cannot be loaded with engine.zero=2",
        ),
        (
            text.replace("name: deepspeed", "name: fsdp"),
            {**FSDP, "engine__zero": 3},
            64,
            "checkpoint of engine.name=deepspeed cannot be loaded with engine.name=fsdp",
        ),
    ):
        (run_dir / "config.yaml").write_text(changed)
        codes, errors = start(apf_files, tmp_path, 1, **BASE, **more)
        assert codes == [code] and reason in errors[0]
    for wrong, reason in (
        ({"engine__name": "deepspeed", "train__ema_decay": 0.9}, "neither train.ema_decay"),
        ({"engine__name": "deepspeed", "engine__sequence": 2}, "not with deepspeed"),
        ({"engine__sequence": 2}, "engine.sequence=2 does not divide the 1 ranks"),
        ({"engine__meta_init": True}, "meta_init is for fsdp"),
    ):
        assert main(["train", "smoke", *overrides(apf_files, tmp_path / "other", **BASE, **wrong)]) == 64
        told = capsys.readouterr().err
        assert reason in told and told.count("\n") == 1


def test_a_sequence_is_shared_only_where_it_can_be(apf_files, tmp_path):
    codes, errors = start(apf_files, tmp_path, 2, **BASE, engine__sequence=2, model__attention="packed")
    assert codes == [64, 64] and "needs model.attention=full" in "".join(errors)
    tiles = ["data.kind=tiles", "data.patching=uniform", "data.crop_px=32", "model.name=unet_tiled"]
    with pretend(2):
        for more, reason in ((["model.heads=1"], "does not divide the 1 attention heads"), (tiles, "no transformer")):
            model = build_model(load("smoke", [*overrides(apf_files, tmp_path)[:5], *more]))
            with pytest.raises(ConfigError, match=reason):
                spread_sequences(model, 2)


def test_the_best_weights_are_kept_and_scored(apf_files, tmp_path):
    """With a learning rate that ruins the model later on, the best score on val is an early one."""
    more = {
        **BASE,
        "train__max_steps": 6,
        "train__lr": 0.3,
        "train__clip": 0,
        "eval__every_steps": 1,
        "checkpoint__every_steps": 2,
        "checkpoint__keep": 1,
        "eval__select": "best",
    }
    codes, errors = start(apf_files, tmp_path, 1, **more)
    assert codes == [0], errors
    run_dir = tmp_path / "smoke" / "run"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["val_dice"] for line in lines if "val_dice" in line}
    best = min(step for step, score in scores.items() if score == max(scores.values()))
    kept = {p.name for p in (run_dir / "checkpoints").iterdir()}
    assert f"step-{best}" in kept and "step-6" in kept and len(kept) <= 2
    if best != 6:
        assert f"scoring the test slides with the weights of step {best}" in errors[0]
