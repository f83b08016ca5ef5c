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

#: Goes up when the same slide and parameters give other bytes, so that old token files are built again.

ALGORITHM = 3
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


def _option(help: str, kept: Literal["always", "changed", "never"] = "always", **more: Any) -> dict[str, Any]:
    """The metadata of a field: how an option is written.

    Args:
        help: What a command's help says of it.
        kept: When a token file keeps it: always, where it differs from the default, or never.
        more: `flag` on the command line and `key` in token files, where these are not the name; `as_kept`, a function
            that makes what a token file keeps; `setting` where a run's data section has one of this name, which files
            are held against; and arguments of `add_argument`.
    """
    return {"help": help, "kept": kept, **more}


# The option that begins a group in a command's help, and the group's heading; the last ones have none.
_HEADINGS = {
    "resolution": "frame and patches",
    "length": "quadtree (apf only)",
    "masks": "annotation",
    "fit": "for comparison with the paper's code only",
    "tile_px": "",
}


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
    resolution: int = field(
        metadata=_option("side of the frame in pixels, p times a power of two", metavar="R", setting=True)
    )
    patch: int = field(
        metadata=_option("side of a patch in pixels, a power of two; also the smallest leaf", metavar="p", setting=True)
    )
    patching: Literal["apf", "uniform"] = field(
        default="apf", metadata=_option("apf: adaptive quadtree; uniform: equal squares (default apf)", setting=True)
    )
    aspect: Literal["keep", "squash"] = field(
        default="keep",
        metadata=_option("keep: pad to the square; squash: stretch to it, as the paper's authors did (default keep)"),
    )
    length: int | None = field(
        default=None,
        metadata=_option(
            "tokens per slide, at least 4: split the square with most edges until L leaves are reached", metavar="L"
        ),
    )
    split_value: int | None = field(
        default=None,
        metadata=_option(
            "instead of --length: split while a square holds more than v edge pixels (the paper's rule)", metavar="v"
        ),
    )
    blur: int | None = field(
        default=None,
        metadata=_option(
            "side of the Gaussian before Canny in pixels, odd, 1 for none "
            "(default by R: 3 up to 1K, 7 at 4K, 9 at 8K, 11 at 16K, 13 at 32K, 15 at 64K)",
            metavar="k",
        ),
    )
    thresholds: Literal["auto"] | tuple[int, int] = field(
        default="auto",
        metadata=_option(
            "Canny thresholds. auto: from each slide's own gradients, also good on faint images; "
            "the paper: 100,200 (default auto)",
            metavar="LOW,HIGH|auto",
            type=_thresholds,
            setting=True,
        ),
    )
    split_on: Literal["edges", "variance", "entropy"] = field(
        default="edges",
        metadata=_option(
            "with --length: what is counted in a square, its edges, or the variance or entropy of its "
            "luma times its pixels (default edges; others for frames built in memory)",
            setting=True,
            kept="changed",
        ),
    )
    auto_percent: int = field(
        default=AUTO_PERCENT,
        metadata=_option(
            "of auto: quantile of the slide's non-zero gradients that becomes HIGH (LOW is half of it), "
            f"0.01 to 0.99; lower finds more edges (default {AUTO_PERCENT / 100:.2f})",
            flag="--auto-quantile",
            key="auto_quantile",
            as_kept=lambda percent: percent / 100,
            metavar="Q",
            type=_percent,
            kept="changed",
        ),
    )
    resample: Literal["mean", "cubic"] = field(
        default="mean",
        metadata=_option(
            "how a leaf becomes p x p pixels: means of its cells, or OpenCV's bicubic interpolation, "
            "as the paper's code (default mean; cubic for frames built in memory)",
            setting=True,
            kept="changed",
        ),
    )
    masks: Path | None = field(
        default=None,
        metadata=_option(
            "folder with a mask per slide, of the same name: .png, .tif, .tiff (same size, pixel "
            "value = class, 0 = background), or polygons, .xml (ImageScope, ASAP), .geojson (level-0 px)",
            kept="never",
            metavar="DIR",
        ),
    )
    mask_kind: Literal["viable", "whole", "both"] | None = field(
        default=None,
        metadata=_option(
            "of whole and viable tumour, as PAIP has them (<slide>_whole.tif, <slide>_viable.tif, or "
            "layers of an XML): one of them as class 1, or both, whole 1 and viable 2",
            kept="changed",
        ),
    )
    mask_classes: tuple[tuple[str, int | None], ...] | None = field(
        default=None,
        metadata=_option(
            "class ids of polygons by name, as convert --class: class name, ImageScope layer number or "
            "colour #rrggbb; ID 0 erases, none leaves out; then every class needs one (default: by known "
            "names, see convert)",
            as_kept=dict,
            metavar="NAME=ID,...",
            type=str,
            kept="changed",
        ),
    )
    fov: Path | None = field(
        default=None,
        metadata=_option(
            "folder with a field of view per slide, found and read as masks are: where it is 0 "
            "(outside), nothing is scored or learned, e.g. around the round picture of a retina",
            as_kept=bool,
            metavar="DIR",
            setting=True,
            kept="changed",
        ),
    )
    classes: int = field(
        default=1,
        metadata=_option(
            "number of foreground classes, values 1..K of the masks (default 1)", metavar="K", setting=True
        ),
    )
    fit: Literal["budget", "drop"] = field(
        default="budget",
        metadata=_option(
            "drop: the tree of --split-value, then random tokens dropped or duplicated to reach "
            "--length exactly, as the paper (default budget: never)"
        ),
    )
    packing: Literal["leaf", "strip"] = field(
        default="leaf",
        metadata=_option(
            "strip: tokens mix rows of p leaves, as the public code's reshape does; training puts "
            "them back, its own switch is model.packing=strip (default leaf)"
        ),
    )
    seed: int = field(default=0, metadata=_option("seed of --fit drop (default 0)"))
    tile_px: int | None = field(
        default=None,
        metadata=_option(
            "side of the regions of a frame that ranks share, rounded down to a power of two, at most "
            "64 x 64 regions: smaller needs less memory, larger reads less twice; never changes the result "
            "(default: frames up to 4096 at once, else 4096, or 8192 for 32K and more on up to 16 ranks)",
            kept="never",
            flag="--tile",
            metavar="PX",
        ),
    )
    strict: bool = field(
        default=False,
        metadata=_option(
            "refuse a slide with a tile that cannot be decoded (default: such tiles are white, and are "
            "listed in the token file and in the log)",
            kept="never",
        ),
    )

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
        headings[name] = heading = _HEADINGS.get(name, heading)
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
    """The options that parsed arguments hold; `changed` replaces some.

    Raises:
        OptionError: They cannot work.
    """
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
    """Refuse fields of view without masks, or in the folder of the masks.

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
