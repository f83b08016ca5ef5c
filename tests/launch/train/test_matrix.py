"""Decoders, position codes, ways to patch and engines together: train on two ranks, save, resume bit for bit."""

import itertools
import json
from pathlib import Path

import pytest

from launch.records.record import read_record
from tests.helpers.small_runs import SIZE, Group, free_port, launch_rank, losses, overrides, write_folder

pytestmark = pytest.mark.gloo

PAIRS = [  # half of all pairs, so that each decoder meets two codes and each code two decoders
    (decoder, position)
    for d, decoder in enumerate(("raster", "geometric", "token", "leaf", "leaf_unet"))
    for p, position in enumerate(("slot", "geom", "both", "none"))
    if (d + p) % 2 == 0
]
# name: (decoder, position, engine, patching, precision, recompute activations); the last three go round.
CASES = {
    f"{decoder}-{position}-{engine}": (
        decoder,
        position,
        engine,
        "apf" if i % 4 < 2 else "uniform",
        "bf16" if i % 3 == 2 else "fp32",
        i % 5 < 2,
    )
    for i, ((decoder, position), engine) in enumerate(itertools.product(PAIRS, ("ddp", "fsdp")))
}
# Each decoder, code, engine, way to patch, precision, with and without recomputation; the others are slow.
QUICK = ("raster-both-fsdp", "geometric-geom-ddp", "token-slot-ddp", "leaf-none-fsdp", "leaf_unet-both-fsdp")
# name: (test slides, engine). Fewer than ranks, and one too many for them.
UNEVEN = {"one-of-two": (["j"], "fsdp"), "five-of-two": (["f", "g", "h", "i", "j"], "fsdp"), "one-ddp": (["j"], "ddp")}


def settings(name: str, folders: dict[str, Path], root: Path) -> list[str]:
    """One small run of two steps, each saved."""
    more = {
        "run_id": name,
        "train__max_steps": 2,
        "checkpoint__every_steps": 1,
        "checkpoint__keep": 9,
        "eval__every_steps": 1,
    }
    if name.split("+")[0] in UNEVEN:
        names, engine = UNEVEN[name.split("+")[0]]
        split = root / f"{name}.json"
        split.write_text(json.dumps({"train": ["a", "b"], "val": [], "test": names}))
        return overrides(folders["apf"], root, **more, data__split=split, engine__name=engine)
    decoder, position, engine, patching, precision, recompute = CASES[name]
    more |= {"data__patching": patching, "data__length": 16 if patching == "apf" else (SIZE // 8) ** 2}
    return overrides(
        folders[patching],
        root,
        **more,
        model__decoder=decoder,
        model__position=position,
        model__feature_size=4,
        model__checkpointing=recompute,
        engine__name=engine,
        train__precision=precision,
    )


def run_all(world: int, jobs: list[list[str]], root: Path) -> None:
    (root / "jobs.json").write_text(json.dumps(jobs))
    port, program = str(free_port()), ["-m", "tests.helpers.many_ranks", str(root / "jobs.json")]
    group = Group([launch_rank(rank, world, port, program) for rank in range(world)])
    assert group.wait(500) == [0] * world, group.errors


@pytest.fixture(scope="module")
def folders(apf_files: Path, tmp_path_factory) -> dict[str, Path]:
    return {"apf": apf_files, "uniform": write_folder(tmp_path_factory.mktemp("matrix") / "uniform", "uniform")}


def run_twice(names: tuple[str, ...], folders: dict[str, Path], root: Path, *once: str) -> None:
    """Folder `first` with all runs on two ranks, `again` with those of `names` killed after step 1 and resumed."""
    for part in ("first", "again"):
        (root / part).mkdir()
    jobs: list[list[object]] = [settings(name, folders, root / "first") for name in once]
    for name in names:
        words = settings(name, folders, root / "again")
        jobs += [settings(name, folders, root / "first"), words]
        jobs += [["as if killed", str(root / "again" / "smoke" / name), 1], words]
    run_all(2, jobs, root)


@pytest.fixture(scope="module")
def runs(folders: dict[str, Path], tmp_path_factory) -> Path:
    """Folders `first`, `again`, and `alone`: UNEVEN on one rank."""
    root = tmp_path_factory.mktemp("matrix")
    (root / "alone").mkdir()
    run_twice(QUICK, folders, root, *UNEVEN)
    run_all(1, [settings(name, folders, root / "alone") for name in UNEVEN], root)
    return root


@pytest.fixture(scope="module")
def all_runs(folders: dict[str, Path], tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("matrix")
    run_twice(tuple(CASES), folders, root)
    return root


def resumed(root: Path, name: str) -> None:
    first, again = (root / part / "smoke" / name for part in ("first", "again"))
    assert len(losses(first)) == 2 and losses(again) == losses(first)
    records = read_record(first), read_record(again)
    assert [r["status"] for r in records] == ["ok", "ok"] and [r["starts"] for r in records] == [1, 2]
    for key in ("dice_per_slide", "dice_val", "loss_final", "steps", "parameters", "floors"):
        assert records[0][key] == records[1][key], key


@pytest.mark.parametrize("name", QUICK)
def test_trains_saves_and_resumes(name, runs):
    resumed(runs, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_pair_trains_saves_and_resumes(name, all_runs):
    resumed(all_runs, name)
    twin = name.replace("-fsdp", "-ddp")
    if CASES[name][3:5] == CASES[twin][3:5]:
        tolerance = 1e-5 if CASES[name][4] == "fp32" else 0.02
        first, second = (losses(all_runs / "first" / "smoke" / each) for each in (name, twin))
        assert first == pytest.approx(second, abs=tolerance)


def test_the_quick_ones_have_everything_once():
    columns = [set(column) for column in zip(*(CASES[name] for name in QUICK), strict=True)]
    assert columns == [set(column) for column in zip(*CASES.values(), strict=True)]


@pytest.mark.parametrize("name", UNEVEN)
def test_each_slide_counts_once_whatever_the_ranks(name, runs):
    together, alone = (read_record(runs / part / "smoke" / name) for part in ("first", "alone"))
    assert set(together["dice_per_slide"]) == set(UNEVEN[name][0]) and together["n_test"] == len(UNEVEN[name][0])
    assert together["dice_per_slide"] == pytest.approx(alone["dice_per_slide"], abs=2e-3)
    assert together["dice_val"] is None, "there is nothing to validate on"
    for key in ("dice_ceiling", "tokens_per_image", "floors"):
        assert together[key] == alone[key]
