"""Counts what one rank does in a block: memory by kind, collectives, FLOPs, bytes; on real and on fake tensors.

It sees every operation that reaches the dispatcher, after autograd and autocast.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launch.records.flops import FLOP_FORMULAS

KINDS = ("parameters", "gradients", "optimizer", "gathered", "activations")

# Name of the operation -> (its common name, index of the argument with the whole tensor, of the group).
_COLLECTIVES = {
    "c10d::allreduce_": ("all_reduce", 0, 1),
    "c10d::_allgather_base_": ("all_gather", 0, 2),
    "c10d::allgather_": ("all_gather", 0, 2),
    "c10d::allgather_into_tensor_coalesced_": ("all_gather", 0, 2),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1, 2),
    "c10d::reduce_scatter_": ("reduce_scatter", 1, 2),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1, 2),
    "c10d::alltoall_base_": ("all_to_all", 0, 2),
    "c10d::alltoall_": ("all_to_all", 0, 2),
    "c10d::broadcast_": ("broadcast", 0, 1),
    "c10d::reduce_": ("reduce", 0, 1),
    "_c10d_functional::all_reduce": ("all_reduce", 0, 2),
    "_c10d_functional::all_reduce_": ("all_reduce", 0, 2),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", -1, 2),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 0, 3),
    "_c10d_functional::all_to_all_single": ("all_to_all", 0, 3),
    "_c10d_functional::broadcast": ("broadcast", 0, 2),
    "_c10d_functional_autograd::all_to_all_single": ("all_to_all", 0, 3),
}
_QUIET = {"wait_tensor", "_wrap_tensor_autograd", "barrier"}  # they send nothing worth counting
# They reserve or name memory, but read and write nothing.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "set_", "resize_", "lift"}


@dataclass(frozen=True)
class Collective:
    """One collective."""

    kind: str  # all_gather, reduce_scatter, all_reduce, ...
    size_bytes: int  # of the whole tensor: what an all-gather returns, what a reduce-scatter takes
    ranks: tuple[int, ...]  # the global ranks of its group


@dataclass
class Arithmetic:
    """Operations of one precision."""

    flops: int = 0  # two per multiply-accumulate of matrix products, convolutions and attention
    matrix_bytes: int = 0  # read and written by operations that have FLOPs
    other_bytes: int = 0  # read and written by all others


@dataclass
class _Storage:
    """One piece of memory."""

    size_bytes: int
    kind: str
    ref: Any = None


class Ledger(TorchDispatchMode):
    """Counts what happens inside `with ledger:`."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []  # in the order they were started
        self.work: dict[str, Arithmetic] = {}  # by precision, fp32 or bf16
        self.operations = 0  # that read or write memory, about the number of kernels
        self.matrix_operations: dict[tuple[str, int, int], int] = {}  # how often each (precision, FLOPs, bytes) came
        self._live: dict[int, _Storage] = {}
        self._events: list[tuple[_Storage, int]] = []

    def hold(self, tensors: Any, kind: str) -> None:
        """Say what the memory of these tensors is for; new memory counts from now on."""
        for tensor in tree_leaves(tensors):
            for local in _locals(tensor):
                self._see(local.untyped_storage(), kind).kind = kind

    def _see(self, storage: torch.UntypedStorage, kind: str) -> _Storage:
        key = id(storage)
        block = self._live.get(key)
        if block is None:
            block = self._live[key] = _Storage(storage.nbytes(), kind)
            block.ref = weakref.ref(storage, partial(self._gone, key))
            self._events.append((block, block.size_bytes))
        return block

    def _gone(self, key: int, _ref: Any) -> None:
        block = self._live.pop(key, None)
        if block is not None:
            self._events.append((block, -block.size_bytes))

    def _resized(self, storage: torch.UntypedStorage) -> None:
        block = self._live.get(id(storage))
        if block is None:
            self._see(storage, "gathered")
        elif storage.nbytes() != block.size_bytes:
            block.kind = "gathered"
            self._events.append((block, storage.nbytes() - block.size_bytes))
            block.size_bytes = storage.nbytes()

    def peak(self, first_event: int = 0) -> tuple[int, dict[str, int]]:
        """Largest sum of live memory in bytes after event `first_event`, and what it was for at that moment."""
        now = dict.fromkeys(KINDS, 0)
        best, at_best = 0, dict(now)
        for index, (block, change) in enumerate(self._events):
            now[block.kind] += change
            if index >= first_event and sum(now.values()) > best:
                best, at_best = sum(now.values()), dict(now)
        return best, at_best

    def events(self) -> int:
        """Number of allocations and frees so far; a mark for `peak`."""
        return len(self._events)

    def start_counting(self) -> None:
        """Forget work and collectives of the warm-up, but keep the memory."""
        self.collectives, self.work, self.operations, self.matrix_operations = [], {}, 0, {}

    def __enter__(self) -> Ledger:
        # FSDP2 makes and frees gathered parameters by resizing storages, which no operation shows.
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = self._resize(storage, size)
            self._resized(storage)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # the operation on its local part comes here next
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        if name in _COLLECTIVES:
            self._collective(name, args, out)
        elif not name.startswith(("c10d", "_c10d")):
            self._operation(func, args, kwargs, out)
        elif name.partition("::")[2] not in _QUIET:
            raise NotImplementedError(f"collective {name} is not counted yet; add it to _COLLECTIVES")
        for tensor in tree_leaves(out):
            for local in _locals(tensor):
                self._see(local.untyped_storage(), "activations")
        return out

    def _collective(self, name: str, args: Any, out: Any) -> None:
        kind, whole, group = _COLLECTIVES[name]
        tensors = tree_leaves(out if whole < 0 else args[whole])
        size = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
        self.collectives.append(Collective(kind, size, _group_ranks(args[group])))
        if kind == "all_gather":
            self.hold(tensors, "gathered")

    def _operation(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        schema = func._schema
        if func._overloadpacket.__name__ in _FREE or _is_view(schema):
            return
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)] or _written(schema, args, kwargs)
        if not outputs:
            return
        moved = sum(map(_touched, inputs)) + sum(map(_touched, outputs))
        formula = FLOP_FORMULAS.get(func._overloadpacket)
        flops = int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0
        precision = "bf16" if outputs[0].dtype in (torch.bfloat16, torch.float16) else "fp32"
        work = self.work.setdefault(precision, Arithmetic())
        self.operations += 1
        if flops:
            work.flops += flops
            work.matrix_bytes += moved
            key = (precision, flops, moved)
            self.matrix_operations[key] = self.matrix_operations.get(key, 0) + 1
        else:
            work.other_bytes += moved

    @property
    def flops(self) -> int:
        """FLOPs of all precisions."""
        return sum(work.flops for work in self.work.values())


