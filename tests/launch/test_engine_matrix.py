"""DDP, FSDP, HSDP, ZeRO 0 to 3 and shared sequences on 1, 2 and 4 ranks: the losses of one process, to 1e-5."""

import json
import shutil
from pathlib import Path

import pytest

from launch.record import read_record
from tests.launch.small import Group, free_port, launch_rank, losses, overrides

pytestmark = pytest.mark.gloo

STEPS = 4
BASE = {"train__max_steps": STEPS, "train__clip": 0.3, "checkpoint__every_seconds": "null"}
ZERO = {f"zero{stage}": {"engine__name": "deepspeed", "engine__zero": stage} for stage in range(4)}
DENSE = {"model__decoder": "raster", "model__position": "slot", "model__feature_size": 4}
# name: settings beyond BASE; all but those of `dense` belong to the same reference run.
CASES: dict[int, dict[str, dict[str, object]]] = {
    1: {
        "ddp": {},
        "dense": DENSE,
        "window": {"model__attention": "window", "model__window": 4},
        "packed": {"model__attention": "packed"},
        **ZERO,
    },
    2: {
        **ZERO,
        "zero2_parts": {**ZERO["zero2"], "train__accumulate": 2},
        "zero3_parts": {**ZERO["zero3"], "train__accumulate": 2},
        "zero2_bf16": {**ZERO["zero2"], "train__precision": "bf16"},
        "zero3_bf16": {**ZERO["zero3"], "train__precision": "bf16"},
        "meta": {"engine__name": "fsdp", "engine__meta_init": True},
        "sp2_ddp": {"engine__sequence": 2},
        "sp2_fsdp": {"engine__name": "fsdp", "engine__sequence": 2},
        "dense_sp2": {**DENSE, "engine__name": "fsdp", "engine__sequence": 2},
        "packed": {"model__attention": "packed"},
    },
    4: {
        "ddp": {},
        "fsdp": {"engine__name": "fsdp"},
        "hsdp": {"engine__name": "fsdp", "engine__shard": 2},
        "hsdp_meta": {"engine__name": "fsdp", "engine__shard": 2, "engine__meta_init": True},
        "zero1": ZERO["zero1"],
        "zero3": ZERO["zero3"],
        "sp2_hsdp": {"engine__name": "fsdp", "engine__shard": 2, "engine__sequence": 2},
    },
}
SLOW4 = {
    "zero0": ZERO["zero0"],
    "zero2": ZERO["zero2"],
    "sp4": {"engine__sequence": 4, "model__heads": 4},
    "sp4_fsdp": {"engine__name": "fsdp", "engine__sequence": 4, "model__heads": 4},
    "hsdp_bf16": {"engine__name": "fsdp", "engine__shard": 2, "train__precision": "bf16"},
    "heads4": {"model__heads": 4},
}


def run(files: Path, root: Path, world: int, cases: dict[str, dict[str, object]]) -> None:
    """Run all cases one after the other on the same ranks."""
    jobs = [overrides(files, root, run_id=f"{name}@{world}", **BASE, **more) for name, more in cases.items()]
    path = root / f"jobs{world}.json"
    path.write_text(json.dumps(jobs))
    port, program = str(free_port()), ["-m", "tests.launch.many", str(path)]
    group = Group([launch_rank(rank, world, port, program) for rank in range(world)])
    assert group.wait(500) == [0] * world, group.errors


@pytest.fixture(scope="module")
def runs(apf_files: Path, tmp_path_factory) -> Path:
    """One run directory `name@world` per case."""
    root = tmp_path_factory.mktemp("matrix")
    for world, cases in CASES.items():
        run(apf_files, root, world, cases)
    return root / "smoke"


def check(runs: Path, name: str, world: int, reference: str) -> None:
    got, want = losses(runs / f"{name}@{world}"), losses(runs / reference)
    assert len(got) == STEPS and got == pytest.approx(want, abs=1e-5)
    first, second = ([json.loads(x)["grad_norm"] for x in (runs / r / "metrics.jsonl").read_text().splitlines()
                      if "grad_norm" in x] for r in (f"{name}@{world}", reference))  # fmt: skip
    assert max(second) > BASE["train__clip"], "clipping was not tested"
    assert first == pytest.approx(second, rel=1e-3)
    mine, theirs = read_record(runs / f"{name}@{world}"), read_record(runs / reference)
    assert mine["status"] == "ok" and mine["gpus"] == world
    assert mine["dice_per_slide"] == pytest.approx(theirs["dice_per_slide"], abs=1e-3)


def pairs(cases: dict[int, dict[str, dict[str, object]]]) -> list[tuple[str, int]]:
    kept = ("window", "dense")
    return [(n, w) for w, c in cases.items() for n, more in c.items()
            if more.get("train__precision") != "bf16" and n not in kept and (n, w) != ("ddp", 1)]  # fmt: skip


@pytest.mark.parametrize(("name", "world"), pairs(CASES))
def test_losses_gradients_and_dice_are_those_of_one_process(runs, name, world):
    check(runs, name, world, "dense@1" if name.startswith("dense") else "ddp@1")


