"""`python -m launch preflight`: names the nodes that are slower than their site expects; exit code 65."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.system.files import write_atomic
from launch.config.sites import Site
from launch.engines import ranks as places
from launch.engines.ranks import EXIT_OK, Ranks
from launch.records.text_table import text_table

if TYPE_CHECKING:
    import torch

    from launch.preflight.probes import Report

EXIT_PREFLIGHT = 65
_JOIN_S = 60.0  # for the ranks to meet, before the measurements' time begins

# name of a rate: (heading, unit)
_RATES = {
    "gemm_fp32": ("GEMM fp32", "TFLOP/s"),
    "gemm_bf16": ("GEMM bf16", "TFLOP/s"),
    "memory": ("memory", "GB/s"),
    "all_reduce_node": ("all-reduce, node", "GB/s"),
    "all_reduce": ("all-reduce, all", "GB/s"),
    "disk_write": ("disk write", "MB/s"),
    "disk_free": ("disk free", "GiB"),
    "clock": ("clock", "s"),
}


@dataclass(frozen=True)
class Fault:
    """A fault of a node, or of the network between all nodes (host "")."""

    host: str
    text: str


def check_nodes(site: Site, seconds: float, folder: Path, bad_nodes: Path | None) -> int:
    """Measure, compare and report; ends the process itself once the ranks have met.

    Args:
        site: Its expectations.
        seconds: Time limit of all measurements.
        folder: Where the disk is tried.
        bad_nodes: File for the names of bad nodes.

    Raises:
        RankError: The launcher's environment lacks something.
    """
    ranks = places.find_ranks()
    places.end_with_launcher(ranks)
    places.share_threads(ranks, int(os.environ.get("OMP_NUM_THREADS", "0")))
    device, trouble = _device(site, ranks)
    watch = _Alarm("joining the ranks", _JOIN_S, ranks)
    places.start(ranks, device, _JOIN_S)
    watch.stop()
    watch = _Alarm("start", seconds, ranks)
    report = _measure(site, ranks, device, seconds, folder, watch)
    report.faults += trouble
    watch.at = "collecting the results"
    code = _verdict(site, ranks, report, bad_nodes)
    watch.stop()
    return places.finish(code)


class _Alarm:
    """Ends this rank with 65 when a measurement hangs, as on a broken network, and says where."""

    def __init__(self, at: str, limit_s: float, ranks: Ranks) -> None:
        self.at = at
        self._ranks, self._limit_s = ranks, limit_s
        self._timer = threading.Timer(limit_s, self._end)
        self._timer.daemon = True
        self._timer.start()

    def _end(self) -> None:
        from launch.preflight.probes import host_name

        where = f"rank {self._ranks.rank} of {self._ranks.world} on {host_name()}"
        print(f"error: preflight hangs: {where} is in `{self.at}` after {self._limit_s:g} s", file=sys.stderr)
        places.leave(EXIT_PREFLIGHT)

    def stop(self) -> None:
        self._timer.cancel()


def _device(site: Site, ranks: Ranks) -> tuple[torch.device, list[str]]:
    """The device of this rank; without a gpu the CPU and the fault, so that the other ranks still hear of it."""
    import torch

    kind = site.hardware.kind
    if kind == "cpu":
        return torch.device("cpu"), []
    try:
        return places.pick_device("cuda", ranks), []
    except places.RankError as error:
        return torch.device("cpu"), [f"no {kind} gpu: {error}"]


def _measure(site: Site, ranks: Ranks, device: torch.device, seconds: float, folder: Path, watch: _Alarm) -> Report:
    """Every probe on this rank; all ranks go through the same collectives, whatever they find."""
    import torch.distributed as dist

    from launch.preflight import probes

    # Who shares this node.
    report = probes.Report(probes.host_name(), ranks.rank, probes.device_identity(device))
    hosts: list[Any] = [None] * ranks.world
    dist.all_gather_object(hosts, (report.host, device.type))
    neighbours = [rank for rank, (host, _) in enumerate(hosts) if host == report.host]
    # The device, the disk and the clock.
    well = device.type != "cpu" or site.hardware.kind == "cpu"
    if well:
        for precision in site.expected.gemm_tflops:
            watch.at = f"GEMM {precision}"
            report.rates[f"gemm_{precision}"] = probes.gemm_tflops(device, precision, 0.1 * seconds)
        watch.at = "memory"
        report.rates["memory"] = probes.memory_gb_s(device, 0.1 * seconds)
    if neighbours[0] == ranks.rank:
        watch.at = f"disk {folder}"
        try:
            report.rates["disk_write"], report.rates["disk_free"] = probes.disk(folder, 0.2 * seconds)
        except OSError as error:
            report.faults.append(f"disk: cannot write to {folder}: {error.strerror}")
    watch.at = "clock"
    report.rates["clock"] = probes.clock_offsets_s()[ranks.rank]
    # The network, unless a missing gpu is known already.
    if len({kind for _, kind in hosts}) == 1 and ranks.world > 1:
        if len(neighbours) > 1:
            watch.at = "all-reduce within the node"
            group = dist.new_group(neighbours, use_local_synchronization=True)
            report.rates["all_reduce_node"] = probes.all_reduce_gb_s(device, group)
        watch.at = "all-reduce over all ranks"
        report.rates["all_reduce"] = probes.all_reduce_gb_s(device)
    return report


def needed(site: Site) -> dict[str, float]:
    """The smallest passing value of every rate; of `clock` the largest passing offset."""
    expected = site.expected
    rates = {
        **{f"gemm_{precision}": rate for precision, rate in expected.gemm_tflops.items()},
        "memory": expected.memory_gb_s,
        "all_reduce_node": expected.all_reduce_gb_s,
        "all_reduce": expected.all_reduce_gb_s,
        "disk_write": expected.disk_write_mb_s,
    }
    limits = {name: rate * expected.tolerance for name, rate in rates.items()}
    return {**limits, "disk_free": expected.disk_free_gib, "clock": expected.clock_skew_s}


def judge(site: Site, reports: Sequence[Report]) -> list[Fault]:
    """The faults by node in the order of ranks; `host` is "" where no node can be blamed.

    A clock is compared with the median of the nodes' clocks, so that a wrong one does not make all others bad.
    """
    limits, faults = needed(site), []
    by_host = _by_host(reports)
    clocks = sorted(group[0].rates["clock"] for group in by_host.values())
    for host, group in by_host.items():
        faults += [Fault(host, text) for text in _faults_of_node(group, limits, clocks[len(clocks) // 2])]
    slowest = min((r.rates["all_reduce"] for r in reports if "all_reduce" in r.rates), default=None)
    if slowest is not None and slowest < limits["all_reduce"]:
        host = next(iter(by_host)) if len(by_host) == 1 else ""
        faults.append(Fault(host, f"all-reduce over all ranks {slowest:.3g} GB/s, needs {limits['all_reduce']:.3g}"))
    return faults


def _faults_of_node(group: Sequence[Report], limits: dict[str, float], middle_clock_s: float) -> list[str]:
    faults = list(dict.fromkeys(text for report in group for text in report.faults))
    devices = [report.device for report in group if report.device]
    if len(set(devices)) < len(devices):
        faults.append("two ranks share one gpu: is the binding of the site file in use?")
    for name, limit in limits.items():
        values = {report.rates[name]: report.rank for report in group if name in report.rates}
        if name in ("all_reduce", "clock") or not values:
            continue
        worst = min(values)
        if worst < limit:
            heading, unit = _RATES[name]
            faults.append(f"{heading} {worst:.3g} {unit} on rank {values[worst]}, needs {limit:.3g}")
    off = group[0].rates["clock"] - middle_clock_s
    if abs(off) > limits["clock"]:
        faults.append(f"clock is {off:+.3g} s off the other nodes', {limits['clock']:g} s would pass")
    return faults


def _by_host(reports: Sequence[Report]) -> dict[str, list[Report]]:
    by_host: dict[str, list[Report]] = {}
    for report in reports:
        by_host.setdefault(report.host, []).append(report)
    return by_host


def table(reports: Sequence[Report], faults: Iterable[Fault]) -> str:
    """One line per node with the worst of its ranks."""
    bad = {fault.host for fault in faults}
    shown = [name for name in _RATES if any(name in report.rates for report in reports)]
    rows = [["node", "ranks", *(f"{_RATES[name][0]} [{_RATES[name][1]}]" for name in shown), "verdict"]]
    for host, group in _by_host(reports).items():
        cells = []
        for name in shown:
            values = [report.rates[name] for report in group if name in report.rates]
            cells.append(f"{values[0] if name == 'clock' else min(values):.3g}" if values else "-")
        rows.append([host, str(len(group)), *cells, "BAD" if host in bad else "ok"])
    return text_table(rows)


def _verdict(site: Site, ranks: Ranks, report: Report, bad_nodes: Path | None) -> int:
    """Rank 0 compares, prints and writes; all ranks get its exit code."""
    import torch.distributed as dist

    reports: list[Any] = [None] * ranks.world
    dist.all_gather_object(reports, report)

    def work() -> int:
        faults = judge(site, reports)
        code = EXIT_PREFLIGHT if faults else EXIT_OK
        print(table(reports, faults), flush=True)
        for fault in faults:
            print(f"error: {fault.host or 'network'}: {fault.text} (site {site.name})", file=sys.stderr)
        if bad_nodes is not None:
            try:
                names = sorted({fault.host for fault in faults if fault.host})
                write_atomic(bad_nodes, "".join(f"{name}\n" for name in names).encode())
            except OSError as error:
                print(f"error: cannot write {bad_nodes}: {error.strerror}", file=sys.stderr)
                code = EXIT_PREFLIGHT
        return code

    return places.on_first_rank(work)
