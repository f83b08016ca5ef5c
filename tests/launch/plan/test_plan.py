"""The planner against real runs of two processes, against counts by hand, and its command line."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from launch.__main__ import main
from launch.commands.plan import engine_overrides, saving_changes
from launch.config.config import apply_overrides
from launch.config.sites import SITES, load_site
from launch.data.batches import padded_length
from launch.experiments.load import load
from launch.plan.cost import collective_s, summed
from launch.plan.ledger import Collective, Ledger
from launch.plan.step import count, made_up_batch
from tests.helpers.small_runs import Group, free_port, launch_rank, overrides, write_folder

# name: settings. Uniform files: every image has the same tokens, in the files and in the plan.
RUNS = {
    "ddp": {},
    "ddp_bf16": {
        "train__precision": "bf16",
        "model__checkpointing": "true",
        "train__ema_decay": 0.9,
        "train__accumulate": 2,
    },
    "fsdp": {"engine__name": "fsdp"},
}
# Gradients of 64 MiB: DDP reduces them in several buckets.
WIDE = {"ddp_wide": {"model__width": 512, "model__depth": 5, "model__heads": 8, "model__mlp_dim": 2048}}
SLOW_RUNS = {
    **{f"zero{stage}": {"engine__name": "deepspeed", "engine__zero": stage} for stage in range(4)},
    "fsdp_accumulate": {"engine__name": "fsdp", "train__accumulate": 2, "train__precision": "bf16"},
}
FOUR_RUNS = {
    "ddp4": {},
    "fsdp4": {"engine__name": "fsdp", "engine__shard": 4},
    "hsdp4": {"engine__name": "fsdp", "engine__shard": 2},
    "zero3_4": {"engine__name": "deepspeed", "engine__zero": 3},
    "shared4": {"engine__name": "fsdp", "engine__shard": 2, "engine__sequence": 2},
}
# c10d's names of what the plan calls by one.
NAMES = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "broadcast_": "broadcast",
    "allgather_": "all_gather",
    "all_to_all_single": "all_to_all",
}
# Peak of the plan over the peak of the real run. These models are so small that the work space inside the CPU's
# kernels, which a plan cannot see, is a part of the peak; bf16 kernels of CPUs have the most.
MEMORY = {"fp32": (0.93, 1.07), "bf16": (0.75, 1.10)}


def settings(files: Path, name: str) -> list[str]:
    return overrides(
        files,
        files.parent / "runs",
        run_id=name,
        train__max_steps=3,
        eval__pictures_px=0,
        data__patching="uniform",
        data__length=64,
        **{**RUNS, **WIDE, **SLOW_RUNS, **FOUR_RUNS}[name],
    )


def run_for_real(files: Path, names: list[str], world: int = 2) -> dict[str, dict]:
    """What that many processes did in their third step, by name."""
    jobs = files.parent / f"{names[0]}.json"
    jobs.write_text(json.dumps([[name, settings(files, name)] for name in names]))
    port, program = str(free_port()), ["-m", "tests.helpers.plan_real", str(jobs)]
    group = Group([launch_rank(rank, world, port, program) for rank in range(world)])
    assert group.wait(500) == [0] * world, group.errors
    return json.loads(jobs.with_suffix(".counts").read_text())


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("tokens") / "uniform", "uniform")


@pytest.fixture(scope="module")
def real(files: Path) -> dict[str, dict]:
    return run_for_real(files, [*RUNS, *WIDE])


@pytest.fixture(scope="module")
def really_slow(files: Path) -> dict[str, dict]:
    return run_for_real(files, list(SLOW_RUNS))


@pytest.fixture(scope="module")
def really_four(files: Path) -> dict[str, dict]:
    return run_for_real(files, list(FOUR_RUNS), 4)


def add(rows: dict[str, list[int]], kind: str, times: int, size: int) -> None:
    row = rows.setdefault(kind, [0, 0])
    row[0] += times
    row[1] += size


def agree(name: str, files: Path, happened: dict, world: int = 2) -> None:
    config = load("smoke", settings(files, name))
    planned = count(config, world, world)
    assert planned.flops == happened["flops"] > 5e7
    seen: dict[str, list[int]] = {}
    expected: dict[str, list[int]] = {}
    for operation, (times, size) in happened["collectives"].items():
        add(seen, NAMES[operation], times, size)
    for row in summed(planned.collectives):
        add(expected, row["kind"], row["count"], row["bytes"])
    assert expected == seen
    if happened["comm"]:  # CommDebugMode's count, where it can
        assert len(planned.collectives) == happened["comm"]
    low, high = MEMORY[config.train.precision]
    assert low < planned.peak_bytes / happened["peak_bytes"] < high
    assert sum(planned.memory.values()) == planned.peak_bytes


@pytest.mark.gloo
@pytest.mark.parametrize("name", RUNS)
def test_flops_and_collectives_are_those_of_a_real_run(name, files, real):
    agree(name, files, real[name])


@pytest.mark.gloo
def test_one_flat_tensor_stands_for_the_buckets_of_ddp_within_a_tenth(files, real):
    happened = real["ddp_wide"]
    planned = count(load("smoke", settings(files, "ddp_wide")), 2, 2)
    assert planned.flops == happened["flops"]
    assert planned.memory["gradients"] > 60 * 2**20, "or there is one bucket"
    times, size = happened["collectives"]["allreduce_"]
    (reduced,) = summed(planned.collectives)
    assert reduced["kind"] == "all_reduce" and times > 4
    assert reduced["bytes"] == pytest.approx(size, rel=0.1)
    assert reduced["count"] == pytest.approx(times, rel=0.1)
    assert planned.peak_bytes == pytest.approx(happened["peak_bytes"], rel=0.1)


@pytest.mark.gloo
@pytest.mark.slow  # ZeRO's buckets take 2 GB in each process
@pytest.mark.parametrize("name", SLOW_RUNS)
def test_zero_plans_what_deepspeed_does(name, files, really_slow):
    agree(name, files, really_slow[name])


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR_RUNS)
def test_four_processes_do_what_is_planned_for_four(name, files, really_four):
    agree(name, files, really_four[name], 4)


def test_shards_hold_their_share_of_the_memory(files):
    """8 gpus of a node shard everything; 16 gpus replicate the node (HSDP) and pay an all-reduce of shards for it."""
    words = [*settings(files, "fsdp"), "train.batch=16"]
    node, two_nodes = (count(load("smoke", words), world, min(world, 8)) for world in (8, 16))
    assert (node.engine, two_nodes.engine) == ("fsdp", "hsdp")
    assert 4 * node.parameters / 8 <= node.memory["parameters"] < 4 * node.parameters / 6, "fp32, padded a little"
    assert node.memory["parameters"] == two_nodes.memory["parameters"]
    assert node.flops == 2 * two_nodes.flops, "the global batch is shared"
    groups = {(row["kind"], row["ranks"]) for row in summed(two_nodes.collectives)}
    assert {("all_gather", 8), ("reduce_scatter", 8), ("all_reduce", 2), ("all_reduce", 16)} <= groups


def test_recomputation_trades_flops_for_memory(files):
    plain, again = (
        count(load("smoke", [*settings(files, "ddp"), f"model.checkpointing={value}"]), 2, 2)
        for value in ("false", "true")
    )
    assert again.flops > plain.flops
    assert again.memory["activations"] < plain.memory["activations"]


def test_the_worst_weights_nearby_cost_a_second_pass(files):
    plain, asam = (
        count(load("smoke", [*settings(files, "ddp"), f"train.optimiser={name}"]), 2, 2) for name in ("adam", "asam")
    )
    assert asam.flops == 2 * plain.flops and len(asam.collectives) == 2 * len(plain.collectives) - 2
    assert asam.peak_bytes > plain.peak_bytes, "a copy of the weights"


def test_gpus_hold_one_part_of_the_batch(files):
    words = [*settings(files, "ddp"), "train.accumulate=2"]
    cpu, gpu = (count(load("smoke", words), 2, 2, whole_batch=whole) for whole in (True, False))
    image = 4 * 64 * 8 * 8 * (3 + 1 + 1) + 64 * (8 * 2 + 8 + 1)  # pixels and counts, place, size and flag of 64 tokens
    assert cpu.memory["activations"] - gpu.memory["activations"] == image
    assert (cpu.flops, cpu.collectives) == (gpu.flops, gpu.collectives)


# -- the ledger, on real tensors --------------------------------------------------------------------------------------


def test_the_ledger_sees_what_lives_and_what_dies():
    a = torch.zeros(1024)
    ledger = Ledger()
    ledger.hold([a], "parameters")
    with ledger:
        b = a + 1  # 8 KiB live
        c = b * 2  # 12
        del b  # 8
        d = c.view(2, 512)  # shares c
        mark = ledger.events()
        e = d + d  # 12
        del e
        f = torch.zeros(4096)  # 24
    peak, kinds = ledger.peak()
    assert peak == 24 * 1024
    assert {kind: size for kind, size in kinds.items() if size} == {"parameters": 4096, "activations": 20480}
    assert ledger.peak(mark)[0] == 24 * 1024
    del f
    assert ledger.work["fp32"].flops == 0


def test_flops_and_traffic_by_hand():
    x, w = torch.zeros(8, 16), torch.zeros(32, 16)
    q = torch.zeros(1, 2, 8, 4)
    with Ledger() as ledger:
        x @ w.T
        (x.bfloat16() @ w.T.bfloat16()).float()
    assert ledger.work["fp32"].flops == ledger.work["bf16"].flops == 2 * 8 * 16 * 32
    assert ledger.work["fp32"].matrix_bytes == 4 * (8 * 16 + 16 * 32 + 8 * 32)
    with Ledger() as ledger:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert ledger.flops == 2 * (2 * 8 * 8 * 4) * 2, "two products of 8 x 8 x 4 for each of 2 heads"


def test_a_fused_optimiser_moves_weights_gradients_and_moments():
    weight = torch.nn.Parameter(torch.zeros(1000))
    weight.grad = torch.ones(1000)
    optimizer = torch.optim.AdamW([weight], fused=True)
    optimizer.step()  # makes the moments
    with Ledger() as ledger:
        optimizer.step()
    moved = ledger.work["fp32"].other_bytes - 7 * 4 * 1000  # reads four, writes all but the gradient
    assert 0 <= moved <= 64, "the rest is the counter of steps"


# -- seconds ----------------------------------------------------------------------------------------------------------


def test_seconds_of_collectives_by_hand():
    site = load_site("frontier")  # 8 a node; inside 50 GB/s, 10 us; between 12.5 GB/s a gpu, 20 us
    node = collective_s(Collective("all_gather", 8 * 10**9, tuple(range(8))), site)
    assert node == pytest.approx((7 / 8 * 8 / 50, 7 * 10e-6))
    across = collective_s(Collective("all_reduce", 10**9, tuple(range(0, 2048, 8))), site)
    assert across == pytest.approx((2 * 255 / 256 / 12.5, 2 * 8 * 20e-6)), "one rank a node, a tree of 256 nodes"
    ring = collective_s(Collective("reduce_scatter", 10**9, tuple(range(16))), site)
    assert ring == pytest.approx((15 / 16 / 50, 7 * 10e-6 + 20e-6)), "8 ports of a node, not faster than inside"
    assert collective_s(Collective("all_reduce", 10**9, (0,)), site) == (0, 0)


# -- the command line -------------------------------------------------------------------------------------------------


def test_2048_gpus_and_an_impossible_number_as_json(files, real, capsys):
    words = ["--gpus", "3,2048", "--engine", "hsdp", "--site", "frontier", "--json"]
    assert main(["plan", "smoke", *words, *settings(files, "ddp"), "train.batch=2048"]) == 0
    impossible, large = json.loads(capsys.readouterr().out)["plans"]
    assert "train.batch=2048 cannot be shared" in impossible["error"]
    assert (large["gpus"], large["nodes"], large["engine"], large["images_per_forward"]) == (2048, 256, "hsdp", 1)
    assert large["fits"] and large["would_fit"] is None
    assert large["macs"] * 2 == large["flops"] == real["ddp"]["flops"] // 2, "one image instead of two"
    assert large["time"]["overlapped_s"] <= large["time"]["step_s"]
    assert {row["ranks"] for row in large["collectives"]} == {8, 256, 2048}


def test_what_does_not_fit_gets_a_change_that_does(files, tmp_path, capsys):
    words = [*settings(files, "ddp"), "train.precision=bf16", "model.checkpointing=true"]  # a smaller batch is left
    small = count(load("smoke", [*words, "train.accumulate=2"]), 1, 1).peak_bytes / 2**30
    tree = yaml.safe_load((SITES / "local.yaml").read_text()) | {"name": "small"}
    tree["hardware"] |= {"memory_gib": 1.01 * small, "reserved_gib": 0}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(tree))
    assert main(["plan", "smoke", "--site", str(tmp_path / "small.yaml"), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "does not fit" in lines[-1] and "cheapest change: train.accumulate=2 (" in lines[-1]
    assert lines[1].split()[-1] == "NO"


def test_changes_that_save_memory_are_those_not_made_yet():
    config = load("demo_apf", ["train.batch=8"])
    save = ["train.accumulate=2", "train.accumulate=4", "train.precision=bf16", "model.checkpointing=true"]
    assert saving_changes(config, 2) == ["engine.name=fsdp", *save]
    assert saving_changes(apply_overrides(config, ["engine.name=fsdp", *save[1:]]), 2) == ["engine.shard=2"]


def test_engine_words():
    assert engine_overrides("zero3", 8) == ["engine.name=deepspeed", "engine.zero=3"]
    assert engine_overrides("fsdp", 16) == ["engine.name=fsdp", "engine.shard=16"]
    assert engine_overrides("hsdp", 16) == ["engine.name=fsdp", "engine.shard=null"]
    assert engine_overrides("ddp", 16) == ["engine.name=ddp"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["smoke", "--gpus", "two"], "--gpus='two' must be numbers"),
        (["smoke", "--gpus", "0"], "--gpus='0' must be numbers"),
        (["smoke", "--site", "mars"], "unknown site 'mars'"),
        (["smok"], "unknown experiment 'smok' (did you mean smoke?)"),
        (["smoke", "--micro", "0"], "--micro=0"),
        (["smoke", "--gpus", "64"], "train.batch=2 cannot be shared"),
    ],
)
def test_bad_arguments_are_one_line(words, said, capsys):
    assert main(["plan", *words]) == 64
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_plan_of_parts_counts_the_leaves_of_a_part():
    whole = load("open_nuclei_apf", ["data.part=1"])
    part = load("open_nuclei_apf", ["data.part=0.25"])
    batches = [made_up_batch(config, 1) for config in (whole, part)]
    lengths = [int(batch["valid"].sum()) for batch in batches]
    leaves = whole.data.length
    assert lengths[0] == leaves and 0.75 < lengths[1] / (leaves * 0.25**2) < 1.5
    assert batches[1]["tokens"].shape[1] == padded_length(lengths[1], leaves)
    small = made_up_batch(load("open_nuclei_apf"), 1)  # in the middle of the tree that is made up are few leaves
    assert abs(int(small["valid"].sum()) / (leaves * 0.15**2) - 1) < 0.25
    flops = [count(config, 1, 1).flops for config in (whole, part)]
    assert flops[1] < 0.2 * flops[0]
