"""Decoders, position codes, ways to patch and engines together: train on two ranks, save, resume bit for bit."""

import itertools
import json
import shutil
from pathlib import Path

import pytest

from launch.record import read_record
from tests.launch.small import SIZE, Group, free_port, launch_rank, losses, overrides, write_folder

pytestmark = pytest.mark.gloo

PAIRS = [  # half of all pairs, so that each decoder meets two codes and each code two decoders
    (decoder, position)
    for d, decoder in enumerate(("raster", "geometric", "token", "leaf"))
    for p, position in enumerate(("slot", "geom", "both", "none"))
    if (d + p) % 2 == 0
]
# name: (decoder, position, engine, patching, precision, recompute activations); the last three go round.
CASES = {
    f"{decoder}-{position}-{engine}": (
        decoder, position, engine,
        "apf" if i % 4 < 2 else "uniform", "bf16" if i % 3 == 2 else "fp32", i % 5 < 2,
    )
    for i, ((decoder, position), engine) in enumerate(itertools.product(PAIRS, ("ddp", "fsdp")))
}  # fmt: skip
# name: (test slides, engine). Fewer than ranks, and one too many for them.
UNEVEN = {"one-of-two": (["j"], "fsdp"), "five-of-two": (["f", "g", "h", "i", "j"], "fsdp"), "one-ddp": (["j"], "ddp")}


def settings(name: str, folders: dict[str, Path], root: Path) -> list[str]:
    """One small run of two steps, each saved."""
    more = {"run_id": name, "train__max_steps": 2, "checkpoint__every_steps": 1, "checkpoint__keep": 9,
            "eval__every_steps": 1}  # fmt: skip
    if name.split("+")[0] in UNEVEN:
        names, engine = UNEVEN[name.split("+")[0]]
        split = root / f"{name}.json"
        split.write_text(json.dumps({"train": ["a", "b"], "val": [], "test": names}))
        return overrides(folders["apf"], root, **more, data__split=split, engine__name=engine)
    decoder, position, engine, patching, precision, recompute = CASES[name]
    more |= {"data__patching": patching, "data__length": 16 if patching == "apf" else (SIZE // 8) ** 2}
    return overrides(
        folders[patching], root, **more, model__decoder=decoder, model__position=position, model__feature_size=4,
        model__checkpointing=recompute, engine__name=engine, train__precision=precision,
    )  # fmt: skip


def run_all(world: int, jobs: list[list[str]], root: Path) -> None:
    (root / "jobs.json").write_text(json.dumps(jobs))
    port, program = str(free_port()), ["-m", "tests.launch.many", str(root / "jobs.json")]
    group = Group([launch_rank(rank, world, port, program) for rank in range(world)])
    assert group.wait(500) == [0] * world, group.errors


@pytest.fixture(scope="module")
def runs(apf_files: Path, tmp_path_factory) -> Path:
    """Folder with `first` (all runs, two ranks), `again` (resumed after step 1) and `alone` (UNEVEN, one rank)."""
    root = tmp_path_factory.mktemp("matrix")
    folders = {"apf": apf_files, "uniform": write_folder(root / "uniform", "uniform")}
    for part in ("first", "again", "alone"):
        (root / part).mkdir()
    run_all(2, [settings(name, folders, root / "first") for name in (*CASES, *UNEVEN)], root)
    shutil.copytree(root / "first" / "smoke", root / "again" / "smoke")
    for run_dir in (root / "again" / "smoke").iterdir():
        (run_dir / "record.json").unlink()
        shutil.rmtree(run_dir / "checkpoints" / "step-2")
    run_all(2, [settings(name, folders, root / "again") for name in CASES], root)
    run_all(1, [settings(name, folders, root / "alone") for name in UNEVEN], root)
    return root


@pytest.mark.parametrize("name", CASES)
def test_trains_saves_and_resumes(name, runs):
    first, again = (runs / part / "smoke" / name for part in ("first", "again"))
    assert len(losses(first)) == 2 and losses(again) == losses(first)
    records = read_record(first), read_record(again)
    assert [r["status"] for r in records] == ["ok", "ok"] and [r["starts"] for r in records] == [1, 2]
    for key in ("dice_per_slide", "dice_val", "loss_final", "steps", "parameters", "floors"):
        assert records[0][key] == records[1][key], key
    twin = name.replace("-fsdp", "-ddp")
    if CASES[name][3:5] == CASES[twin][3:5]:
        tolerance = 1e-5 if CASES[name][4] == "fp32" else 0.02
        assert losses(first) == pytest.approx(losses(runs / "first" / "smoke" / twin), abs=tolerance)


@pytest.mark.parametrize("name", UNEVEN)
def test_each_slide_counts_once_whatever_the_ranks(name, runs):
    together, alone = (read_record(runs / part / "smoke" / name) for part in ("first", "alone"))
    assert set(together["dice_per_slide"]) == set(UNEVEN[name][0]) and together["n_test"] == len(UNEVEN[name][0])
    assert together["dice_per_slide"] == pytest.approx(alone["dice_per_slide"], abs=2e-3)
    assert together["dice_val"] is None, "there is nothing to validate on"
    for key in ("dice_ceiling", "tokens_per_image", "floors"):
        assert together[key] == alone[key]
