"""Tokens per second, FLOPs and model FLOPs utilisation of steps; knows nothing of engines, files or schedules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from launch.plan.ledger import CPU_ATTENTION
from launch.sites import SITES, read_site

_GPU = re.compile(r"\b(?:MI|GH|GB|A|B|H|V)\d{3}[A-Z]?(?=\b|-)")


_FORMULAS: dict[Any, Callable[..., int]] = {**flop_registry, **CPU_ATTENTION}
COUNT_EVERY = 50  # steps; trees and parts of trees differ from step to step, and counting costs about as much as a step


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the FLOPs of matrix products, convolutions and attention, two for each multiply-accumulate."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


def peak_tflops(device: str, precision: str) -> float | None:
    """Dense matrix peak of a gpu, from the site files; None where none of them has it.

    Args:
        device: The name that torch has for it.
        precision: fp32 or bf16.
    """
    found = _GPU.search(device)
    if found is None:
        return None
    for path in sorted(SITES.glob("*.yaml")):
        hardware = read_site(path).hardware
        same = _GPU.search(hardware.gpu)
        if same and same.group() == found.group() and ("PCIe" in device) == ("PCIe" in hardware.gpu):
            return hardware.peak_tflops.get(precision)  # type: ignore[call-overload,no-any-return]
    return None


class Speed:
    """`tps`, FLOPs and `mfu(%)` of steps.

    The FLOPs of a step are three times those of its forward passes (two more for the backward pass; recomputing is not
    the model's work). They are counted in the first step of a start and every `COUNT_EVERY` steps, and the mean stands
    for all, so that with sequences of uneven length they are an estimate. With shared sequences this rank's share is
    counted.

    Args:
        peak_tflops: Peak of one gpu; None leaves the utilisation out.
        again: Not only in the first step; compiled blocks have to be run without their compilation for it.
    """

    def __init__(self, peak_tflops: float | None, again: bool = True) -> None:
        self._peak, self._again = peak_tflops, again
        self._tokens = self._forward_flops = self._counted = 0
        self._steps = 0
        self._counts = False

    def begin(self, batch: dict[str, torch.Tensor]) -> None:
        """A step begins on this rank's batch, which is still on the CPU."""
        self._counts = self._steps % COUNT_EVERY == 0 if self._again else self._steps == 0
        self._counted += self._counts
        self._steps += 1
        self._tokens = int(batch["valid"].sum()) if "valid" in batch else 0

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Surrounds one forward pass."""
        if not self._counts:
            yield
            return
        # A compiled block would hide its operations.
        with torch.compiler.set_stance("force_eager"), _Counter() as counter:
            yield
        self._forward_flops += counter.flops

    def end(self, seconds: float) -> dict[str, float]:
        """What metrics.jsonl keeps of a step that took so long, without what is not known."""
        found = {}
        if self._tokens:
            found["tps"] = self._tokens / seconds
        mfu = self.mfu(seconds)
        if mfu is not None:
            found["mfu(%)"] = 100 * mfu
        return found

    def mfu(self, seconds_per_step: float) -> float | None:
        """Share of the peak; None when that is not known, or before the first step."""
        if self._peak is None or not self._forward_flops:
            return None
        return self.flops_per_step / (seconds_per_step * self._peak * 1e12)

    @property
    def flops_per_step(self) -> float:
        """This rank's mean FLOPs of a step; 0 before the first."""
        return 3 * self._forward_flops / self._counted if self._counted else 0.0

    def notes(self) -> list[int]:
        """What a checkpoint keeps of it: FLOPs of the counted forward passes, and in how many steps."""
        return [self._forward_flops, self._counted]

    def resume(self, notes: list[int]) -> None:
        """Go on from what a checkpoint kept."""
        self._forward_flops, self._counted = notes
