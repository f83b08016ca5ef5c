"""Effective receptive field: which input pixels the centre of a model's output map depends on; imports torch only.

Luo et al.: Understanding the Effective Receptive Field (NeurIPS 2016); Taha et al. (MICCAI 2022), section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MapOf = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Field:
    """The mean over pictures of |d centre / d pixel|, summed over the input's channels.

    Attributes:
        map: (H, W) float64.
        images: number of pictures it is the mean of.
    """

    map: Tensor
    images: int

    @property
    def profile_row(self) -> Tensor:
        """(H,): one number per row of the picture, the sum over its columns."""
        return self.map.sum(1)

    @property
    def profile_col(self) -> Tensor:
        """(W,): one number per column, the sum over its rows."""
        return self.map.sum(0)

    def square_root(self) -> Tensor:
        """(H, W) in [0, 1]: the root of the map over its largest value, which shows what is weak but not zero."""
        top = self.map.max()
        return (self.map / top).sqrt() if top > 0 else self.map

    def support_hw(self) -> tuple[int, int]:
        """Height and width of the smallest rectangle that holds every pixel with any influence at all."""
        sides = [(profile > 0).nonzero() for profile in (self.profile_row, self.profile_col)]
        height, width = (int(on.max() - on.min()) + 1 if len(on) else 0 for on in sides)
        return height, width

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
            spread.append(math.sqrt(float((weight * (place - mean) ** 2).sum())))
        return spread[0], spread[1]


def map_of(model: nn.Module, layer: str | None = None) -> MapOf:
    """How to get a map from pictures: the model's `feature_map`, its own output if that is a map, or a layer's output.

    Args:
        model: takes (B, C, H, W).
        layer: name of a submodule, as in `named_modules`, whose output is asked for: (B, D, h, w), or tokens
            (B, N, D) in raster order, perhaps behind a class token. None: the model's own map.

    Returns:
        A function from (B, C, H, W) to (B, D, h, w).

    Raises:
        ValueError: no such layer, or (when called) no map.
    """
    if layer is None:
        own = getattr(model, "feature_map", None)
        return own if callable(own) else lambda image: _as_map(model(image), image, type(model).__name__)
    modules = dict(model.named_modules())
    if not layer or layer not in modules:
        raise ValueError(f"no layer {layer!r} in {type(model).__name__}; e.g. {', '.join(list(modules)[1:9])}")

    def at_layer(image: Tensor) -> Tensor:
        kept: list[Tensor] = []
        handle = modules[layer].register_forward_hook(lambda _module, _inputs, output: kept.append(output))
        try:
            model(image)
        finally:
            handle.remove()
        if not kept or not isinstance(kept[0], Tensor):
            raise ValueError(f"layer {layer!r} gave no tensor")
        return _as_map(kept[0], image, f"layer {layer!r}")

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
                return output[:, first:].transpose(1, 2).unflatten(2, (rows, tokens // rows))
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
    training = {module: module.training for module in model.modules()}
    model.eval()
    total: Tensor | None = None
    count = 0
    try:
        for image in images:
            if total is not None and total.shape != image.shape[-2:]:
                sizes = f"{tuple(total.shape)} and of {tuple(image.shape[-2:])}"
                raise ValueError(f"pictures of {sizes} px cannot be averaged")
            with torch.enable_grad():
                leaf = image.detach()[None].clone().requires_grad_()
                output = get_map(leaf)
                centre = output[0, :, output.shape[2] // 2, output.shape[3] // 2].sum()
                (gradient,) = torch.autograd.grad(centre, leaf)
            own = gradient[0].abs().double().sum(0).cpu()
            total = own if total is None else total + own
            count += 1
    finally:
        for module, was in training.items():
            module.training = was
    if total is None:
        raise ValueError("the receptive field needs at least one picture")
    return Field(total / count, count)
