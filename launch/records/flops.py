"""Tokens per second, FLOPs and model FLOPs utilisation of training steps."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from launch.config.sites import SITES, read_site

_GPU = re.compile(r"\b(?:MI|GH|GB|A|B|H|V)\d{3}[A-Z]?(?=\b|-)")

COUNT_EVERY = 50  # steps: their trees differ, and counting makes a step slower
_WITH_ADDEND = (torch.ops.aten.addmm, torch.ops.aten.baddbmm)  # their first argument is added, not multiplied


@shape_wrapper
def _sdpa(q: Any, k: Any, v: Any, *_args: Any, **_more: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


@shape_wrapper
def _sdpa_backward(grad: Any, q: Any, k: Any, v: Any, *_args: Any, **_more: Any) -> int:
    return int(sdpa_backward_flop_count(grad, q, k, v))


# Torch's formulas; it has none for attention on CPUs, which gets the formulas of the CUDA kernels.
FLOP_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
}


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the FLOPs of matrix products, convolutions and attention, two per multiply-accumulate.

    It sees the forward pass. The backward pass makes as many FLOPs again for either factor that needs a gradient.
    Images and tokens need none, so a first layer costs twice its forward pass, and others three times.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops, self.backward = 0, True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operation = func._overloadpacket
        formula = FLOP_FORMULAS.get(operation)
        if formula is not None:
            factors = args[1:3] if operation in _WITH_ADDEND else args[:2]
            self.flops += self._passes(*factors) * formula(*args, **kwargs, out_val=out)
        return out

    def _passes(self, *factors: torch.Tensor) -> int:
        if not self.backward:
            return 1
        needing = sum(factor.requires_grad for factor in factors)
        if torch.is_grad_enabled():
            return 1 + needing
        # Inside a function with its own backward pass, such as DeepSpeed's linear maps, only its arguments
        # and their views say whether they need a gradient.
        needing += sum(not it.requires_grad and it._base is not None and it._base.requires_grad for it in factors)
        return 1 + (needing or 2)


def peak_tflops(device: str, precision: str) -> float | None:
    """Dense matrix peak in fp32 or bf16 of the gpu that torch calls `device`, from the site files; None if unknown."""
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

    The FLOPs of a step are those of its forward passes and of what their backward passes need; recomputation is not
    counted. The first step of a start and every `COUNT_EVERY`-th step are counted. A counted step stands for all up to
    the next one, so with sequences of uneven length the sum is an estimate. It is over all ranks; ranks that share
    sequences each count what all of them do.

    Args:
        peak_tflops: Peak of one gpu; None leaves the utilisation out.
        world: Number of ranks.
        again: Count after the first step too; compiled blocks then run uncompiled in counted steps.
        total: Sums one number over the ranks; all ranks call it at the end of a counted step.
    """

    def __init__(
        self, peak_tflops: float | None, world: int = 1, again: bool = True, total: Callable[[float], float] = float
    ) -> None:
        self._peak, self._world, self._again, self._total = peak_tflops, world, again, total
        self._tokens = 0
        self._steps = self._done = 0  # of this start, and of the run
        self._counter: _Counter | None = None
        self._of_step = 0.0
        self.flops = 0.0

    @property
    def counting(self) -> bool:
        """Whether the current or last step is counted."""
        return self._counter is not None

    def begin(self, batch: dict[str, torch.Tensor]) -> None:
        """A step begins on this rank's batch, which is still on the CPU."""
        counted = self._steps % COUNT_EVERY == 0 if self._again else self._steps == 0
        self._counter = _Counter() if counted else None
        self._steps += 1
        self._tokens = int(batch["valid"].sum()) if "valid" in batch else 0

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Surrounds one forward pass."""
        if self._counter is None:
            yield
            return
        # A compiled block would hide its operations.
        with torch.compiler.set_stance("force_eager"), self._counter:
            yield

    @contextmanager
    def no_backward(self) -> Iterator[None]:
        """Surrounds the part of a forward pass that needs no backward pass."""
        if self._counter is None:
            yield
            return
        self._counter.backward = False
        try:
            yield
        finally:
            self._counter.backward = True

    def stepped(self) -> None:
        """The step is done; every rank must call it."""
        if self._counter is not None:
            self._of_step = self._total(self._counter.flops)
        self.flops += self._of_step
        self._done += 1

    def end(self, seconds: float) -> dict[str, float]:
        """What metrics.jsonl keeps of a step of so many seconds, without unknown numbers."""
        found = {"tps": self._tokens / seconds} if self._tokens else {}
        mfu = self.mfu(seconds)
        return found if mfu is None else {**found, "mfu(%)": 100 * mfu}

    def mfu(self, seconds_per_step: float) -> float | None:
        """Share of the peak; None when the peak is unknown, or before the first step."""
        if self._peak is None or not self.flops:
            return None
        return self.flops / self._done / (seconds_per_step * self._peak * self._world * 1e12)

    def resume(self, flops: float, steps: int) -> None:
        """Go on from a checkpoint: FLOPs of so many steps."""
        self.flops, self._done = flops, steps
