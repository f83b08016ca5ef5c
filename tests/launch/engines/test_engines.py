"""Every engine on every number of ranks trains the same model: same losses, same gradient norms, same Dice."""

import json
from pathlib import Path

import pytest

from launch.records.record import read_record
from tests.helpers.small_runs import Group, free_port, launch_rank, losses, overrides

pytestmark = pytest.mark.gloo

STEPS = 20
# name: (ranks, engine, accumulate, precision). The clipping is tight enough to matter in every run.
TOKEN_RUNS = {
    "ddp1": (1, "ddp", 1, "fp32"),
    "fsdp1": (1, "fsdp", 1, "fp32"),
    "ddp1x4": (1, "ddp", 4, "fp32"),
    "ddp2": (2, "ddp", 1, "fp32"),
    "fsdp2": (2, "fsdp", 1, "fp32"),
    "ddp2x2": (2, "ddp", 2, "fp32"),
    "fsdp2x2": (2, "fsdp", 2, "fp32"),
    "ddp2_bf16": (2, "ddp", 1, "bf16"),
    "fsdp2_bf16": (2, "fsdp", 1, "bf16"),
}
TILE_RUNS = {"tiles_ddp1": (1, "ddp"), "tiles_fsdp2": (2, "fsdp")}


@pytest.fixture(scope="module")
def runs(apf_files: Path, tile_files: Path, tmp_path_factory) -> Path:
    """The folder with one run directory per name; all runs of one world size share their processes."""
    root = tmp_path_factory.mktemp("runs")
    for world in (1, 2):
        jobs = [
            overrides(
                apf_files,
                root,
                run_id=name,
                train__max_steps=STEPS,
                train__clip=0.3,
                engine__name=engine,
                train__accumulate=parts,
                train__precision=precision,
            )
            for name, (ranks, engine, parts, precision) in TOKEN_RUNS.items()
            if ranks == world
        ]
        for name, (ranks, engine) in TILE_RUNS.items():
            if ranks == world:
                words = overrides(
                    tile_files,
                    root,
                    run_id=name,
                    data__kind="tiles",
                    data__patching="uniform",
                    data__patch=32,
                    data__length=4,
                    data__crop_px=32,
                    train__max_steps=4,
                    engine__name=engine,
                )
                words = [w for w in words if not w.startswith("model.")]
                jobs.append([*words, "model.name=unet_tiled", "model.widths=[4,8]"])
        (root / f"jobs{world}.json").write_text(json.dumps(jobs))
        port, program = str(free_port()), ["-m", "tests.helpers.many_ranks", str(root / f"jobs{world}.json")]
        group = Group([launch_rank(rank, world, port, program=program) for rank in range(world)])
        assert group.wait(300) == [0] * world, group.errors
    return root / "smoke"


def norms(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["grad_norm"] for line in lines if "grad_norm" in line]


@pytest.mark.parametrize("name", [n for n, run in TOKEN_RUNS.items() if run[3] == "fp32" and n != "ddp1"])
def test_same_losses_as_one_rank(name, runs):
    run_dir, reference = runs / name, runs / "ddp1"
    assert len(losses(run_dir)) == STEPS
    assert max(norms(reference)) > 0.3, "clipping was not tested"
    assert losses(run_dir) == pytest.approx(losses(reference), abs=1e-5)
    assert norms(run_dir) == pytest.approx(norms(reference), rel=1e-3)
    mine, theirs = read_record(run_dir), read_record(reference)
    assert (mine["gpus"], mine["engine"], mine["parameters"]) == (*TOKEN_RUNS[name][:2], theirs["parameters"])
    assert mine["dice_per_slide"] == pytest.approx(theirs["dice_per_slide"], abs=1e-3)
    for key in ("floors", "dice_ceiling", "tokens_per_image", "split_sha256"):
        assert mine[key] == theirs[key]


@pytest.mark.parametrize("name", ["ddp2_bf16", "fsdp2_bf16"])
def test_bf16_trains_close_to_fp32(name, runs):
    got, exact = losses(runs / name), losses(runs / "ddp1")
    assert got != exact, "bf16 was not used"
    assert got[:5] == pytest.approx(exact[:5], abs=0.01)
    assert got == pytest.approx(exact, abs=0.06)
    assert read_record(runs / name)["precision"] == "bf16"


def test_tiles_are_the_same_under_fsdp_with_uneven_test_slides(runs):
    assert losses(runs / "tiles_fsdp2") == pytest.approx(losses(runs / "tiles_ddp1"), abs=1e-5)
    record, reference = read_record(runs / "tiles_fsdp2"), read_record(runs / "tiles_ddp1")
    assert record["dice_per_slide"] == pytest.approx(reference["dice_per_slide"], abs=1e-3)
    assert set(record["dice_per_slide"]) == {"h", "i", "j"}, "three slides on two ranks"
    assert record["samples_per_image"] == 4 and record["epochs"] == pytest.approx(4 * 4 / 4 / 5)
    assert record["attention_backend"] is None and record["dice_ceiling"] == 1.0


@pytest.mark.parametrize("name", ["ddp1", "tiles_fsdp2"])
def test_record_and_run_directory_are_complete(name, runs):
    record = read_record(runs / name)
    may_miss = {"reason", "mfu", "dice_val", "score_val", "accuracy", "accuracy_by_size", "auc", "commit"}
    if "tiles" in name:
        may_miss.add("attention_backend")
    assert {k for k, v in record.items() if v is None} <= may_miss
    assert record["status"] == "ok" and record["n_test"] == 3 and record["n_train"] == 5
    for kind in ("image_h.png", "truth_h.png", "pred_h.png", "h.npz"):
        assert (runs / name / "predictions" / kind).stat().st_size > 0
    env = json.loads((runs / name / "env.json").read_text())
    assert env["ranks"] == record["gpus"] and env["versions"]["torch"]


@pytest.mark.parametrize("name", ["ddp1", "tiles_fsdp2"])
def test_numbers_of_a_record_fit_together(name, runs):
    record = read_record(runs / name)
    assert record["seconds_per_image"] == pytest.approx(1 / record["images_per_s"])
    assert record["dice"] == pytest.approx(sum(record["dice_per_slide"].values()) / 3)
    assert record["timed_steps"] == record["steps"] - 3
    assert record["preprocessing_seconds"] == 1.5
    assert record["loss_final"] == losses(runs / name)[-1]
    assert 0 < record["peak_memory_gib"] < 16
