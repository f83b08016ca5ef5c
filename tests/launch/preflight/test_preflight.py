"""preflight on one and two real processes, and the verdict on made-up nodes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.__main__ import main
from launch.config.sites import SITES, read_site
from launch.preflight.nodes import Fault, judge, needed, table
from launch.preflight.probes import Report, host_name
from tests.helpers.repository import ROOT
from tests.helpers.small_runs import Group, clean_env, free_port, launch_rank


@pytest.fixture
def site_file(tmp_path: Path):
    """`site_file(key=value)` writes the local site's facts with other expectations."""

    def write(**expected: object) -> Path:
        tree = yaml.safe_load((SITES / "local.yaml").read_text())
        easy = {
            "gemm_tflops": {"fp32": 1e-6, "bf16": 1e-6},
            "memory_gb_s": 1e-6,
            "all_reduce_gb_s": 1e-6,
            "disk_write_mb_s": 1e-6,
            "disk_free_gib": 0,
            "clock_skew_s": 1e6,
        }
        tree |= {"name": "here", "expected": tree["expected"] | easy | expected}
        path = tmp_path / "here.yaml"
        path.write_text(json.dumps(tree))  # JSON is YAML
        return path

    return write


def preflight(*words: object) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "launch", "preflight", "--seconds", "2", *map(str, words)]
    return subprocess.run(program, cwd=ROOT, env=clean_env(), capture_output=True, text=True, timeout=120)


def two(*words: object) -> Group:
    port, program = str(free_port()), ["-m", "launch", "preflight", "--seconds", "2", *map(str, words)]
    group = Group([launch_rank(rank, 2, port, program, stdout=subprocess.DEVNULL) for rank in range(2)])
    group.wait(120)
    return group


def test_one_process_passes_and_leaves_nothing(site_file, tmp_path):
    bad = tmp_path / "bad"
    done = preflight("--site", site_file(), "--bad-nodes", bad, "--folder", tmp_path / "new" / "runs")
    assert done.returncode == 0, done.stderr
    header, row = done.stdout.splitlines()
    for name in ("GEMM fp32", "GEMM bf16", "memory", "disk write", "disk free", "clock"):
        assert name in header
    assert "all-reduce" not in header, "one rank has nobody to reduce with"
    assert row.split()[0] == host_name() and row.split()[-1] == "ok"
    assert bad.read_text() == ""
    assert not (tmp_path / "new").exists()


@pytest.mark.gloo
def test_two_processes_measure_their_all_reduce_and_name_the_slow_node(site_file, tmp_path):
    bad = tmp_path / "bad"
    group = two("--site", site_file(all_reduce_gb_s=1e9), "--bad-nodes", bad, "--folder", tmp_path)
    assert [p.returncode for p in group.processes] == [65, 65], group.errors
    assert bad.read_text() == f"{host_name()}\n"
    assert f"error: {host_name()}: all-reduce, node" in group.errors[0]
    assert "GEMM" not in group.errors[0] and "error" not in group.errors[1], "rank 0 alone speaks, of the fault alone"


def test_absurd_expectations_name_this_node(site_file, tmp_path):
    bad = tmp_path / "bad"
    site = site_file(gemm_tflops={"fp32": 1e9}, memory_gb_s=1e9, disk_write_mb_s=1e9, disk_free_gib=1e9)
    done = preflight("--site", site, "--bad-nodes", bad, "--folder", tmp_path)
    assert done.returncode == 65
    said = [line.removeprefix(f"error: {host_name()}: ") for line in done.stderr.splitlines() if "error" in line]
    assert [words.split()[0] for words in said] == ["GEMM", "memory", "disk", "disk"], done.stderr
    assert done.stdout.splitlines()[1].split()[-1] == "BAD"
    assert bad.read_text() == f"{host_name()}\n"


def test_a_folder_that_cannot_be_written_is_a_fault_of_the_node(site_file, tmp_path):
    (tmp_path / "file").write_text("")
    done = preflight("--site", site_file(), "--folder", tmp_path / "file" / "runs")
    assert done.returncode == 65
    assert "disk: cannot write to" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists(), reason="there is a GPU")
def test_a_gpu_site_without_gpus(tmp_path):
    bad = tmp_path / "bad"
    done = preflight("--site", "generic-cuda", "--bad-nodes", bad, "--folder", tmp_path)
    assert done.returncode == 65
    assert "no cuda gpu" in done.stderr
    assert bad.read_text() == f"{host_name()}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--site", "frontir"], "unknown site 'frontir' (did you mean frontier?)"),
        (["--seconds", "600"], "between 2 and 60"),
        (["--bad-nodes", "/no/such/folder/bad"], "/no/such/folder does not exist"),
    ],
)
def test_bad_arguments_are_one_line(words, said, capsys):
    assert main(["preflight", *words]) == 64
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


GOOD = {"gemm_fp32": 1.0, "gemm_bf16": 1.0, "memory": 99.0, "disk_write": 900.0, "disk_free": 900.0, "clock": 0.0}


def report(host: str, rank: int, device: str = "", **rates: float) -> Report:
    return Report(host, rank, device or f"gpu{rank}", {**GOOD, **rates})


def test_one_slow_gpu_makes_its_node_bad_and_no_other():
    site = read_site(SITES / "local.yaml")
    low = needed(site)["memory"] * 0.99
    reports = [report("a", 0), report("a", 1), report("b", 2), report("b", 3, memory=low)]
    assert judge(site, reports) == [Fault("b", f"memory {low:.3g} GB/s on rank 3, needs {needed(site)['memory']:.3g}")]
    assert [line.split()[-1] for line in table(reports, judge(site, reports)).splitlines()[1:]] == ["ok", "BAD"]


def test_a_wrong_clock_on_rank_0_does_not_blame_the_others():
    site = read_site(SITES / "local.yaml")
    reports = [report("a", 0), report("b", 1, clock=-300.0), report("c", 2, clock=-300.01)]
    faults = judge(site, reports)
    assert [fault.host for fault in faults] == ["a"] and "+300 s" in faults[0].text


def test_two_ranks_on_one_gpu_are_noticed():
    faults = judge(read_site(SITES / "local.yaml"), [report("a", 0, "gpu"), report("a", 1, "gpu"), report("b", 2)])
    assert [fault.host for fault in faults] == ["a"] and "share one gpu" in faults[0].text


def test_a_slow_network_between_good_nodes_blames_none_of_them():
    reports = [report("a", 0, all_reduce=0.0), report("b", 1, all_reduce=0.0)]
    faults = judge(read_site(SITES / "local.yaml"), reports)
    assert [fault.host for fault in faults] == [""] and "over all ranks" in faults[0].text
