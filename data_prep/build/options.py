"""Says what a build can be asked for, and checks it before any slide is opened.

An option is declared once, as a field of `BuildOptions`. Command lines (`add_options`, `options_of`), token files
(`params`, `built_with`) and the words of `launch prep` (`words_of`) follow from the field. Nothing heavy (OpenSlide,
h5py) is imported, since every command's help reads this module.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from data_prep.edges import AUTO_PERCENT
from data_prep.system.powers_of_two import is_power_of_two

ALGORITHM = 3  # goes up when the same slide and parameters give other bytes, so that old token files are built again
MAX_TILE_PX = 16384  # regions of this side need about 1 GiB per rank
IN_MEMORY_PX = 4096  # frames up to this side are built in one step, unless they are to be cut into smaller regions
MAX_RESOLUTION = 1 << 20  # four times the largest slides that scanners make


class OptionError(ValueError):
    """An option that cannot work; one line says which, and what would work."""

    exit_code = 64


def _thresholds(text: str) -> Literal["auto"] | tuple[int, int]:
    if text == "auto":
        return "auto"
    try:
        low, high = (int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor LOW,HIGH such as 100,200") from error
    return low, high


def _percent(text: str) -> int:
    """A quantile such as 0.8 in hundredths, so that thresholds are found with integers."""
    try:
        hundredths = 100 * Fraction(text)
    except (ValueError, ZeroDivisionError):
        hundredths = Fraction(0)
    if hundredths.denominator != 1 or not 1 <= hundredths <= 99:
        raise argparse.ArgumentTypeError(f"{text!r} is no quantile in hundredths, 0.01 to 0.99")
    return int(hundredths)


def _option(
    help: str, default: Any = MISSING, *, kept: Literal["always", "changed", "never"] = "always", **more: Any
) -> Any:
    """A field whose metadata say how an option is written.

    `kept` says when a token file keeps it: always, if it differs from the default, or never. `more` are arguments of
    `add_argument`, and where they apply: `flag` (on the command line) and `key` (in token files), if not the name;
    `as_kept`, which makes what a token file keeps; `setting`, if a run's data section has this name and must agree;
    `heading`, if a group of the help begins here.
    """
    return field(default=default, metadata={"help": help, "kept": kept, **more})


@dataclass(frozen=True)
class BuildOptions:
    """Everything that decides the bytes of a token file, plus what does not: `tile_px` and `strict`.

    The help text of each field says what it is, with its unit. None leaves the choice to the build. `auto_percent` is
    in hundredths. `mask_classes` pairs names with class ids (None: left out), as `annotations.read_polygons` takes
    them.

    Raises:
        OptionError: They cannot work together; one line says why.
    """

    # In the order of the help.
    resolution: int = _option(
        "side of the frame in pixels, p times a power of two", metavar="R", setting=True, heading="frame and patches"
    )
    patch: int = _option("side of a patch in pixels, a power of two; also the smallest leaf", metavar="p", setting=True)
    patching: Literal["apf", "uniform"] = _option(
        "apf: adaptive quadtree; uniform: equal squares (default apf)", default="apf", setting=True
    )
    aspect: Literal["keep", "squash"] = _option(
        "keep: pad to the square; squash: stretch to it, as the paper's authors did (default keep)", default="keep"
    )
    length: int | None = _option(
        "tokens per slide, at least 4: split the square with most edges until L leaves are reached",
        default=None,
        metavar="L",
        heading="quadtree (apf only)",
    )
    split_value: int | None = _option(
        "instead of --length: split while a square holds more than v edge pixels (the paper's rule)",
        default=None,
        metavar="v",
    )
    blur: int | None = _option(
        "side of the Gaussian before Canny in pixels, odd, 1 for none "
        "(default by R: 3 up to 1K, 7 at 4K, 9 at 8K, 11 at 16K, 13 at 32K, 15 at 64K)",
        default=None,
        metavar="k",
    )
    thresholds: Literal["auto"] | tuple[int, int] = _option(
        "Canny thresholds. auto: from each slide's own gradients, also good on faint images; "
        "the paper: 100,200 (default auto)",
        default="auto",
        metavar="LOW,HIGH|auto",
        type=_thresholds,
        setting=True,
    )
    split_on: Literal["edges", "variance", "entropy"] = _option(
        "with --length: what counts in a square: its edges, or the variance or entropy of its luma "
        "times its pixels (default edges; the others need frames built in memory)",
        default="edges",
        setting=True,
        kept="changed",
    )
    auto_percent: int = _option(
        "with auto: the quantile of the slide's non-zero gradients that becomes HIGH (LOW is half of it), "
        f"0.01 to 0.99; lower finds more edges (default {AUTO_PERCENT / 100:.2f})",
        default=AUTO_PERCENT,
        flag="--auto-quantile",
        key="auto_quantile",
        as_kept=lambda percent: percent / 100,
        metavar="Q",
        type=_percent,
        kept="changed",
    )
    resample: Literal["mean", "cubic"] = _option(
        "how a leaf becomes p x p pixels: means of its cells, or OpenCV's bicubic interpolation, as in "
        "the paper's code (default mean; cubic needs frames built in memory)",
        default="mean",
        setting=True,
        kept="changed",
    )
    masks: Path | None = _option(  # noqa: RUF009
        "folder with a mask per slide, of the same name: .png, .tif, .tiff (same size, pixel "
        "value = class, 0 = background), or polygons, .xml (ImageScope, ASAP), .geojson (level-0 px)",
        default=None,
        kept="never",
        metavar="DIR",
        heading="annotation",
    )
    mask_kind: Literal["viable", "whole", "both"] | None = _option(
        "which of PAIP's masks to take (<slide>_whole.tif, <slide>_viable.tif, or layers of an XML): "
        "one of them as class 1, or both, whole tumour 1 and viable tumour 2",
        default=None,
        kept="changed",
    )
    mask_classes: tuple[tuple[str, int | None], ...] | None = _option(
        "class ids of polygons by name, as convert --class: class name, ImageScope layer number or "
        "colour #rrggbb; ID 0 erases, none leaves out; then every class needs one (default: by known "
        "names, see convert)",
        default=None,
        as_kept=dict,
        metavar="NAME=ID,...",
        type=str,
        kept="changed",
    )
    fov: Path | None = _option(  # noqa: RUF009
        "folder with a field of view per slide, found and read as masks are: where it is 0 "
        "(outside), nothing is scored or learned, e.g. around the round picture of a retina",
        default=None,
        as_kept=bool,
        metavar="DIR",
        setting=True,
        kept="changed",
    )
    classes: int = _option(
        "number of foreground classes, values 1..K of the masks (default 1)", default=1, metavar="K", setting=True
    )
    fit: Literal["budget", "drop"] = _option(
        "drop: the tree of --split-value, then random tokens dropped or duplicated to reach "
        "--length exactly, as the paper (default budget: never)",
        default="budget",
        heading="for comparison with the paper's code only",
    )
    packing: Literal["leaf", "strip"] = _option(
        "strip: tokens mix rows of p leaves, as the public code's reshape does; train with "
        "model.packing=strip, which puts them back (default leaf)",
        default="leaf",
    )
    seed: int = _option("seed of --fit drop (default 0)", default=0)
    tile_px: int | None = _option(
        "side of the regions of a frame that ranks share, rounded down to a power of two, at most "
        "64 x 64 regions: smaller needs less memory, larger reads less twice; never changes the result "
        "(default: frames up to 4096 at once, else 4096, or 8192 for 32K and more on up to 16 ranks)",
        default=None,
        kept="never",
        flag="--tile",
        metavar="PX",
        heading="",
    )
    strict: bool = _option(
        "refuse a slide with a tile that cannot be decoded (default: such tiles are white, and are "
        "listed in the token file and in the log)",
        default=False,
        kept="never",
    )

    def __post_init__(self) -> None:
        # The tree, and how leaves become patches.
        _check_grid(self)
        _check_rule(self)
        if self.split_on != "edges":
            _check_criterion(self)
        if self.resample != "mean":
            asked = f"--resample {self.resample}"
            if self.patching == "uniform":
                raise OptionError(f"{asked}: only with --patching apf; equal squares keep their pixels")
            _check_in_memory(asked, self)

        # The edges.
        if self.blur is not None and (self.blur < 1 or self.blur % 2 == 0):
            raise OptionError(f"--blur {self.blur}: must be an odd number of pixels, 1 for none")
        if self.thresholds != "auto":
            low, high = self.thresholds
            if not 0 <= low <= high:
                raise OptionError(f"--thresholds {low},{high}: must be LOW,HIGH with 0 <= LOW <= HIGH, or auto")
        asked = f"--auto-quantile {self.auto_percent / 100:g}"
        if not 1 <= self.auto_percent <= 99:
            raise OptionError(f"{asked}: must be 0.01 to 0.99")
        if self.auto_percent != AUTO_PERCENT and (self.patching == "uniform" or self.thresholds != "auto"):
            raise OptionError(f"{asked}: only with --patching apf and --thresholds auto")

        # Classes, memory and masks.
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
        """Classes that are counted while tokens are cut: K, and one more for pixels outside a field of view."""
        return self.classes + (self.fov is not None)

    def params(self, blur: int | None, low: int | None, high: int | None) -> dict[str, Any]:
        """The parameters as the token file keeps them, with the blur and Canny thresholds that were used.

        `blur` is None for uniform patching, `low` and `high` are None without edges.
        """
        edges = self.patching == "apf" and self.split_on == "edges"
        found = {
            "blur": blur,
            "thresholds": (self.thresholds if self.thresholds == "auto" else list(self.thresholds)) if edges else None,
            "seed": self.seed if self.fit == "drop" else None,
        }
        kept: dict[str, Any] = {"algorithm": ALGORITHM, "lo": low, "hi": high}
        for option in fields(self):
            value, meta = getattr(self, option.name), option.metadata
            if meta["kept"] == "always":
                kept[option.name] = found.get(option.name, value)
            elif meta["kept"] == "changed" and value and value != option.default:
                kept[meta.get("key", option.name)] = meta.get("as_kept", lambda same: same)(value)
        return kept


OPTIONS: dict[str, Field[Any]] = {option.name: option for option in fields(BuildOptions)}
SETTINGS = tuple(name for name, option in OPTIONS.items() if option.metadata.get("setting"))


def _flag(name: str) -> str:
    return str(OPTIONS[name].metadata.get("flag", f"--{name.replace('_', '-')}"))


def add_options(
    parser: argparse.ArgumentParser,
    names: Iterable[str] = tuple(OPTIONS),
    changed: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    grouped: bool = True,
) -> None:
    """Add options to a command's parser.

    Args:
        names: The options, in the order of the help.
        changed: Other arguments of `add_argument` for some options; `more_help` is added to the help.
        grouped: Put them under their headings.
    """
    groups: dict[str, Any] = {"": parser}
    kinds = get_type_hints(BuildOptions)
    heading, headings = "", {}
    for name in OPTIONS:
        headings[name] = heading = OPTIONS[name].metadata.get("heading", heading)
    for name in names:
        option = OPTIONS[name]
        heading = headings[name] if grouped else ""
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        own = {key: value for key, value in option.metadata.items() if key in ("help", "metavar", "type")}
        own |= {"required": True} if option.default is MISSING else {"default": option.default}
        own |= {} if "type" in own else _of_type(kinds[name])
        own |= (changed or {}).get(name, {})
        own["help"] += own.pop("more_help", "")
        groups[heading].add_argument(_flag(name), dest=name, **own)


def _of_type(kind: Any) -> dict[str, Any]:
    """Arguments of `add_argument` that follow from a field's type: a literal's choices, or the type itself."""
    if kind is bool:
        return {"action": "store_true"}
    first = kind if get_origin(kind) not in (Union, UnionType) else get_args(kind)[0]  # the other one is None
    return {"choices": get_args(first)} if get_origin(first) is Literal else {"type": first}


def options_of(args: argparse.Namespace, **changed: Any) -> BuildOptions:
    """The options that parsed arguments hold; `changed` replaces some. Raises OptionError if they clash."""
    values = {name: getattr(args, name) for name in OPTIONS if hasattr(args, name)}
    if isinstance(values.get("mask_classes"), str):
        values["mask_classes"] = tuple(class_ids(values["mask_classes"].split(","), "--mask-classes").items())
    return BuildOptions(**{**values, **changed})


def words_of(values: Mapping[str, Any], always: Sequence[str] = ()) -> list[str]:
    """The words of `build` that ask for these options, in their order, without defaults.

    `values` are options by name; None stands for the default. Options in `always` are named even with their default.
    """
    words: list[str] = []
    for name, value in values.items():
        if value is not None and (name in always or value != OPTIONS[name].default):
            words += [_flag(name), ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return words


def built_with(params: Mapping[str, Any], name: str) -> Any:
    """An option as a token file's parameters keep it, or its default."""
    value = params.get(name, OPTIONS[name].default)
    return tuple(value) if isinstance(value, list) else value


