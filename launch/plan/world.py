"""Pretends to be rank 0 of many: a process group that talks to nobody, tensors that hold no numbers.

What is known before training is kept real: where leaves lie and which tokens are padding, all integers and flags.
So shapes that depend on them are right, and only floating point numbers are fake.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_LARGEST_REAL = 1 << 26  # integers made from nothing stay real up to this many, e.g. maps of a raster
_MASKED = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._unsafe_index_put.default,
    torch.ops.aten._index_put_impl_.default,
)


class RealIntegers(TorchDispatchMode):
    """Lies above FakeTensorMode: operations on real tensors alone are really done, numbers of fake ones are made up."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it really, or as a fake."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # first what it does to its local part, which comes here next
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _made_up(args[0].dtype)
        if not _talks(func) and tensors and not any(isinstance(t, FakeTensor) or t.is_meta for t in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func in _MASKED:
            args = (args[0], _numbered(args[1]), *args[2:])
        out = func(*args, **kwargs)
        if not tensors and isinstance(out, FakeTensor) and _stays_real(out):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return out


def _made_up(dtype: torch.dtype) -> Any:
    """A number that stops nothing: norms and losses are finite, nothing overflows, no draw is repeated."""
    if dtype == torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 1


def _stays_real(out: FakeTensor) -> bool:
    return not out.dtype.is_floating_point and out.device.type == "cpu" and out.numel() <= _LARGEST_REAL


def _talks(func: Any) -> bool:
    return str(func._schema.name).startswith(("c10d", "_c10d"))


def _numbered(indices: Any) -> list[Any]:
    """Flags among indices as the numbers of the set ones; a fake tensor cannot be picked from by flags."""
    out: list[Any] = []
    for index in indices:
        if isinstance(index, torch.Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            with unset_fake_temporarily():
                out += list(index.nonzero(as_tuple=True))
        else:
            out.append(index)
    return out


class CountedDDP(nn.Module):
    """DistributedDataParallel for fake tensors: its reducer is C++ and needs memory to point to.

    The same buckets by the same function of torch, in the order of the layers at first and in the order in which the
    gradients came from then on, each all-reduced when its last gradient is there; gradients are views into them.
    """

    def __init__(self, module: nn.Module, **_options: Any) -> None:
        super().__init__()
        self.module = module
        self._parameters_in_order = [p for p in module.parameters() if p.requires_grad]
        self._arrived: list[nn.Parameter] = []
        self._syncing = True
        self._settled = False
        self._make_buckets(list(reversed(self._parameters_in_order)))
        for parameter in self._parameters_in_order:
            parameter.register_post_accumulate_grad_hook(self._ready)

    def _make_buckets(self, parameters: list[nn.Parameter]) -> None:
        assign: Any = vars(dist)["_compute_bucket_assignment_by_size"]  # not in torch's typed interface
        limits = [vars(dist)["_DEFAULT_FIRST_BUCKET_BYTES"], 25 * 1024 * 1024]
        groups, _ = assign(parameters, limits, [False] * len(parameters))
        self.buckets: list[torch.Tensor] = []
        self._place: dict[nn.Parameter, tuple[int, torch.Tensor]] = {}
        self._size = [len(group) for group in groups]
        for number, group in enumerate(groups):
            members = [parameters[i] for i in group]
            flat = torch.zeros(sum(p.numel() for p in members), dtype=members[0].dtype, device=members[0].device)
            self.buckets.append(flat)
            parts = flat.split([p.numel() for p in members])
            for parameter, part in zip(members, parts, strict=True):
                self._place[parameter] = number, part.view(parameter.shape)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's; the buckets are laid out anew once the order of the gradients is known."""
        if self._arrived and not self._settled:
            self._make_buckets(self._arrived)
            self._settled = True
        if self._syncing:
            self._arrived, self._left = [], list(self._size)
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients stay on this rank inside the block."""
        self._syncing = False
        try:
            yield
        finally:
            self._syncing = True

    @torch.no_grad()
    def _ready(self, parameter: nn.Parameter) -> None:
        if not self._syncing:
            return
        self._arrived.append(parameter)
        number, view = self._place[parameter]
        assert parameter.grad is not None
        torch.mul(parameter.grad, 1 / dist.get_world_size(), out=view)
        parameter.grad = view
        self._left[number] -= 1
        if self._left[number] == 0:
            dist.all_reduce(self.buckets[number])


@contextmanager
def _forgetful_deepspeed() -> Iterator[None]:
    """DeepSpeed keeps process groups in module globals, where those of one pretended world would meet the next."""
    names = ("deepspeed.utils.groups", "deepspeed.comm.comm")
    kept = {name: dict(vars(sys.modules[name])) for name in names if name in sys.modules}
    copies = {name: {k: dict(v) for k, v in values.items() if type(v) is dict} for name, values in kept.items()}
    try:
        yield
    finally:
        for name, values in kept.items():
            vars(sys.modules[name]).update(values)
            vars(sys.modules[name]).update(copies[name])


@contextmanager
def _modules_stay() -> Iterator[None]:
    """Moving a module to a device does nothing: there is one, and torch cannot swap fake parameters."""
    real_to = nn.Module.to

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        dtype = torch._C._nn._parse_to(*args, **kwargs)[1]
        return module if dtype is None else real_to(module, *args, **kwargs)

    nn.Module.to = to  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.to = real_to  # type: ignore[method-assign]


@contextmanager
def pretend(world: int) -> Iterator[None]:
    """Inside the block this process is rank 0 of `world`, floating point tensors are fake, and DDP is `CountedDDP`.

    Raises:
        RuntimeError: A process group is there already.
    """
    from launch.engines import ddp

    if dist.is_initialized():
        raise RuntimeError("a process group is there already; plan in a process of its own")
    kept_env = dict(os.environ)
    names = vars(ddp)
    real_ddp = names["DistributedDataParallel"]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)  # type: ignore[no-untyped-call]
    try:
        names["DistributedDataParallel"] = CountedDDP
        with _forgetful_deepspeed(), _modules_stay(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with FakeTensorMode(allow_non_fake_inputs=True), RealIntegers():
                yield
    finally:
        names["DistributedDataParallel"] = real_ddp
        dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(kept_env)
