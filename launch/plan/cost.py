"""From the counts of a step and the facts of a site to seconds, and to whether the step fits.

Nothing is measured on the site: the rates come from its file, and every term has a name so that a wrong one can be
found. Compute is a roofline, operation by operation (Williams et al. 2009): a matrix product takes the longer of its
arithmetic and its traffic, everything else its traffic. Collectives follow Hockney's alpha-beta model with the ring's
volumes (Thakur et al. 2005).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.config.sites import Site

if TYPE_CHECKING:
    from launch.plan.ledger import Collective
    from launch.plan.step import Counts

GIB = 2**30
# Bytes that pass each rank, as a multiple of the tensor; also how often a ring's latencies are paid.
_VOLUME = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1, "broadcast": 1, "reduce": 1}


@dataclass(frozen=True)
class Cost:
    """Predicted time of a step."""

    matrix_s: float  # matrix products, convolutions, attention
    traffic_s: float  # all other operations, by their memory traffic
    launch_s: float  # the host starts kernels one by one, hidden behind large ones
    bandwidth_s: float  # collectives, their bytes
    latency_s: float  # collectives, their hops

    @property
    def compute_s(self) -> float:
        """The device's time."""
        return max(self.matrix_s + self.traffic_s, self.launch_s)

    @property
    def communication_s(self) -> float:
        """The network's time."""
        return self.bandwidth_s + self.latency_s

    @property
    def step_s(self) -> float:
        """Compute and communication, one after the other."""
        return self.compute_s + self.communication_s

    @property
    def overlapped_s(self) -> float:
        """The longer of the two, when one hides the other."""
        return max(self.compute_s, self.communication_s)


def cost(counts: Counts, site: Site) -> Cost:
    """Seconds of one step on a site."""
    expected = site.expected
    matrix_s = 0.0
    for (precision, flops, size), times in counts.matrix_operations.items():
        rate = expected.gemm_tflops.get(precision, expected.gemm_tflops["fp32"])  # type: ignore[call-overload]
        matrix_s += times * max(flops / (rate * 1e12), size / (expected.memory_gb_s * 1e9))
    other = sum(work.other_bytes for work in counts.work.values())
    bandwidth_s = latency_s = 0.0
    for collective in counts.collectives:
        by_bytes, by_hops = collective_s(collective, site)
        bandwidth_s += by_bytes
        latency_s += by_hops
    launch_s = counts.operations * site.hardware.launch_us * 1e-6
    return Cost(matrix_s, other / (expected.memory_gb_s * 1e9), launch_s, bandwidth_s, latency_s)


def collective_s(collective: Collective, site: Site) -> tuple[float, float]:
    """(seconds for the bytes, seconds for the hops) of one collective.

    The ranks of a group on one node share their ports: the ring enters and leaves each node once. Between nodes an
    all-reduce of NCCL and RCCL climbs a tree; other collectives go round the ring.
    """
    ranks = len(collective.ranks)
    if ranks == 1:
        return 0.0, 0.0
    nodes = len({rank // site.hardware.gpus_per_node for rank in collective.ranks})
    inner, outer = site.network.intra_node, site.network.inter_node
    per_node = math.ceil(ranks / nodes)
    gb_s = inner.gb_s if nodes == 1 else min(inner.gb_s, outer.gb_s * per_node) if per_node > 1 else outer.gb_s
    factor = _VOLUME[collective.kind]
    by_bytes = factor * (ranks - 1) / ranks * collective.size_bytes / (gb_s * 1e9)
    hops_between = math.ceil(math.log2(nodes)) if collective.kind == "all_reduce" else nodes - 1
    by_hops = factor * ((per_node - 1) * inner.latency_us + hops_between * outer.latency_us) * 1e-6
    return by_bytes, by_hops


def memory_gib(site: Site) -> float:
    """Memory that a rank may fill with tensors."""
    whole = site.hardware.memory_gib
    if whole is None:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB / site.hardware.gpus_per_node
    return whole - site.hardware.reserved_gib


def fits(counts: Counts, site: Site) -> bool:
    """Whether the peak leaves the site's reserve free."""
    return counts.peak_bytes / GIB <= memory_gib(site)


def summed(collectives: Sequence[Collective]) -> list[dict[str, object]]:
    """Number and bytes of the collectives by kind and size of the group, largest first."""
    rows: dict[tuple[str, int], list[int]] = {}
    for collective in collectives:
        rows.setdefault((collective.kind, len(collective.ranks)), []).append(collective.size_bytes)
    found = [(kind, ranks, len(sizes), sum(sizes)) for (kind, ranks), sizes in rows.items()]
    found.sort(key=lambda row: -row[-1])
    return [dict(zip(("kind", "ranks", "count", "bytes"), row, strict=True)) for row in found]