def _locals(value: Any) -> Iterator[torch.Tensor]:
    """The plain tensors that hold a tensor's memory: of a distributed one, this rank's shard."""
    if isinstance(value, torch.Tensor):
        local = getattr(value, "_local_tensor", value)
        if type(local) is not torch.Tensor or local.layout == torch.strided:
            yield local


def _touched(tensor: torch.Tensor) -> int:
    """Bytes that reading the tensor once moves; an expanded one is no larger than its storage."""
    size = tensor.numel() * tensor.element_size()
    return min(size, tensor.untyped_storage().nbytes()) if 0 in tensor.stride() else size


def _written(schema: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Arguments that an operation without results writes, as a fused optimiser does."""
    given = {**dict(zip((a.name for a in schema.arguments), args, strict=False)), **kwargs}
    named = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if given.get("grad_scale") is None:  # the optimiser writes gradients only to unscale them
        named = [name for name in named if name != "grads"]
    return [t for name in named for t in tree_leaves(given.get(name)) if isinstance(t, torch.Tensor)]


def _is_view(schema: Any) -> bool:
    infos = [r.alias_info for r in schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


def _group_ranks(group: Any) -> tuple[int, ...]:
    if isinstance(group, str):
        found = vars(dist.distributed_c10d)["_resolve_process_group"](group)
    elif isinstance(group, dist.ProcessGroup):
        found = group
    else:
        found = dist.ProcessGroup.unbox(group)
    return tuple(dist.get_process_group_ranks(found))