@pytest.mark.parametrize("name", ["zero2_bf16", "zero3_bf16"])
def test_bf16_of_deepspeed_is_close_to_fp32(runs, name):
    got, exact = losses(runs / f"{name}@2"), losses(runs / "ddp@1")
    assert got != pytest.approx(exact, abs=1e-6), "bf16 was not used"
    assert got == pytest.approx(exact, abs=0.03)


def test_windows_are_another_model(runs):
    assert losses(runs / "window@1") != pytest.approx(losses(runs / "ddp@1"), abs=1e-5)


@pytest.mark.slow
def test_the_rest_of_the_matrix_on_four_ranks(apf_files, tmp_path):
    run(apf_files, tmp_path, 4, SLOW4)
    run(apf_files, tmp_path, 1, {"ddp": {}, "heads4": {"model__heads": 4}})
    for name, more in SLOW4.items():
        if name not in ("hsdp_bf16", "heads4"):
            check(tmp_path / "smoke", name, 4, "heads4@1" if "model__heads" in more else "ddp@1")
    exact = losses(tmp_path / "smoke" / "ddp@1")
    assert losses(tmp_path / "smoke" / "hsdp_bf16@4") == pytest.approx(exact, abs=0.03)


def start(files: Path, root: Path, world: int, **more: object) -> tuple[list[int], list[str]]:
    port = str(free_port())
    words = ["-m", "launch", "train", "smoke", *overrides(files, root, run_id="run", **more)]
    group = Group([launch_rank(rank, world, port, words) for rank in range(world)])
    return group.wait(200), group.errors


def shorten(run_dir: Path, steps: int) -> None:
    """Leave the run directory as a run that was killed after `steps` steps would have left it."""
    (run_dir / "record.json").unlink()
    for checkpoint in (run_dir / "checkpoints").glob("step-*"):
        if int(checkpoint.name[5:]) > steps:
            shutil.rmtree(checkpoint)


@pytest.mark.parametrize(
    ("stage", "again"),
    [(2, 2), (3, 1), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((3, 2), (0, 1), (1, 1), (2, 1)))],
)
def test_zero_resumes_to_the_losses_of_an_undisturbed_run(apf_files, tmp_path, stage, again):
    """From step 2 to 4; on another number of ranks through DeepSpeed's universal format."""
    more = {**BASE, **ZERO[f"zero{stage}"], "checkpoint__every_steps": 2, "checkpoint__keep": 9}
    codes, errors = start(apf_files, tmp_path, 2, **more)
    assert codes == [0, 0], errors
    run_dir = tmp_path / "smoke" / "run"
    undisturbed, weights = losses(run_dir), sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    assert weights == ["step-2", "step-4"]
    shorten(run_dir, 2)
    codes, errors = start(apf_files, tmp_path, again, **more)
    assert codes == [0] * again, errors
    assert "resumed at step 2" in errors[0]
    assert losses(run_dir) == pytest.approx(undisturbed, abs=0 if again == 2 else 1e-5)


def test_what_deepspeed_cannot_do_is_one_line(apf_files, tmp_path):
    more = {**BASE, **ZERO["zero2"], "train__max_steps": 2, "checkpoint__every_steps": 2}
    assert start(apf_files, tmp_path, 1, **more)[0] == [0]
    run_dir = tmp_path / "smoke" / "run"
    (run_dir / "record.json").unlink()
    text = (run_dir / "config.yaml").read_text().replace("zero: 2", "zero: 3")
    (run_dir / "config.yaml").write_text(text)
    codes, errors = start(apf_files, tmp_path, 1, **{**more, **ZERO["zero3"]})
    assert codes == [1] and "checkpoint of engine.zero=2 cannot be loaded with engine.zero=3" in errors[0]
    for wrong, reason in (
        ({"engine__name": "deepspeed", "train__ema_decay": 0.9}, "neither train.ema_decay"),
        ({"engine__name": "deepspeed", "engine__sequence": 2}, "not with deepspeed"),
        ({"engine__sequence": 2}, "engine.sequence=2 does not divide the 1 ranks"),
        ({"engine__meta_init": True}, "meta_init is for fsdp"),
    ):
        codes, errors = start(apf_files, tmp_path / "other", 1, **BASE, **wrong)
        assert codes == [64] and reason in errors[0] and len(errors[0].strip().splitlines()) == 1


def test_a_sequence_is_shared_only_where_it_can_be(apf_files, tile_files, tmp_path):
    codes, errors = start(apf_files, tmp_path, 2, **BASE, engine__sequence=2, model__attention="packed")
    assert codes == [64, 64] and "needs model.attention=full" in "".join(errors)
    codes, errors = start(apf_files, tmp_path / "b", 2, **BASE, engine__sequence=2, model__heads=1)
    assert codes == [64, 64] and "does not divide the 1 attention heads" in "".join(errors)


def test_the_best_weights_are_kept_and_scored(apf_files, tmp_path):
    """With a learning rate that ruins the model later on, the best score on val is an early one."""
    more = {
        **BASE, "train__max_steps": 6, "train__lr": 0.3, "train__clip": 0, "eval__every_steps": 1,
        "checkpoint__every_steps": 2, "checkpoint__keep": 1, "eval__select": "best",
    }  # fmt: skip
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
