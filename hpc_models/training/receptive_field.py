"""Effective receptive field: which input pixels the centre of a model's output map depends on; imports torch only.

Luo et al.: Understanding the Effective Receptive Field (NeurIPS 2016); Taha et al. (MICCAI 2022), section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from hpc_models.tokens.batch import Batch
from hpc_models.tokens.geometry import owner_of, paint

MapOf = Callable[[Tensor], Tensor]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Field:
    """The mean over pictures of |d centre / d pixel|, summed over the input's channels.

    Attributes:
        map: (H, W) float64.
        images: number of pictures it is the mean of.
        pixel_px: pixels of the frame along a side of one of the map's.
    """

    map: Tensor
    images: int
    pixel_px: int = 1

    @property
    def profile_row(self) -> Tensor:
        """(H,): one number per row of the picture, the sum over its columns."""
        return self.map.sum(1)

    @property
    def profile_col(self) -> Tensor:
        """(W,): one number per column, the sum over its rows."""
        return self.map.sum(0)

    def support_hw(self) -> tuple[int, int]:
        """Height and width (px) of the smallest rectangle that holds every pixel with any influence at all."""
        sides = [(profile > 0).nonzero() for profile in (self.profile_row, self.profile_col)]
        height, width = (int(on.max() - on.min()) + 1 if len(on) else 0 for on in sides)
        return height * self.pixel_px, width * self.pixel_px

    def share_nonzero(self) -> float:
        """Share of the pixels with any influence."""
        return float((self.map > 0).double().mean())

    def std_hw(self) -> tuple[float, float]:
        """Standard deviation along rows and columns of the map read as a distribution, in pixels; nan if it is zero."""
        spread = []
        for profile in (self.profile_row, self.profile_col):
            place = torch.arange(len(profile), dtype=torch.float64)
            weight = profile / profile.sum()  # nan for a map of zeros
            mean = (weight * place).sum()
            spread.append(self.pixel_px * math.sqrt(float((weight * (place - mean) ** 2).sum())))
        return spread[0], spread[1]


def map_of(model: nn.Module, layer: str | None = None) -> MapOf:
    """How to get a map from pictures: the model's `feature_map`, its own output if that is a map, or a layer's output.

    Args:
        model: takes (B, C, H, W).
        layer: name of a submodule, as in `named_modules`, whose output is asked for: (B, D, h, w), or tokens
            (B, N, D) in raster order, perhaps behind a class token. None: the model's own map. Not a layer norm: its
            channels always have the same sum, so nothing seems to matter to it.

    Returns:
        A function from (B, C, H, W) to (B, D, h, w).

    Raises:
        ValueError: no such layer, or (when called) no map.
    """
    if layer is None:
        own = getattr(model, "feature_map", None)
        return own if callable(own) else lambda image: _as_map(model(image), image, type(model).__name__)
    at_layer = _output_of(model, layer)
    return lambda image: _as_map(at_layer(image), image, f"layer {layer!r}")


def _output_of(model: nn.Module, layer: str) -> Callable[[Tensor | Batch], Tensor]:
    """What a layer gives when the model is run."""
    modules = dict(model.named_modules())
    if not layer or layer not in modules:
        raise ValueError(f"no layer {layer!r} in {type(model).__name__}; e.g. {', '.join(list(modules)[1:9])}")

    def at_layer(inputs: Tensor | Batch) -> Tensor:
        kept: list[Tensor] = []
        handle = modules[layer].register_forward_hook(lambda _module, _inputs, output: kept.append(output))
        try:
            model(inputs)
        finally:
            handle.remove()
        if not kept or not isinstance(kept[0], Tensor):
            raise ValueError(f"layer {layer!r} gave no tensor")
        return kept[0]

    return at_layer


def _as_map(output: Tensor, image: Tensor, name: str) -> Tensor:
    if output.ndim == 4:
        return output
    if output.ndim == 3:
        height, width = image.shape[-2:]
        for first in (0, 1):  # without, then with a class token
            tokens = output.shape[1] - first
            rows = round(math.sqrt(tokens * height / width))
            if rows and tokens % rows == 0 and rows * width == tokens // rows * height:
                return cast(Tensor, output[:, first:].transpose(1, 2).unflatten(2, (rows, tokens // rows)))
    raise ValueError(
        f"{name} gives {tuple(output.shape)}, which is no map of a {image.shape[-2]} x {image.shape[-1]} picture; "
        "name a layer that has one"
    )


def effective_receptive_field(model: nn.Module, images: Iterable[Tensor], layer: str | None = None) -> Field:
    """Mean over pictures of the absolute gradient of the map's centre (all its channels) by the input.

    The model is in evaluation mode meanwhile, and put back. Its parameters get no gradients.

    Args:
        model: takes (1, C, H, W).
        images: pictures (C, H, W) of one size, on the model's device; taken one at a time.
        layer: see `map_of`.

    Raises:
        ValueError: no picture, pictures of different sizes, or see `map_of`.
    """
    get_map = map_of(model, layer)

    def field_of(image: Tensor) -> Tensor:
        leaf = image.detach()[None].clone().requires_grad_()
        output = get_map(leaf)
        centre = output[0, :, output.shape[2] // 2, output.shape[3] // 2].sum()
        (gradient,) = torch.autograd.grad(centre, leaf)
        return gradient[0].abs().double().sum(0)

    return _mean_field(model, images, field_of)


def token_field(model: nn.Module, batches: Iterable[Batch], size_px: int, side: int, layer: str | None = None) -> Field:
    """The same for a model of token sets, by the pixels of the frame that its tokens were made from.

    The centre is the answer for the cell at the frame's centre, or a layer's vector for the token there. A cell is the
    mean of its frame pixels, so each of them has the cell's gradient over their number.

    Args:
        model: takes a `Batch`.
        batches: token sets of one image each, on the model's device.
        size_px: side R of the frame.
        side: side of the map, a power of two of at most R; its pixels hold the mean of R / side by R / side.
        layer: submodule whose output (1, N, D) is asked for, N the tokens, perhaps behind a class token. None: the
            model's own answer per cell.

    Raises:
        ValueError: no image, no token at the centre, or no answer per cell or token.
    """
    run = model if layer is None else _output_of(model, layer)

    def field_of(batch: Batch) -> Tensor:
        if layer is not None:  # without padding: a model may leave it out, and rows must be countable
            on = batch["valid"][0]
            batch = Batch(**{k: v[:, on] for k, v in batch.items() if k != "label"})  # type: ignore[typeddict-item,index]
        tokens = batch["tokens"].detach().clone().requires_grad_()
        xy, leaf_px, valid, p = batch["leaf_xy"], batch["leaf_size"], batch["valid"], tokens.shape[2]
        middle = torch.full((1, 2), size_px // 2, device=xy.device)
        row = int(owner_of(middle, xy, leaf_px, valid)[0, 0])
        if row < 0:
            raise ValueError("no token covers the centre of the frame")
        inputs: Batch = {**batch, "tokens": tokens}
        output = run(inputs)
        if layer is None and output.ndim == 5:
            col, line = ((middle[0] - xy[0, row]) * p // leaf_px[0, row]).tolist()
            centre = output[0, row, line, col].sum()
        elif layer is not None and output.ndim == 3 and output.shape[1] - tokens.shape[1] in (0, 1):
            centre = output[0, row + output.shape[1] - tokens.shape[1]].sum()
        else:
            what = type(model).__name__ if layer is None else f"layer {layer!r}"
            raise ValueError(f"{what} gives {tuple(output.shape)}, no answer per token; name a layer that has one")
        (gradient,) = torch.autograd.grad(centre, tokens)
        pixels = (leaf_px / p).square().clamp(min=1)[..., None, None]
        values = gradient.abs().sum(-1) / pixels
        return paint(values[..., None], xy, leaf_px, valid, size_px, side)[0, 0].double()

    return _mean_field(model, batches, field_of, size_px // side)


def _mean_field(
    model: nn.Module, items: Iterable[Item], field_of: Callable[[Item], Tensor], pixel_px: int = 1
) -> Field:
    """Mean of the fields, the model in evaluation mode meanwhile."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    total: Tensor | None = None
    count = 0
    try:
        for item in items:
            with torch.enable_grad():
                own = field_of(item).cpu()
            if total is not None and total.shape != own.shape:
                sizes = f"{tuple(total.shape)} and of {tuple(own.shape)}"
                raise ValueError(f"pictures of {sizes} px cannot be averaged")
            total = own if total is None else total + own
            count += 1
    finally:
        for module, was in training.items():
            module.training = was
    if total is None:
        raise ValueError("the receptive field needs at least one picture")
    return Field(total / count, count, pixel_px)
