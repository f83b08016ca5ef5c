"""What a build is asked to do: the parameters of a token file, checked before any slide is opened.

Must not import anything heavy (no OpenSlide, no h5py): the command line reads it to print its help.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

#: Goes up when the same slide and parameters give other bytes, so that old token files are built again.
from data_prep.edges import AUTO_PERCENT
from data_prep.system.powers_of_two import is_power_of_two

ALGORITHM = 3
MAX_TILE_PX = 16384  # regions of this side need about 1 GiB per rank
IN_MEMORY_PX = 4096  # frames up to this side are built in one step, unless they are to be cut into smaller regions
MAX_RESOLUTION = 1 << 20  # four times the largest slides that scanners make


class OptionError(ValueError):
    """An option that cannot work; one line that says which and what would."""


@dataclass(frozen=True)
class BuildOptions:
    """Everything that decides the bytes of a token file, plus the tile side, which does not.

    Attributes:
        resolution: R, side of the frame in pixels.
        patch: p, side of a patch; R / p is a power of two.
        patching: `apf` (quadtree) or `uniform` (equal squares).
        length: L, leaves of the budget rule; None with `split_value` or `uniform`. With fit=drop, the tokens kept.
        split_value: v of the threshold rule: split while a square holds more than v edge pixels.
        blur: Side of the Gaussian in pixels (odd, 1 = none); None takes the entry of the table for R.
        thresholds: Canny thresholds (low, high), or `auto`.
        auto_percent: Of `auto`: the share of a slide's non-zero gradients that the higher threshold reaches, 1 to 99.
        aspect: `keep` (padding) or `squash` (to a square).
        fov: Folder of fields of view, found and read as masks are: where one is 0, nothing is scored or learned. None:
            everywhere.
        split_on: What makes a square worth splitting: its `edges`, or `variance` or `entropy` of its luma (see
            `criteria`; budget rule and frames in memory only).
        resample: How a leaf's pixels become p x p: `mean` of every cell, or OpenCV's `cubic` interpolation as in the
            authors' public code, which looks at 4 x 4 pixels of a cell however many it has (frames in memory only).
        fit: `budget` (exactly the tree's leaves) or `drop` (the paper: the tree of `split_value`, then random drop or
            duplicate to `length`).
        packing: `leaf` (token i = leaf i) or `strip` (rows mixed as in the authors' public code).
        classes: K, foreground classes of the masks, ids 1..K.
        seed: Seed of `fit=drop`.
        masks: Folder of mask images or annotations with the slides' stems, or None.
        tile_px: Side of the regions that ranks work on, rounded down to a power of two; changes memory and speed, never
            bytes. None: chosen for the frame.
        strict: Refuse a slide with a tile that cannot be decoded instead of filling it; never changes bytes.
        mask_kind: Of whole and viable tumour (PAIP): `viable` or `whole` as class 1, `both` as 1 and 2; None takes the
            only mask there is.
        mask_classes: Class ids (None: left out) of polygons by name, as `annotations.read_polygons` takes them; None
            goes by the names that it knows.
    """

    resolution: int
    patch: int
    patching: Literal["apf", "uniform"] = "apf"
    length: int | None = None
    split_value: int | None = None
    blur: int | None = None
    thresholds: Literal["auto"] | tuple[int, int] = "auto"
    aspect: Literal["keep", "squash"] = "keep"
    fit: Literal["budget", "drop"] = "budget"
    packing: Literal["leaf", "strip"] = "leaf"
    classes: int = 1
    seed: int = 0
    masks: Path | None = None
    tile_px: int | None = None
    strict: bool = False
    mask_kind: Literal["viable", "whole", "both"] | None = None
    mask_classes: tuple[tuple[str, int | None], ...] | None = None
    split_on: Literal["edges", "variance", "entropy"] = "edges"
    auto_percent: int = AUTO_PERCENT
    fov: Path | None = None
    resample: Literal["mean", "cubic"] = "mean"

    def __post_init__(self) -> None:
        _check_grid(self)
        _check_rule(self)
        if self.split_on != "edges":
            _check_criterion(self)
        if self.resample != "mean":
            _check_resample(self)
        if self.blur is not None and (self.blur < 1 or self.blur % 2 == 0):
            raise OptionError(f"--blur {self.blur}: must be an odd number of pixels, 1 for none")
        if self.thresholds != "auto":
            low, high = self.thresholds
            if not 0 <= low <= high:
                raise OptionError(f"--thresholds {low},{high}: must be LOW,HIGH with 0 <= LOW <= HIGH, or auto")
        _check_auto(self)
        if not 1 <= self.classes <= 255:
            raise OptionError(f"--classes {self.classes}: must be 1 to 255")
        if self.tile_px is not None and not 64 <= self.tile_px <= MAX_TILE_PX:
            more = "; what a rank holds grows with its square" if self.tile_px > MAX_TILE_PX else ""
            raise OptionError(f"--tile {self.tile_px}: must be 64 to {MAX_TILE_PX} pixels{more}")
        if self.masks is not None and not self.masks.is_dir():
            raise OptionError(f"--masks {self.masks}: no such folder")
        if self.mask_kind is not None and self.masks is None:
            raise OptionError(f"--mask-kind {self.mask_kind}: only with --masks")
        if self.fov is not None:
            check_fov(self.fov, self.masks)
            if self.classes > 254:
                raise OptionError(f"--fov {self.fov}: leaves room for 254 classes, got --classes {self.classes}")
        for name, class_id in self.mask_classes or ():
            if self.masks is None:
                raise OptionError(f"--mask-classes {name}: only with --masks")
            if class_id is not None and class_id > self.classes:
                raise OptionError(f"--mask-classes {name}={class_id}: only classes 1..{self.classes}, see --classes")

    @property
    def counted(self) -> int:
        """Classes that are counted while tokens are cut: K, and K + 1 for what lies outside a field of view."""
        return self.classes + (self.fov is not None)

    def params(self, blur: int | None, low: int | None, high: int | None) -> dict[str, Any]:
        """The parameters as they are kept in the token file.

        Args:
            blur: Blur that was used; None for uniform patching.
            low: Lower Canny threshold that was used; None without edges.
            high: Upper Canny threshold that was used; None without edges.
        """
        thresholds = "auto" if self.thresholds == "auto" else list(self.thresholds)
        return {
            "algorithm": ALGORITHM,
            "resolution": self.resolution,
            "patch": self.patch,
            "patching": self.patching,
            "length": self.length,
            "split_value": self.split_value,
            "blur": blur,
            "thresholds": thresholds if self.patching == "apf" and self.split_on == "edges" else None,
            "lo": low,
            "hi": high,
            "aspect": self.aspect,
            "fit": self.fit,
            "packing": self.packing,
            "classes": self.classes,
            "seed": self.seed if self.fit == "drop" else None,
            **({"split_on": self.split_on} if self.split_on != "edges" else {}),
            **({"resample": self.resample} if self.resample != "mean" else {}),
            **({"auto_quantile": self.auto_percent / 100} if self.auto_percent != AUTO_PERCENT else {}),
            **({"mask_kind": self.mask_kind} if self.mask_kind else {}),
            **({"fov": True} if self.fov else {}),
            **({"mask_classes": dict(self.mask_classes)} if self.mask_classes else {}),
        }


def class_ids(texts: Sequence[str], flag: str) -> dict[str, int | None]:
    """Class ids by name from texts such as Tumor=1, Ignore=none.

    Args:
        texts: NAME=ID with an ID from 0 to 255 or none.
        flag: For the message.

    Raises:
        OptionError: Another form.
    """
    classes: dict[str, int | None] = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        if not equals or not (value == "none" or (value.isdecimal() and int(value) <= 255)):
            raise OptionError(f"{flag} {text}: must be NAME=ID with an ID from 0 to 255, or NAME=none")
        classes[name] = None if value == "none" else int(value)
    return classes


def changed_parameter(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first requested parameter that differs, as `name old -> new`; thresholds that `auto` found do not count."""
    for key in sorted(set(old) | set(new)):
        if key not in ("lo", "hi") and old.get(key) != new.get(key):
            return f"{key} {old.get(key)} -> {new.get(key)}"
    return None


def _check_grid(options: BuildOptions) -> None:
    size_px, patch = options.resolution, options.patch
    if not is_power_of_two(patch):
        raise OptionError(f"--patch {patch}: must be a power of two, e.g. 8 or 16")
    if size_px < patch:
        raise OptionError(f"--resolution {size_px}: must be at least --patch {patch}")
    if size_px % patch or not is_power_of_two(size_px // patch):
        near = patch << max(0, (size_px // patch).bit_length() - 1)
        raise OptionError(
            f"--resolution {size_px}: must be --patch {patch} times a power of two, e.g. {near} or {2 * near}"
        )
    if size_px > MAX_RESOLUTION:
        raise OptionError(f"--resolution {size_px}: must be at most {MAX_RESOLUTION} pixels; slides are never enlarged")


def check_fov(fov: Path, masks: Path | None) -> None:
    """Hold that fields of view have a folder of their own, beside one of masks.

    Raises:
        OptionError: One line with the folder.
    """
    if not fov.is_dir():
        raise OptionError(f"--fov {fov}: no such folder")
    if masks is None:
        raise OptionError(f"--fov {fov}: only with --masks; it says where they count")
    if fov.resolve() == masks.resolve():
        raise OptionError(f"--fov {fov}: is the folder of --masks; it says where those count")


def _check_auto(options: BuildOptions) -> None:
    percent = options.auto_percent
    if not 1 <= percent <= 99:
        raise OptionError(f"--auto-quantile {percent / 100:g}: must be 0.01 to 0.99")
    if percent != AUTO_PERCENT and (options.patching == "uniform" or options.thresholds != "auto"):
        raise OptionError(f"--auto-quantile {percent / 100:g}: only with --patching apf and --thresholds auto")


def _check_rule(options: BuildOptions) -> None:
    if options.patching == "uniform":
        for flag, value in (("--length", options.length), ("--split-value", options.split_value)):
            if value is not None:
                raise OptionError(f"{flag}: only with --patching apf; uniform patching always has (R/p)^2 tokens")
        if options.fit == "drop":
            raise OptionError("--fit drop: only with --patching apf, --split-value and --length")
    elif options.fit == "drop":
        if options.length is None or options.split_value is None:
            raise OptionError("--fit drop: needs --length L, the tokens kept, and --split-value v, the paper's tree")
    elif (options.length is None) == (options.split_value is None):
        given = "both" if options.length is not None else "neither"
        raise OptionError(f"apf needs exactly one of --length L and --split-value v, got {given}")
    if options.length is not None and options.length < 4:
        raise OptionError(f"--length {options.length}: must be at least 4, one split of the frame")
    if options.split_value is not None and options.split_value < 0:
        raise OptionError(f"--split-value {options.split_value}: must be 0 or more edge pixels")
    if options.seed < 0:
        raise OptionError(f"--seed {options.seed}: must be 0 or more")


def _check_criterion(options: BuildOptions) -> None:
    asked = f"--split-on {options.split_on}"
    if options.patching == "uniform":
        raise OptionError(f"{asked}: only with --patching apf; uniform patching splits nothing")
    if options.fit == "drop" or options.split_value is not None:
        raise OptionError(f"{asked}: only with --length; --split-value and --fit drop count edge pixels")
    if options.thresholds != "auto" or options.auto_percent != AUTO_PERCENT:
        flag = "--thresholds are" if options.thresholds != "auto" else "--auto-quantile is"
        raise OptionError(f"{asked}: {flag} of edges; leave it out")
    _check_in_memory(asked, options)


def _check_resample(options: BuildOptions) -> None:
    asked = f"--resample {options.resample}"
    if options.patching == "uniform":
        raise OptionError(f"{asked}: only with --patching apf; equal squares keep their pixels")
    _check_in_memory(asked, options)


def _check_in_memory(asked: str, options: BuildOptions) -> None:
    tile_px = options.tile_px
    limit_px = IN_MEMORY_PX if tile_px is None else 1 << (tile_px.bit_length() - 1)
    if options.resolution > limit_px:
        why = f"at most {limit_px} pixels" + ("" if tile_px is None else f" with --tile {tile_px}")
        raise OptionError(f"{asked}: only frames built in memory, {why}, got --resolution {options.resolution}")
