"""U-Net and its tiled use: each token is a tile, whole rasters go through a sliding window; imports torch only.

The rival people really use. With widths (64, 128, 256, 512, 1024), norm "none" it is the U-Net of Ronneberger et al.
(2015) with padded convolutions.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpc_models.blocks.checkpointing import recompute
from hpc_models.blocks.init import set_prior
from hpc_models.blocks.std_conv import conv3x3
from hpc_models.tokens.batch import Batch
from hpc_models.tokens.pictures import on_tiles, pad_to

NORMS = ("instance", "batch", "none")


def norm2d(kind: str, channels: int) -> nn.Module:
    """The norm layer of a map, with weight and bias per channel.

    Args:
        kind: "instance", "batch" or "none".
        channels: C.

    Raises:
        ValueError: another kind.
    """
    if kind not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {kind!r}")
    if kind == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.Identity()


class DoubleConv(nn.Module):
    """Two 3x3 convolutions, each followed by norm and ReLU; a norm would undo a bias, so they have one or the other."""

    def __init__(self, in_channels: int, out_channels: int, norm: str, standardise: bool = False) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, 1, standardise, bias=norm == "none")
        self.norm1 = norm2d(norm, out_channels)
        self.conv2 = conv3x3(out_channels, out_channels, 1, standardise, bias=norm == "none")
        self.norm2 = norm2d(norm, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H, W)."""
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Up(nn.Module):
    """2x2 transposed convolution, joined with the skip, double convolution."""

    def __init__(self, in_channels: int, out_channels: int, norm: str, standardise: bool = False) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
        self.conv = DoubleConv(2 * out_channels, out_channels, norm, standardise)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """(N, C_in, h, w) and (N, C_out, 2h, 2w) to (N, C_out, 2h, 2w)."""
        return self.conv(torch.cat((skip, self.up(x)), dim=1))


class UNet(nn.Module):
    """U-Net on tiles.

    Args:
        in_channels: channels of a tile.
        classes: K.
        widths: channels per level, finest first.
        norm: "instance", "batch" (statistics then depend on which tiles share a rank) or "none".
        standardise: filters of the convolutions are brought to mean 0 and variance 1; see `StdConv2d`.
        normalise: map the input by (x - 0.5) / 0.5 first.
        checkpointing: recompute each level in the backward pass instead of keeping its activations.
        prior: expected share of foreground; sets the last bias to its logit. None leaves it as is.
    """

    task = "segmentation"
    inputs = ("tiles",)

    def __init__(
        self,
        in_channels: int = 3,
        classes: int = 1,
        widths: tuple[int, ...] = (16, 32, 64, 128, 256),
        norm: str = "instance",
        standardise: bool = False,
        normalise: bool = True,
        checkpointing: bool = False,
        prior: float | None = None,
    ) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"widths needs at least two levels, got {tuple(widths)}")
        if standardise and norm == "none":
            raise ValueError("standardise=True needs a norm: nothing else would set the scale of a map")
        channels = [in_channels, *widths]
        self.normalise = normalise
        self.checkpoint = checkpointing
        self.downs = nn.ModuleList(DoubleConv(a, b, norm, standardise) for a, b in pairwise(channels))
        up_channels = list(reversed(widths))
        self.ups = nn.ModuleList(Up(a, b, norm, standardise) for a, b in pairwise(up_channels))
        self.out = nn.Conv2d(widths[0], classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module is not self.out:
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        set_prior(self.out.bias, prior)

    def set_checkpointing(self, on: bool) -> None:
        """Switch activation checkpointing; results do not change."""
        self.checkpoint = on

    def fsdp_units(self) -> list[nn.Module]:
        """Modules to shard one by one, in forward order; what is left belongs to the root."""
        return [*self.downs, *self.ups]

    def forward(self, batch: Batch | Tensor) -> Tensor:
        """Per-cell logits of every token, each token an image of its own: (B, L, p, p, K).

        A tensor is taken as `forward_image` takes it, so that wrappers (which only see `forward`) serve both.
        """
        if isinstance(batch, Tensor):
            return self.forward_image(batch)
        return on_tiles(self, batch)

    def forward_image(self, image: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] to (N, K, H, W) logits.

        Sides that are no multiple of 2^(levels - 1) are padded by repeating the border, and cut again.
        """
        h, w = image.shape[-2:]
        multiple = 1 << (len(self.downs) - 1)
        x = (image - 0.5) / 0.5 if self.normalise else image
        x = pad_to(x, multiple)
        skips = []
        for i, down in enumerate(self.downs):
            x = recompute(self, down, x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for up, skip in zip(self.ups, reversed(skips[:-1]), strict=True):
            x = recompute(self, up, x, skip)
        return self.out(x)[..., :h, :w]


def _starts(side: int, window: int, overlap: float) -> list[int]:
    """First pixels of windows that cover [0, side): evenly spread, no step larger than window * (1 - overlap)."""
    if window >= side:
        return [0]
    stride = max(1, int(window * (1 - overlap)))
    count = math.ceil((side - window) / stride) + 1
    return [round(i * (side - window) / (count - 1)) for i in range(count)]


def _profile(side: int, weighting: str) -> Tensor:
    if weighting == "constant":
        return torch.ones(side)
    x = (torch.arange(side) + 0.5) / side - 0.5
    return torch.exp(-0.5 * (x / 0.125) ** 2).clamp(min=1e-3)


@torch.no_grad()
def sliding_window(
    model: nn.Module,
    image: Tensor,
    window: int,
    overlap: float = 0.25,
    batch: int = 4,
    weighting: str = "gaussian",
    wanted: Tensor | None = None,
) -> Tensor:
    """Logits of a whole image from overlapping windows, averaged by weight.

    Args:
        model: maps (N, C, h, w) to (N, K, h, w) logits.
        image: (C, H, W), any size; a side shorter than the window is taken whole.
        window: side of a window in pixels.
        overlap: share of the window that neighbours have in common, in [0, 1).
        batch: windows per forward pass.
        weighting: "gaussian" (sigma = window / 8: the border of a window, which sees least context, counts least) or
            "constant".
        wanted: (H, W) bool, pixels whose logits matter: windows without any are left out; None: all matter.

    Returns:
        (K, H, W) float32 on the device of the image; 0 where no window was.

    Raises:
        ValueError: overlap or weighting out of range.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must lie in [0, 1), got {overlap}")
    if weighting not in ("gaussian", "constant"):
        raise ValueError(f"weighting must be gaussian or constant, got {weighting!r}")
    h, w = image.shape[-2:]
    wh, ww = min(window, h), min(window, w)
    if (wh, ww) == (h, w):
        return model(image[None])[0].float()
    corners = [(y, x) for y in _starts(h, wh, overlap) for x in _starts(w, ww, overlap)]
    if wanted is not None:
        corners = [(y, x) for y, x in corners if wanted[y : y + wh, x : x + ww].any()] or corners[:1]
    weight = (_profile(wh, weighting)[:, None] * _profile(ww, weighting)).to(image.device)
    total: Tensor | None = None
    norm = torch.zeros(h, w, device=image.device)
    for i in range(0, len(corners), batch):
        part = corners[i : i + batch]
        logits = model(torch.stack([image[:, y : y + wh, x : x + ww] for y, x in part])).float()
        if total is None:
            total = logits.new_zeros(logits.shape[1], h, w)
        for (y, x), z in zip(part, logits, strict=True):
            total[:, y : y + wh, x : x + ww] += z * weight
            norm[y : y + wh, x : x + ww] += weight
    assert total is not None
    return total / norm.clamp(min=torch.finfo(norm.dtype).tiny)
