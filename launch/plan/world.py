"""Pretends to be rank 0 of many: a process group that talks to nobody, and tensors without numbers.

What is known before training stays real: places of leaves and padding, all integers and flags. So shapes that depend on
them are right, and only floating point numbers are fake.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_LARGEST_REAL = 1 << 26  # largest number of new integers that stay real, such as maps of a raster
_MASKED = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._unsafe_index_put.default,
    torch.ops.aten._index_put_impl_.default,
)


class RealIntegers(TorchDispatchMode):
    """Lies above FakeTensorMode: really runs operations on real tensors alone, and makes up numbers of fake ones."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # the operation on its local part comes here next
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _made_up(args[0].dtype)
        talks = func._schema.name.startswith(("c10d", "_c10d"))
        if not talks and tensors and not any(isinstance(t, FakeTensor) or t.is_meta for t in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func in _MASKED:
            args = (args[0], _numbered(args[1]), *args[2:])
        out = func(*args, **kwargs)
        if not tensors and isinstance(out, FakeTensor) and out.device.type == "cpu":
            if not out.dtype.is_floating_point and out.numel() <= _LARGEST_REAL:
                with unset_fake_temporarily():
                    return func(*args, **kwargs)
        return out


def _made_up(dtype: torch.dtype) -> Any:
    """A number that stops nothing: norms and losses are finite, nothing overflows, no draw is repeated."""
    if dtype == torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 1


def _numbered(indices: Any) -> list[Any]:
    """Flags among indices as the numbers of the set ones: fake tensors cannot be indexed by flags."""
    out: list[Any] = []
    for index in indices:
        if isinstance(index, torch.Tensor) and index.dtype == torch.bool and not isinstance(index, FakeTensor):
            with unset_fake_temporarily():
                out += list(index.nonzero(as_tuple=True))
        else:
            out.append(index)
    return out


class OneBucketDDP(nn.Module):
    """Stands for DistributedDataParallel, whose C++ reducer needs memory to point to.

    It is one term: a flat tensor as large as all gradients, into which each gradient moves when it is there. After the
    last one the flat tensor is all-reduced, in pieces of the sizes of torch's buckets.
    """

    def __init__(self, module: nn.Module, **_options: Any) -> None:
        super().__init__()
        self.module = module
        own = [p for p in reversed(list(module.parameters())) if p.requires_grad]
        sizes = [p.numel() for p in own]
        assign: Any = vars(dist)["_compute_bucket_assignment_by_size"]  # not in torch's typed interface
        groups, _ = assign(own, [vars(dist)["_DEFAULT_FIRST_BUCKET_BYTES"], 25 << 20], [False] * len(own))
        self.bucket = own[0].new_zeros(sum(sizes))
        self._pieces = self.bucket.split([sum(sizes[i] for i in group) for group in groups])
        self._syncing = True
        self._left = self._count = len(own)
        for parameter, part in zip(own, self.bucket.split(sizes), strict=True):
            parameter.register_post_accumulate_grad_hook(partial(self._ready, part.view(parameter.shape)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's."""
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
    def _ready(self, place: torch.Tensor, parameter: nn.Parameter) -> None:
        if not self._syncing:
            return
        assert parameter.grad is not None
        parameter.grad = torch.mul(parameter.grad, 1 / dist.get_world_size(), out=place)
        self._left -= 1
        if self._left == 0:
            self._left = self._count
            for piece in self._pieces:
                dist.all_reduce(piece)


@contextmanager
def _forgetful_deepspeed() -> Iterator[None]:
    """DeepSpeed keeps process groups in module globals, where one pretended world would meet the next."""
    names = ("deepspeed.utils.groups", "deepspeed.comm.comm")
    kept = {name: dict(vars(sys.modules[name])) for name in names if name in sys.modules}
    copies = {name: {k: dict(v) for k, v in values.items() if type(v) is dict} for name, values in kept.items()}
    try:
        yield
    finally:
        for name, values in kept.items():
            vars(sys.modules[name]).update(values)
            vars(sys.modules[name]).update(copies[name])


def _stay(module: nn.Module, *_args: Any, **_kwargs: Any) -> nn.Module:
    """In place of `Module.to`: there is one device, and torch cannot swap fake parameters."""
    return module


@contextmanager
def pretend(world: int) -> Iterator[None]:
    """Inside the block this process is rank 0 of `world`, floats are fake, and DDP is `OneBucketDDP`.

    Raises:
        RuntimeError: A process group is there already.
    """
    from launch.engines import ddp

    if dist.is_initialized():
        raise RuntimeError("a process group is there already; plan in a process of its own")
    kept_env = dict(os.environ)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)  # type: ignore[no-untyped-call]
    try:
        with (
            _forgetful_deepspeed(),
            patch.object(ddp, "DistributedDataParallel", OneBucketDDP),
            patch.object(nn.Module, "to", _stay),
            warnings.catch_warnings(action="ignore"),
            FakeTensorMode(allow_non_fake_inputs=True),
            RealIntegers(),
        ):
            yield
    finally:
        dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(kept_env)
