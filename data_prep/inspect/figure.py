"""Draws what the quadtree makes of a slide: six panels and a caption. matplotlib is loaded only to draw."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.build.options import BuildOptions, OptionError
from data_prep.inspect.look import SlideLook, look_at
from data_prep.system.files import write_atomic
from data_prep.tokens.ceiling import boundary_leaves

_INK = "#1b1f24"
_FAINT = "#6b7280"
_PADDING = "#eceff3"
_CLASS_COLOURS = ("#00a08a", "#e69f00", "#5b6bd5", "#c23b75", "#7a5195", "#3d85c6")
_WRONG = "#e5002b"
_MONTAGE_TOKENS = 4096


def inspect_slide(slide_path: Path, options: BuildOptions, out: Path, dpi: int = 200) -> str:
    """Draw one slide to `out` (.png or .pdf) and return the caption, one line.

    `options` are those of a build; `fit` and `packing` are ignored. `dpi` is dots per inch.

    Raises:
        SlideError: The slide or its mask cannot be read.
        OptionError: `out` has another suffix or cannot be written.
    """
    if out.suffix.lower() not in (".png", ".pdf"):
        raise OptionError(f"--out {out}: must end in .png or .pdf")
    look = look_at(slide_path, options)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_figure(look, out, dpi)
    except OSError as error:
        raise OptionError(f"--out {out}: cannot be written ({error.strerror})") from error
    return f"{out}: {caption(look)}"


def save_figure(look: SlideLook, out: Path, dpi: int) -> None:
    """Draw `look` and write it to `out` (.png or .pdf), whole or not at all. Raises OSError if it cannot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"font.size": 9, "text.color": _INK, "axes.edgecolor": "#c4cad3", "axes.linewidth": 0.6}):
        figure, axes = pyplot.subplots(2, 3, figsize=(11.7, 9.35))
        figure.subplots_adjust(left=0.012, right=0.988, top=0.895, bottom=0.07, wspace=0.035, hspace=0.135)
        panels = [_frame, _edges, _leaves, _sequence, _seen, _mask if look.truth is not None else _sizes]
        for letter, axis, panel in zip("abcdef", axes.flat, panels, strict=True):
            title, note = panel(axis, look)
            axis.set_title(f"({letter})  {title}", loc="left", fontsize=10.5, fontweight="bold", pad=18)
            axis.annotate(note, (0, 1), (0, 5), "axes fraction", "offset points", fontsize=8.5, color=_FAINT)
        figure.text(0.013, 0.972, look.name, fontsize=13, fontweight="bold", va="center")
        figure.text(0.013, 0.043, caption(look, " $\\cdot$ "), fontsize=9, va="center")
        figure.text(0.013, 0.019, _second_line(look, " $\\cdot$ "), fontsize=9, va="center", color=_FAINT)
        picture = io.BytesIO()
        kind = out.suffix.lower().lstrip(".")
        undated: dict[str, Any] = {"CreationDate": None} if kind == "pdf" else {"Software": None}
        figure.savefig(picture, dpi=dpi, format=kind, metadata=undated)
        pyplot.close(figure)
    write_atomic(out, picture.getbuffer())


