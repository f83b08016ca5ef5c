"""Softmax attention in three forms (whole, packed, windowed) on the fastest kernel at hand.

Attention notes which kernel ran: a speedup means nothing when one of two runs fell back to another kernel.

Shapes: q (B, H, L, d), k and v (B, H, M, d). A key mask (B, M) bool says which keys are attended to; None: all.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

KINDS = ("full", "packed", "window")
_NAMES = {
    SDPBackend.MATH.value: "math",
    SDPBackend.FLASH_ATTENTION.value: "flash",
    SDPBackend.EFFICIENT_ATTENTION.value: "mem_efficient",
    SDPBackend.CUDNN_ATTENTION.value: "cudnn",
    SDPBackend.OVERRIDEABLE.value: "vendor",
}
_used: set[str] = set()


def used() -> list[str]:
    """Kernels that attention has run on in this process since `reset_used`, e.g. ["sdpa flash (cpu)"]."""
    return sorted(_used)


def reset_used() -> None:
    """Forget which kernels ran."""
    _used.clear()


def note(name: str, device: torch.device) -> None:
    """Remember that attention, of whatever kind, ran on this kernel."""
    if device.type != "meta" and not torch.compiler.is_compiling():
        _used.add(f"{name} ({device.type})")


def _note_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> None:
    """Ask torch which kernel it will choose for these shapes, types and mask."""
    if q.is_meta or torch.compiler.is_compiling() or type(q) not in (Tensor, torch.nn.Parameter):
        return
    choice = torch._fused_sdp_choice(q, k, v, attn_mask=mask, dropout_p=dropout)
    note(f"sdpa {_NAMES.get(choice, str(choice))}", q.device)


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L, 3D) to q, k and v of (B, H, L, d)."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, L, d) to (B, L, D)."""
    return x.transpose(1, 2).flatten(2)


def attend(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, dropout: float = 0.0, bias: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for every head (Vaswani et al. 2017, equation 1): (B, H, L, d).

    `dropout` acts on the attention weights. `bias` (B, H, L, M) is added to the scaled scores.

    Raises:
        ValueError: both a bias and a key mask.
    """
    if bias is not None and key_mask is not None:
        raise ValueError("attention takes a bias or a key mask, not both")
    mask = bias if key_mask is None else key_mask[:, None, None, :]
    _note_sdpa(q, k, v, mask, dropout)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


def attend_packed(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, dropout: float = 0.0) -> Tensor:
    """Attention within each of several sequences that lie one after another; padding costs nothing.

    A GPU with 16-bit numbers does all sequences in one flash kernel, unless there is dropout, which the kernel lacks.
    Elsewhere each sequence is one call of `attend`, the fastest way on CPUs too.

    Args:
        q: (T, H, d), the tokens of all sequences; T is the sum of the lengths.
        k: (T, H, d).
        v: (T, H, d).
        lengths: (N,) int64.
        dropout: on the attention weights.

    Returns:
        (T, H, d).
    """
    # All sequences at once.
    if q.is_cuda and dropout == 0 and q.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn

        ends = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=q.device)
        ends[1:] = lengths.cumsum(0)
        longest = int(lengths.max())
        note("varlen", q.device)
        out = varlen_attn(q, k, v, ends, ends, longest, longest)
        assert isinstance(out, Tensor)
        return out
    # One by one.
    sizes = lengths.tolist()
    parts = []
    for one in zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        if len(one[0]):
            one_q, one_k, one_v = (part.transpose(0, 1)[None] for part in one)
            parts.append(attend(one_q, one_k, one_v, dropout=dropout)[0].transpose(0, 1))
    return torch.cat(parts) if parts else torch.zeros_like(q)


def attend_window(
    q: Tensor, k: Tensor, v: Tensor, window: int, key_mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Attention within windows of `window` consecutive tokens: (B, H, L, d).

    In Morton order a window is a compact piece of the frame. Queries of windows without any valid key get zeros.
    """
    b, n = q.shape[0], q.shape[2]
    short = -n % window
    # (B * windows, H, w, d)
    q, k, v = (
        F.pad(part, (0, 0, 0, short)).unflatten(2, (-1, window)).transpose(1, 2).flatten(0, 1) for part in (q, k, v)
    )
    mask = None
    if key_mask is not None or short:
        given = torch.ones(b, n, dtype=torch.bool, device=q.device) if key_mask is None else key_mask
        mask = F.pad(given, (0, short)).unflatten(1, (-1, window)).flatten(0, 1)
    empty = None if mask is None else ~mask.any(-1, keepdim=True)
    out = attend(q, k, v, None if mask is None or empty is None else mask | empty, dropout)
    if empty is not None:
        out = out.masked_fill(empty[:, None, :, None], 0)
    return cast(Tensor, out.unflatten(0, (b, -1)).transpose(1, 2).flatten(2, 3)[:, :, :n])
