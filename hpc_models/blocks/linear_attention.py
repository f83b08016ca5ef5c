"""Attention whose cost grows linearly with the number of tokens: Performer and Nystrom.

Choromanski et al.: Rethinking Attention with Performers (2021); Xiong et al.: Nystromformer (2021). The arithmetic runs
in fp32 at any precision, since sums over thousands of tokens do not survive 16-bit numbers.

Shapes: q (B, H, L, d), k and v (B, H, M, d). A key mask (B, M) bool says which keys count; None counts all.
"""

from __future__ import annotations

import contextlib
import math
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_models.blocks.sdpa import merge_heads, note, split_heads

KERNELS = ("relu", "softmax")
RELU_LEAST = 1e-3  # keeps the sum over keys above zero where no feature is on
SOFTMAX_LEAST = 1e-4
PINV_STEPS = 6
RESIDUAL_KERNEL = 33


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast leaves arithmetic on the device of `x` alone."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()


def feature_count(head_width: int) -> int:
    """m = int(d ln d), at least 1: random features that approximate softmax for heads of width d."""
    return max(1, int(head_width * math.log(head_width)))


def orthogonal_features(features: int, head_width: int) -> Tensor:
    """(m, d) float32: random rows of length sqrt(d), orthogonal in blocks of d (Choromanski et al. 2021, section 2.4).

    Directions are uniform on the sphere, from torch's generator.
    """
    blocks = []
    for first in range(0, features, head_width):
        q, r = torch.linalg.qr(torch.randn(head_width, head_width))
        q = q * r.diagonal().sign()  # the factorisation's own sign rule would favour some directions
        blocks.append(q.t()[: features - first])
    return torch.cat(blocks) * math.sqrt(head_width)


def relu_features(x: Tensor, projection: Tensor) -> Tensor:
    """relu(P x / d^(1/4)) + 1e-3: (..., L, d) to (..., L, m)."""
    return F.relu((x * x.shape[-1] ** -0.25) @ projection.t()) + RELU_LEAST


def softmax_features(x: Tensor, projection: Tensor, query: bool, key_mask: Tensor | None = None) -> Tensor:
    """Positive features (B, H, L, m) with products of mean exp(q.k / sqrt(d)) (Choromanski et al. 2021, lemma 1).

    The largest exponent is taken off first, so that exp cannot overflow: per token for queries, per head for keys. It
    cancels in the normalisation.
    """
    x = x * x.shape[-1] ** -0.25
    dots = x @ projection.t()
    seen = dots if key_mask is None else dots.masked_fill(~key_mask[:, None, :, None], torch.finfo(dots.dtype).min)
    top = seen.amax(dim=-1 if query else (-1, -2), keepdim=True).detach()
    half_square = x.square().sum(-1, keepdim=True) / 2
    # The clamp: a masked key may lie above the maximum of the others, and must not overflow.
    positive = ((dots - top).clamp(max=0) - half_square).exp() + SOFTMAX_LEAST
    return positive / math.sqrt(projection.shape[0])


def kernel_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """sum_j (q_i.k_j) v_j / sum_j q_i.k_j without the L x L matrix: the sums over keys come first.

    q (B, H, L, m) and k (B, H, M, m) are positive features; keys that do not count are zero. Returns (B, H, L, d).
    """
    total = q @ k.sum(dim=-2, keepdim=True).transpose(-1, -2)
    # Features are positive: only a sequence without any valid key has a total of zero.
    return (q @ (k.transpose(-1, -2) @ v)) / total.clamp(min=torch.finfo(q.dtype).tiny)


def pseudo_inverse(matrix: Tensor, steps: int = PINV_STEPS) -> Tensor:
    """Moore-Penrose inverse of (..., n, n) by an iteration of matrix products (Xiong et al. 2021, equation 11).

    Each matrix starts from its own norms, so pictures of a batch do not influence each other.
    """
    size = matrix.abs()
    scale = size.sum(-1).amax(-1) * size.sum(-2).amax(-1)
    z = matrix.transpose(-1, -2) / scale.clamp(min=torch.finfo(matrix.dtype).tiny)[..., None, None]
    one = torch.eye(matrix.shape[-1], device=matrix.device, dtype=matrix.dtype)
    for _ in range(steps):
        az = matrix @ z
        z = 0.25 * z @ (13 * one - az @ (15 * one - az @ (7 * one - az)))
    return z