def caption(look: SlideLook, dot: str = ", ") -> str:
    """Parameters and result in one line: R, p, rule, thresholds, leaves used, ceiling, leaves that a boundary cuts."""
    options, basis = look.options, look.basis
    used, full = len(look.token_set), (options.resolution // options.patch) ** 2
    parts = [f"R = {options.resolution}", f"p = {options.patch}"]
    if options.patching == "uniform":
        parts.append(f"uniform, {used:,} tokens")
    else:
        rule = f"L = {options.length:,}" if options.length is not None else f"v = {options.split_value}"
        kind = "auto " if options.thresholds == "auto" else ""
        seen = f"Canny {kind}{basis.lo}/{basis.hi}" if options.split_on == "edges" else options.split_on
        parts += [rule, f"{seen}, blur {basis.blur}"]
        of = f" of {options.length:,}" if options.length is not None else ""
        parts.append(f"{used:,}{of} leaves used, {full / used:.1f} x fewer than uniform ({full:,})")
    if options.fov is not None:
        width, height = look.token_set.content_wh
        share = look.token_set.content_counts.sum(dtype="int64") / (width * height)
        parts.append(f"field of view {100 * share:.0f} %")
    if look.ceiling:
        parts.append("ceiling Dice " + " / ".join(f"{value:.3f}" for value in look.ceiling))
    if (masks := look.token_set.mask_counts) is not None:
        mixed = boundary_leaves(masks, look.token_set.content_counts).sum()
        parts.append(f"boundary in {mixed:,} leaves")
    return dot.join(parts)


def _second_line(look: SlideLook, dot: str) -> str:
    width, height = look.size0_wh
    scale = 1.0 if look.options.aspect == "squash" else min(1.0, look.options.resolution / max(width, height))
    parts = [f"slide {width} x {height} px" + (f" at {look.mpp:.3f} um/px" if look.mpp else "")]
    parts.append("stretched to the frame" if look.options.aspect == "squash" else f"scale {scale:.3g}")
    if look.basis.edge_pixels is not None:
        area = look.token_set.content_wh[0] * look.token_set.content_wh[1]
        parts.append(f"{look.basis.edge_pixels:,} edge pixels ({100 * look.basis.edge_pixels / area:.1f} %)")
    parts.append(f"leaf sides {_span(look)}")
    return dot.join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Panels: each draws on its axis and returns title and note


def _picture(axis: Any, look: SlideLook, picture: NDArray[Any], **how: Any) -> None:
    """A square picture in frame coordinates; padding is shaded, so that nobody takes it for white glass."""
    size = look.shown_px
    axis.imshow(picture, extent=(0, size, size, 0), **{"interpolation": "antialiased", **how})
    width, height = look.content_wh
    if width < size:
        axis.fill_between([width, size], 0, size, color=_PADDING, linewidth=0)
    if height < size:
        axis.fill_between([0, width], height, size, color=_PADDING, linewidth=0)
    axis.set(xlim=(0, size), ylim=(size, 0), xticks=[], yticks=[])


def _frame(axis: Any, look: SlideLook) -> tuple[str, str]:
    _picture(axis, look, look.rgb)
    full_px, (width, height) = look.options.resolution, look.token_set.content_wh
    if look.mpp and look.options.aspect == "keep":
        _scale_bar(axis, look)
    padded = "" if (width, height) == (full_px, full_px) else f", content {width} x {height}"
    return "Slide in its frame", f"{full_px} x {full_px} px{padded}"


def _scale_bar(axis: Any, look: SlideLook) -> None:
    """A bar of a round length in um, about a fifth of the content wide."""
    um_per_px = (look.mpp or 0.0) * max(look.size0_wh) / max(look.content_wh)
    wanted_um = um_per_px * look.content_wh[0] / 5
    power = 10.0 ** math.floor(math.log10(wanted_um))
    length_um = max(step * power for step in (1, 2, 5) if step * power <= wanted_um)
    pad, y = 0.03 * look.shown_px, look.content_wh[1] - 0.04 * look.shown_px
    line = axis.plot([pad, pad + length_um / um_per_px], [y, y], color=_INK, linewidth=2.5, solid_capstyle="butt")
    text = f"{length_um:g} um" if length_um < 1000 else f"{length_um / 1000:g} mm"
    label = axis.text(pad, y - 0.012 * look.shown_px, text, va="bottom", fontsize=8.5, fontweight="bold")
    from matplotlib import patheffects

    for thing in [*line, label]:
        thing.set_path_effects([patheffects.withStroke(linewidth=4 if thing in line else 2.5, foreground="white")])


def _edges(axis: Any, look: SlideLook) -> tuple[str, str]:
    if look.edges is None:
        axis.axis("off")
        axis.set_box_aspect(1)
        axis.text(0.5, 0.5, "uniform patching looks at no edges", ha="center", color=_FAINT, transform=axis.transAxes)
        return "Edges", "none"
    _picture(axis, look, 1 - look.edges, cmap="gray", vmin=0, vmax=1)
    if look.options.split_on != "edges":
        what = "Deviation" if look.options.split_on == "variance" else "Entropy"
        return f"{what} of the luma", f"per smallest leaf, after {look.basis.blur} px Gaussian"
    title = "Edges" if look.edges.shape[0] == look.shown_px else "Edge density"
    return title, f"Canny {look.basis.lo}/{look.basis.hi} after {look.basis.blur} px Gaussian"


def _leaves(axis: Any, look: SlideLook) -> tuple[str, str]:
    from matplotlib.collections import LineCollection

    light = (255 - (255 - look.rgb.astype(np.float32)) * 0.8).astype(np.uint8)
    _picture(axis, look, light)
    factor = look.token_set.size_px / look.shown_px
    xy, side = look.token_set.leaf_xy / factor, look.token_set.leaf_size / factor
    sides = np.unique(look.token_set.leaf_size)[::-1]
    for size in sides:  # large first, so that the fine ones lie on top
        at = look.token_set.leaf_size == size
        x, y, s = xy[at, 0], xy[at, 1], side[at]
        # Top and left sides are enough: every line inside the frame is the top or left of some leaf.
        lines = np.concatenate([np.stack([x, y, x + s, y], 1), np.stack([x, y, x, y + s], 1)])
        width = float(np.clip(s[0] / look.shown_px * 16, 0.3, 0.95))
        segments = list(lines.reshape(-1, 2, 2))
        axis.add_collection(LineCollection(segments, colors=_depth_colour(size, look), linewidths=width))
    title = "Quadtree leaves" if look.options.patching == "apf" else "Uniform squares"
    return title, f"{len(look.token_set):,} leaves, {_span(look)}"


def _span(look: SlideLook) -> str:
    smallest, largest = int(look.token_set.leaf_size.min()), int(look.token_set.leaf_size.max())
    return f"{smallest} px" if smallest == largest else f"{smallest} to {largest} px"


def _depth_colour(side: int, look: SlideLook) -> Any:
    """Fine leaves dark violet, coarse ones light, so that the depth needs no legend."""
    from matplotlib import colormaps

    deepest = math.log2(look.options.resolution / look.options.patch)
    depth = math.log2(look.options.resolution / side)
    return colormaps["viridis"](1 - 0.95 * depth / max(1.0, deepest))


def _sequence(axis: Any, look: SlideLook) -> tuple[str, str]:
    tokens = look.token_set.tokens
    step = math.ceil(len(tokens) / _MONTAGE_TOKENS)
    shown = tokens[::step]
    columns = math.ceil(math.sqrt(len(shown)))
    rows, patch = math.ceil(len(shown) / columns), tokens.shape[1]
    gap = max(1, patch // 12)
    pitch = patch + gap
    sheet = np.full((columns * pitch + gap, columns * pitch + gap, 3), 255, np.uint8)
    for i, token in enumerate(shown):
        y, x = gap + (i // columns) * pitch, gap + (i % columns) * pitch
        sheet[y : y + patch, x : x + patch] = token
    axis.imshow(sheet, interpolation="antialiased")
    axis.set(xticks=[], yticks=[], xlim=(0, len(sheet)), ylim=(len(sheet), 0))
    for spine in axis.spines.values():
        spine.set_visible(False)
    every = "" if step == 1 else f"1 in {step} of "
    return "Token sequence", f"{every}{len(tokens):,} x {patch} x {patch} px, in Morton order ({rows} x {columns})"


def _seen(axis: Any, look: SlideLook) -> tuple[str, str]:
    _picture(axis, look, look.seen, interpolation="antialiased")
    return "What the model sees", "every leaf at p x p pixels, painted back"


def _mask(axis: Any, look: SlideLook) -> tuple[str, str]:
    from matplotlib.colors import to_rgb

    assert look.truth is not None and look.best is not None
    grey = look.rgb.mean(axis=2, keepdims=True).repeat(3, axis=2)
    picture = 255 - (255 - grey) * 0.6
    for k in range(look.options.classes):
        colour = 255 * np.array(to_rgb(_CLASS_COLOURS[k % len(_CLASS_COLOURS)]))
        at = look.truth == k + 1
        picture[at] = 0.5 * picture[at] + 0.5 * colour
    wrong = look.truth != look.best
    picture[wrong] = 255 * np.array(to_rgb(_WRONG))
    seen_in_part = look.outside is not None and bool(look.outside.any())
    if seen_in_part:
        picture[look.outside] = 255
    _picture(axis, look, picture.astype(np.uint8))
    ceiling = " / ".join(f"{value:.3f}" for value in look.ceiling or [])
    rest = "white: not scored" if seen_in_part else f"ceiling {ceiling}"
    return "Mask and what the tree cannot show", f"red: the majority of the cell is wrong, {rest}"


def _sizes(axis: Any, look: SlideLook) -> tuple[str, str]:
    side, count = np.unique(look.token_set.leaf_size, return_counts=True)
    area = side.astype(np.float64) ** 2 * count / look.options.resolution**2
    place = np.arange(len(side))
    axis.set_box_aspect(1)
    axis.axis("off")
    axis = axis.inset_axes((0.075, 0.085, 0.92, 0.9))
    axis.bar(place - 0.2, 100 * count / count.sum(), 0.38, color=[_depth_colour(s, look) for s in side])
    axis.bar(place + 0.2, 100 * area, 0.38, color="#d5dae1")
    for x, share, n in zip(place, count / count.sum(), count, strict=True):
        axis.text(x - 0.2, 100 * share + 1, f"{n:,}", ha="center", fontsize=7.5, color=_FAINT)
    axis.set_xticks(place, [str(s) for s in side])
    axis.set_xlabel("leaf side (px)", fontsize=8.5, labelpad=1)
    axis.set_ylim(0, 1.12 * max(100 * area.max(), 100 * count.max() / count.sum()))
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, length=2)
    return "Leaf sizes", "coloured: % of leaves, number on top; grey: % of the area"
