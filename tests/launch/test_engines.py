"""Every engine on every number of ranks trains the same model: same losses, same gradient norms, same Dice."""

import json

import pytest

from launch.record import read_record
from tests.launch.small import finish_well, losses, overrides, run_to_end

pytestmark = pytest.mark.gloo

STEPS = 20


def norms(run_dir):
    return [json.loads(x)["grad_norm"] for x in (run_dir / "metrics.jsonl").read_text().splitlines() if "grad_norm" in x]


@pytest.fixture(scope="module")
def reference(apf_files, tmp_path_factory):
    """One plain run: ddp on one rank without accumulation, clipping tight enough to matter."""
    root = tmp_path_factory.mktemp("reference")
    run_to_end(1, overrides(apf_files, root, run_id="r", train__max_steps=STEPS, train__clip=0.3, engine__name="ddp"))
    run_dir = root / "smoke" / "r"
    assert max(norms(run_dir)) > 0.3, "clipping was not tested"
    return run_dir


@pytest.mark.parametrize(
    ("engine", "world", "accumulate"), [("fsdp", 1, 1), ("ddp", 2, 1), ("fsdp", 2, 1), ("ddp", 1, 4), ("fsdp", 2, 2)]
)
def test_same_losses_as_one_rank(engine, world, accumulate, reference, apf_files, tmp_path, start):
    words = overrides(
        apf_files, tmp_path, run_id="r", train__max_steps=STEPS, train__clip=0.3, engine__name=engine,
        train__accumulate=accumulate,
    )  # fmt: skip
    finish_well(start(world, words))
    run_dir = tmp_path / "smoke" / "r"
    assert len(losses(run_dir)) == STEPS
    assert losses(run_dir) == pytest.approx(losses(reference), abs=1e-5)
    assert norms(run_dir) == pytest.approx(norms(reference), rel=1e-3)
    mine, theirs = read_record(run_dir), read_record(reference)
    assert (mine["engine"], mine["gpus"], mine["parameters"]) == (engine, world, theirs["parameters"])
    assert mine["dice_per_slide"] == pytest.approx(theirs["dice_per_slide"], abs=1e-3)
    for key in ("floors", "dice_ceiling", "tokens_per_image", "split_sha256"):
        assert mine[key] == theirs[key]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_bf16_trains_close_to_fp32(engine, reference, apf_files, tmp_path, start):
    words = overrides(
        apf_files, tmp_path, run_id="r", train__max_steps=STEPS, train__clip=0.3, engine__name=engine,
        train__precision="bf16",
    )  # fmt: skip
    finish_well(start(2, words))
    got, exact = losses(tmp_path / "smoke" / "r"), losses(reference)
    assert got != exact, "bf16 was not used"
    assert got[:5] == pytest.approx(exact[:5], abs=0.01)
    assert got == pytest.approx(exact, abs=0.06)
    assert read_record(tmp_path / "smoke" / "r")["precision"] == "bf16"


def test_tiles_under_fsdp(tile_files, tmp_path, start):
    words = [w for w in overrides(tile_files, tmp_path, run_id="r") if not w.startswith("model.")]
    words += [
        "model.name=unet_tiled", "model.widths=[4,8]", "data.kind=tiles", "data.patching=uniform", "data.patch=32",
        "data.length=4", "data.crop_px=32", "train.max_steps=4", "engine.name=fsdp",
    ]  # fmt: skip
    finish_well(start(2, words))
    record = read_record(tmp_path / "smoke" / "r")
    assert record["samples_per_image"] == 4 and record["epochs"] == pytest.approx(4 * 4 / 4 / 5)
    assert record["attention_backend"] is None and record["dice_ceiling"] == 1.0
    assert set(record["dice_per_slide"]) == {"h", "i", "j"}