def nystrom_attention(q: Tensor, k: Tensor, v: Tensor, landmarks: int, key_mask: Tensor | None = None) -> Tensor:
    """Softmax attention from the means of consecutive tokens, the landmarks (Xiong et al. 2021, equation 13).

    Each of at most `landmarks` landmarks is the mean of ceil(L / landmarks) tokens. Returns (B, H, L, d).
    """
    # Pad to whole segments, and clear what does not count.
    b, length, width = q.shape[0], q.shape[2], q.shape[3]
    segment = -(-length // landmarks)
    short = -length % segment
    mask = torch.ones(b, length, dtype=torch.bool, device=q.device) if key_mask is None else key_mask
    mask = F.pad(mask, (0, short))[:, None]  # (B, 1, L')
    q, k, v = (F.pad(part, (0, 0, 0, short)).masked_fill(~mask[..., None], 0) for part in (q, k, v))
    # The mean of each segment's valid tokens.
    members = mask.unflatten(-1, (-1, segment)).sum(-1)  # (B, 1, n)
    present = members > 0
    q_mean, k_mean = (
        part.unflatten(-2, (-1, segment)).sum(-2) / members.clamp(min=1)[..., None] for part in (q * width**-0.5, k)
    )

    def weights(left: Tensor, right: Tensor, columns: Tensor) -> Tensor:
        scores = left @ right.transpose(-1, -2)
        return scores.masked_fill(~columns[..., None, :], torch.finfo(scores.dtype).min).softmax(-1)

    # Tokens to landmarks, landmarks to each other, landmarks to tokens.
    near = weights(q * width**-0.5, k_mean, present)
    middle = weights(q_mean, k_mean, present) * (present[..., None] & present[..., None, :])
    far = weights(q_mean, k, mask)
    return (near @ (pseudo_inverse(middle) @ (far @ v)))[:, :, :length]


class Performer(nn.Module):
    """Multi-head attention through fixed orthogonal random features, linear in the number of tokens.

    Kernel relu is steadier; softmax approximates softmax attention. `features` None is the authors' m = int(d ln d).

    Raises:
        ValueError: unknown kernel, or a width that the heads do not divide.
    """

    projection: Tensor

    def __init__(
        self, width: int, heads: int, kernel: str = "relu", features: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        _check_heads(width, heads)
        if kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
        self.heads, self.kernel, self.dropout = heads, kernel, dropout
        head_width = width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        # Saved with the weights: another draw would be another function, and a pretrained model must keep its own.
        self.register_buffer("projection", orthogonal_features(features or feature_count(head_width), head_width))

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """(B, L, D) to the same; False keys are not attended to."""
        note(f"performer {self.kernel}", x.device)
        dtype = x.dtype
        q, k, v = split_heads(self.qkv(x), self.heads)
        with full_precision(x):
            q, k, v = q.float(), k.float(), v.float()
            if key_mask is not None:
                k, v = (part.masked_fill(~key_mask[:, None, :, None], 0) for part in (k, v))
            projection = self.projection.float()
            if self.kernel == "relu":
                q, k = relu_features(q, projection), relu_features(k, projection)
            else:
                q, k = softmax_features(q, projection, True), softmax_features(k, projection, False, key_mask)
            if key_mask is not None:
                k = k.masked_fill(~key_mask[:, None, :, None], 0)
            y = kernel_attention(q, k, v)
        return F.dropout(self.out_proj(merge_heads(y).to(dtype)), self.dropout, self.training)


class Nystrom(nn.Module):
    """Multi-head Nystrom attention with the authors' residual: a convolution along the tokens of each head's values.

    Raises:
        ValueError: a width that the heads do not divide.
    """

    def __init__(self, width: int, heads: int, landmarks: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        _check_heads(width, heads)
        self.heads, self.landmarks, self.dropout = heads, landmarks, dropout
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.residual = nn.Conv2d(
            heads, heads, (RESIDUAL_KERNEL, 1), padding=(RESIDUAL_KERNEL // 2, 0), groups=heads, bias=False
        )
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, key_mask: Tensor | None = None, landmarks: int | None = None) -> Tensor:
        """(B, L, D) to the same; `landmarks` takes the place of the module's number for this call."""
        note("nystrom", x.device)
        dtype = x.dtype
        q, k, v = split_heads(self.qkv(x), self.heads)
        if key_mask is not None:
            v = v.masked_fill(~key_mask[:, None, :, None], 0)
        beside = self.residual(v)
        with full_precision(x):
            y = nystrom_attention(q.float(), k.float(), v.float(), landmarks or self.landmarks, key_mask)
        return F.dropout(self.out_proj(merge_heads(y + beside).to(dtype)), self.dropout, self.training)


def _check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"width {width} is not a multiple of heads {heads}")