def class_ids(texts: Sequence[str], flag: str) -> dict[str, int | None]:
    """Class ids by name from texts such as Tumor=1, Ignore=none; `flag` is for the message.

    Raises:
        OptionError: A text is not NAME=ID with an ID from 0 to 255, or NAME=none.
    """
    classes: dict[str, int | None] = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        if not equals or not (value == "none" or (value.isdecimal() and int(value) <= 255)):
            raise OptionError(f"{flag} {text}: must be NAME=ID with an ID from 0 to 255, or NAME=none")
        classes[name] = None if value == "none" else int(value)
    return classes


def changed_parameter(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first requested parameter that differs, as `name old -> new`; thresholds found by `auto` do not count."""
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
    """Raise OptionError for fields of view without masks, or in the folder of the masks."""
    if not fov.is_dir():
        raise OptionError(f"--fov {fov}: no such folder")
    if masks is None:
        raise OptionError(f"--fov {fov}: only with --masks; it says where they count")
    if fov.resolve() == masks.resolve():
        raise OptionError(f"--fov {fov}: is the folder of --masks; it says where those count")


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


def _check_in_memory(asked: str, options: BuildOptions) -> None:
    tile_px = options.tile_px
    limit_px = IN_MEMORY_PX if tile_px is None else 1 << (tile_px.bit_length() - 1)
    if options.resolution > limit_px:
        why = f"at most {limit_px} pixels" + ("" if tile_px is None else f" with --tile {tile_px}")
        raise OptionError(f"{asked}: only frames built in memory, {why}, got --resolution {options.resolution}")
