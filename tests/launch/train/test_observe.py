"""What a run tells of itself: rates, events, traces, sinks; and what it leaves when it hangs."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from hpc_models.registry import build
from launch.records.flops import COUNT_EVERY, Speed, peak_tflops
from launch.records.record import read_record
from tests.helpers.repository import ROOT
from tests.helpers.small_runs import clean_env, ended_alike, finish_well, overrides, stoppable, wait_for_steps
from tests.helpers.trees import random_batch

STEPS = 8


def log_folder(run_dir: Path, start: int) -> Path:
    return run_dir / "logs" / f"local-{start}"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.conv = nn.Linear(8, 24), nn.Conv2d(3, 5, 3)

    def forward(self, x: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v).sum() + self.conv(image).sum()


def test_flops_are_counted_by_hand():
    speed, net = Speed(1e-6), Net()  # a peak of a million a second
    x, image = torch.randn(2, 10, 8), torch.randn(1, 3, 6, 6)
    first_layers = 2 * (2 * 10 * 8 * 24) + 2 * (5 * 4 * 4 * 3 * 9)  # their inputs need no gradient
    step_flops = 2 * first_layers + 3 * (2 * 2 * (2 * 2 * 10 * 10 * 4))
    for _ in range(2):
        speed.begin({"valid": torch.ones(2, 10, dtype=torch.bool)})
        with speed.forward():
            loss = net(x, image)
        loss.backward()
        speed.stepped()
        numbers = speed.end(4.0)
        assert numbers["mfu(%)"] == pytest.approx(100 * step_flops / 4e6)
        assert numbers["tps"] == 20 / 4
    speed.begin({"image": image})
    assert "tps" not in speed.end(1.0) and Speed(None).mfu(1.0) is None
    assert speed.flops == 2 * step_flops and Speed(None).flops == 0


def step_of(speed: Speed, rows: int, taught: int = 0) -> float:
    """A step of a linear map over so many rows, and over others without a backward pass; what it counted."""
    net, before = nn.Linear(8, 24, bias=False), speed.flops
    inner = torch.ones(rows, 8, requires_grad=True)  # as of an earlier layer
    speed.begin({})
    with speed.forward():
        with speed.no_backward():
            net(torch.ones(taught, 8))
        net(inner)
    speed.stepped()
    return (speed.flops - before) / (2 * 8 * 24)


SHAPE = {"size_px": 128, "patch": 8, "length": 100, "width": 32, "depth": 2, "heads": 2, "mlp_dim": 64}
ATEN = torch.ops.aten
ON_CPU = {  # torch itself has nothing for them; the scores that the backward pass computes again are left out
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *args, **more: sdpa_flop_count(q, k, v),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient, q, k, v, *args, **more: (
        2 * sdpa_flop_count(q, k, v)
    ),
}
COUNTED = {
    "leaf_unet": lambda: build("unetr", **SHAPE, decoder="leaf_unet", position="geom", leaf_base=4),
    "token": lambda: build("unetr", **SHAPE, decoder="token", position="geom"),
    "geometric": lambda: build("unetr", **SHAPE, decoder="geometric", position="slot", feature_size=4),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", COUNTED)
def test_flops_are_those_of_the_backward_pass_too(kind, checkpointing):
    """As torch counts them over both passes, where nothing is recomputed."""
    model, (batch, _, _) = COUNTED[kind](), random_batch(3, 128, 8, 100)
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
        model(batch).sum().backward()
    speed = Speed(None)
    model.set_checkpointing(checkpointing)
    speed.begin(batch)
    with speed.forward():
        logits = model(batch)
    logits.sum().backward()
    speed.stepped()
    assert speed.flops == counter.get_total_flops()


@pytest.mark.parametrize("again", [True, False])
def test_a_counted_step_stands_for_those_up_to_the_next(again):
    """Also without a peak, and after a restart; the sum never falls."""
    speed = Speed(None, again=again)
    assert [step_of(speed, 30)] + [step_of(speed, 7) for _ in range(COUNT_EVERY - 1)] == [90] * COUNT_EVERY
    later = 30 if again else 90
    assert [step_of(speed, 10), step_of(speed, 7)] == [later, later]
    restarted = Speed(1e-6, again=again)
    restarted.resume(speed.flops, COUNT_EVERY + 2)
    assert step_of(restarted, 20) == 60 and restarted.flops > speed.flops
    assert restarted.mfu(2.0) == pytest.approx(restarted.flops / (COUNT_EVERY + 3) / 2e6)
    assert speed.mfu(1.0) is None


def test_flops_are_summed_over_ranks_and_a_teacher_counts_once():
    speed = Speed(1e-6, world=4, total=lambda own: 4 * own + 5 * 2 * 8 * 24)  # three other ranks, with five more
    assert step_of(speed, 10, taught=2) == 4 * (3 * 10 + 2) + 5
    assert speed.mfu(1.0) == pytest.approx(speed.flops / 4e6)


def test_peaks_come_from_the_site_files():
    assert peak_tflops("NVIDIA A100-SXM4-40GB", "bf16") == 312
    assert peak_tflops("AMD Instinct MI250X", "bf16") == pytest.approx(191.5, abs=1)
    assert peak_tflops("NVIDIA H100 80GB HBM3", "fp32") == peak_tflops("NVIDIA H100-SXM5-80GB", "fp32") > 50
    for name in ("NVIDIA H100 PCIe", "Intel(R) Xeon(R) Gold 6148", "Tesla T4"):
        assert peak_tflops(name, "bf16") is None


def test_metrics_and_trace_of_a_run(apf_files, tmp_path, start):
    group = start(
        1,
        overrides(
            apf_files,
            tmp_path,
            run_id="r",
            train__max_steps=STEPS,
            eval__every_steps=4,
            log__peak_tflops=0.05,
            log__profile_steps=2,
            train__log_every=2,
        ),
    )
    finish_well(group)
    run_dir = tmp_path / "smoke" / "r"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in (line for line in lines if "loss" in line):
        assert 0 < line["mfu(%)"] < 100 and line["memory/max_active(GiB)"] > 0 and line["tps"] > 0
    timed = [line["mfu(%)"] / 100 for line in lines if "loss" in line and line["step"] > 3]
    assert min(timed) / 3 < read_record(run_dir)["mfu"] < max(timed) * 3

    trace = json.loads((log_folder(run_dir, 1) / "trace-rank-0.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert sum(name.startswith("Optimizer.step#") for name in names) == 2, "two steps were asked for"


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_sinks_get_the_metrics_or_are_refused_at_once(name, apf_files, tmp_path, start):
    words = overrides(apf_files, tmp_path, run_id="r", train__max_steps=2, log__sinks=name)
    group = start(1, words)
    if importlib.util.find_spec(name) is None:
        assert group.wait() == [64]
        assert group.errors[0] == f"error: log.sinks={name}: not installed; pip install {name}\n"
        assert not (tmp_path / "smoke").exists()
    else:
        finish_well(group)
        files = [p for p in (tmp_path / "smoke" / "r" / name).rglob("*") if p.is_file()]
        assert sum(p.stat().st_size for p in files) > 100


@pytest.mark.gloo
def test_a_file_stops_all_ranks_and_is_gone_when_they_have(apf_files, tmp_path, start):
    group = start(2, overrides(apf_files, tmp_path, run_id="r", train__max_steps=10**6))
    run_dir = tmp_path / "smoke" / "r"
    while not (run_dir / "metrics.jsonl").exists():
        assert all(p.poll() is None for p in group.processes), group.wait()
        time.sleep(0.01)
    (run_dir / "STOP").touch()
    assert group.wait() == [75, 75], group.errors
    record = read_record(run_dir)
    assert record["status"] == "preempted" and "file STOP: checkpointed" in record["reason"]
    assert (run_dir / "checkpoints" / f"step-{record['steps']}" / "COMPLETE").exists()
    assert not (run_dir / "STOP").exists()


@pytest.mark.gloo
def test_a_rank_that_hangs_is_a_timeout_record_and_the_run_goes_on(whole, apf_files, tmp_path, start):
    words = stoppable(apf_files, tmp_path, log__hang_seconds=8)
    run_dir = tmp_path / "smoke" / "r"
    group = start(2, words)
    wait_for_steps(run_dir, 6, group)
    group.send(signal.SIGSTOP, [1])
    assert group.processes[0].wait(120) == 1
    group.send(signal.SIGKILL, [1])
    group.wait()
    record = read_record(run_dir)
    assert record["status"] == "timeout" and "nothing happened for 8 s" in record["reason"]
    assert "perhaps waiting for other ranks" in record["reason"] and group.errors[0].count("error: ") == 1
    stacks = (log_folder(run_dir, 1) / "stacks-rank-0.txt").read_text()
    assert "trainer.py" in stacks and "most recent call first" in stacks
    finish_well(start(2, [*words, "log.hang_seconds=600"]))
    assert not list(log_folder(run_dir, 2).glob("stacks*")), "nothing hung, nothing was left"
    ended_alike(run_dir, whole)


PROGRAM = """
import ctypes, sys, time
from pathlib import Path
from launch.train.lifetime import Watchdog
watchdog = Watchdog(1.0, Path(sys.argv[2]), 0, lambda where: (print(where, flush=True), watchdog.stop()))
watchdog.start()
for _ in range(15):
    time.sleep(0.1)
    watchdog.beat()
print("alive", flush=True)
if sys.argv[1] == "python":
    time.sleep(4)
elif sys.argv[1] == "c":
    ctypes.PyDLL(None).pause()  # waits for ever and keeps the interpreter
else:
    watchdog.stop()
    time.sleep(1.5)
print("end", flush=True)
"""


@pytest.mark.parametrize(("kind", "code"), [("python", 0), ("c", 1), ("none", 0)])
def test_the_watchdog_sees_python_and_c_hang(kind, code, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kind, str(tmp_path)],
        cwd=ROOT,
        env=clean_env(),
        text=True,
        capture_output=True,
        timeout=100,
    )
    assert done.returncode == code, done.stderr
    said = done.stdout.splitlines()
    assert said[0] == "alive", "beats keep it quiet"
    stacks = tmp_path / "stacks-rank-0.txt"
    if kind == "none":
        assert said == ["alive", "end"] and not stacks.exists()
    else:
        assert "most recent call first" in stacks.read_text() and 'File "<string>"' in stacks.read_text()
        assert said[1:] == (
            ["nothing happened for 1 s; the main thread is in ? (unknown code:0)", "end"] if kind == "python" else []
        )
