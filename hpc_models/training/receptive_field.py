"""Effective receptive field: which input pixels the centre of a model's output map depends on.

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
    """The mean over `images` pictures of |d centre / d pixel|, summed over the input's channels: (H, W) float64.

    A pixel of the map has `pixel_px` pixels of the frame along a side.
    """

    map: Tensor
    images: int
    pixel_px: int = 1

    @property
    def profile_row(self) -> Tensor:
        """(H,): the sum over each row."""
        return self.map.sum(1)

    @property
    def profile_col(self) -> Tensor:
        """(W,): the sum over each column."""
        return self.map.sum(0)

    def support_hw(self) -> tuple[int, int]:
        """Height and width (px) of the smallest rectangle that holds every pixel with any influence."""
        sides = [(profile > 0).nonzero() for profile in (self.profile_row, self.profile_col)]
        height, width = (int(on.max() - on.min()) + 1 if len(on) else 0 for on in sides)
        return height * self.pixel_px, width * self.pixel_px

    def share_nonzero(self) -> float:
        """Share of the pixels with any influence."""
        return float((self.map > 0).double().mean())

    def std_hw(self) -> tuple[float, float]:
        """Standard deviation (px) along rows and columns of the map as a distribution; nan for a map of zeros."""
        spread = []
        for profile in (self.profile_row, self.profile_col):
            place = torch.arange(len(profile), dtype=torch.float64)
            weight = profile / profile.sum()
            mean = (weight * place).sum()
            spread.append(self.pixel_px * math.sqrt(float((weight * (place - mean) ** 2).sum())))
        return spread[0], spread[1]


def map_of(model: nn.Module, layer: str | None = None) -> MapOf:
    """A function from pictures (B, C, H, W) to a map (B, D, h, w).

    Without a layer the map is the model's `feature_map`, or its output. A layer gives a map, or tokens (B, N, D) in
    raster order, perhaps behind a class token. A layer norm does not serve: the sum of its channels never changes.

    Raises:
        ValueError: no such layer, or (when called) no map.
    """
    if layer is None:
        own = getattr(model, "feature_map", None)
        return own if callable(own) else lambda image: _as_map(model(image), image, type(model).__name__)
    at_layer = _output_of(model, layer)
    return lambda image: _as_map(at_layer(image), image, f"layer {layer!r}")


def _output_of(model: nn.Module, layer: str) -> Callable[[Tensor | Batch], Tensor]:
    """The output of a layer when the model runs."""
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

    The model is in evaluation mode meanwhile. Its parameters get no gradients.

    Args:
        model: takes (1, C, H, W).
        images: pictures (C, H, W) of one size, on the model's device.
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
    """The field of a model of token sets, in pixels of the frame.

    The centre is the answer for the cell at the frame's centre, or a layer's vector for the token there. A cell is the
    mean of its frame pixels, so each pixel has the cell's gradient over their number.

    Args:
        model: takes a `Batch`.
        batches: token sets of one image each, on the model's device.
        size_px: side R of the frame.
        side: side of the map, a power of two of at most R.
        layer: submodule with output (1, N, D) of N tokens, perhaps behind a class token. None: the answers per cell.

    Raises:
        ValueError: no image, no token at the centre, or no answer per cell or token.
    """
    run = model if layer is None else _output_of(model, layer)

    def field_of(batch: Batch) -> Tensor:
        # Where is the token at the centre? A layer may leave padding out, so there is none.
        if layer is not None:
            on = batch["valid"][0]
            batch = Batch(**{k: v[:, on] for k, v in batch.items() if k != "label"})  # type: ignore[typeddict-item,index]
        tokens = batch["tokens"].detach().clone().requires_grad_()
        xy, leaf_px, valid, p = batch["leaf_xy"], batch["leaf_size"], batch["valid"], tokens.shape[2]
        middle = torch.full((1, 2), size_px // 2, device=xy.device)
        row = int(owner_of(middle, xy, leaf_px, valid)[0, 0])
        if row < 0:
            raise ValueError("no token covers the centre of the frame")
        # What the model, or the layer, answers there.
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
        # Its gradient, painted to the frame.
        (gradient,) = torch.autograd.grad(centre, tokens)
        pixels = (leaf_px / p).square().clamp(min=1)[..., None, None]
        values = gradient.abs().sum(-1) / pixels
        return paint(values[..., None], xy, leaf_px, valid, size_px, side)[0, 0].double()

    return _mean_field(model, batches, field_of, size_px // side)


def _mean_field(
    model: nn.Module, items: Iterable[Item], field_of: Callable[[Item], Tensor], pixel_px: int = 1
) -> Field:
    """Mean of the fields, with the model in evaluation mode."""
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
