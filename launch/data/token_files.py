"""Token files as a data set: the slides of each split, checked against the configuration, read and cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.build.log import read_log
from data_prep.build.options import SETTINGS, built_with
from data_prep.token_files.token_file import SUFFIX, StoreError, read_meta, read_tokens, token_names, token_path
from data_prep.tokens.paper_sequences import unpack_strip
from data_prep.tokens.token_set import TokenSet, positions, rebuild
from launch.config.config import ConfigError
from launch.config.data import DataConfig

SPLITS = ("train", "val", "test")
_HOW = "`python -m launch prep EXPERIMENT --slides FOLDER [--masks FOLDER]` makes the token files"


@dataclass(frozen=True)
class Raster:
    """A slide as plain pictures of its frame."""

    image: NDArray[np.uint8]  # (R, R, 3)
    masks: NDArray[np.bool_]  # (R, R, K)
    content: NDArray[np.bool_]  # (R, R), what is scored: inside the slide and inside its field of view
    content_wh: tuple[int, int]  # of the slide in the frame

    @cached_property
    def reach_wh(self) -> tuple[int, int]:
        """Width and height from the frame's top left to the last pixel that is scored."""
        height, width = (int(np.flatnonzero(self.content.any(axis))[-1]) + 1 for axis in (1, 0))
        return width, height

    @cached_property
    def foreground_pixels(self) -> NDArray[np.integer[Any]]:
        """Flat indices of the pixels that belong to any class."""
        return positions(self.masks.any(-1))


def read_split(config: DataConfig) -> dict[str, list[str]]:
    """Slide names of train, val and test in a folder or pack of token files.

    Raises:
        ConfigError: There are no token files, or see `split_of`.
    """
    folder = Path(config.dir)
    if not folder.is_dir():
        raise ConfigError(f"data.dir={config.dir}: no such folder; {_HOW}")
    try:
        there = token_names(folder)
    except StoreError as error:
        raise ConfigError(f"data.dir={config.dir}: {error}") from None
    if not there:
        raise ConfigError(f"data.dir={config.dir}: no *{SUFFIX} in it; {_HOW}")
    return split_of(config, there, "token file")


def split_of(config: DataConfig, there: list[str], item: str) -> dict[str, list[str]]:
    """The names of each split, from the split file or by a hash of each name that is there; `item` is what they name.

    Raises:
        ConfigError: A missing split file or item, a name in two splits, or an empty train or test split.
    """
    split = hash_split(there, config.fractions) if config.split is None else file_split(Path(config.split))
    names = [name for part in split.values() for name in part]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"data.split={config.split}: {twice[0]!r} is listed twice; splits must not overlap")
    missing = sorted(set(names) - set(there))
    if missing:
        raise ConfigError(f"data.dir={config.dir}: no {item} for {_some(missing)} of the split")
    for part in ("train", "test"):
        if not split[part]:
            key = f"split={config.split}" if config.split else f"fractions={list(config.fractions)}"
            raise ConfigError(f"data.{key}: no slide in {part} ({len(there)} {item}s in {config.dir})")
    return split


def split_digest(split: dict[str, list[str]]) -> str:
    """SHA-256 of the names in every split."""
    return hashlib.sha256(json.dumps(split, sort_keys=True).encode()).hexdigest()


def check_variants(config: DataConfig, names: Collection[str]) -> None:
    """Check that every folder of data.variants exists, is not data.dir, and has token files of `names`.

    Raises:
        ConfigError: One line with the folder.
    """
    seen: set[Path] = set()
    for variant in config.variants:
        folder = Path(variant)
        how = (
            "`python -m launch prep EXPERIMENT --slides FOLDER --masks FOLDER "
            f"data.dir={variant} --auto-quantile 0.80` or the like makes its token files"
        )
        if folder.resolve() == Path(config.dir).resolve():
            raise ConfigError(f"data.variants: {variant} is data.dir, which is drawn anyway: leave it out")
        if folder.resolve() in seen:
            raise ConfigError(f"data.variants: {variant} is named twice")
        seen.add(folder.resolve())
        if not folder.exists():
            raise ConfigError(f"data.variants: {variant}: no such folder; {how}")
        try:
            there = token_names(folder)
        except StoreError as error:
            raise ConfigError(f"data.variants: {variant}: {error}") from None
        missing = sorted(set(names) - set(there))
        if missing or not there:
            which = _some(missing) if missing else "any slide"
            raise ConfigError(f"data.variants: {variant}: no token file for {which}; {how}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def file_split(path: Path) -> dict[str, list[str]]:
    """The names of each split as a JSON file lists them.

    Raises:
        ConfigError: The file has another form.
    """
    try:
        tree = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"data.split={path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"data.split={path}: not JSON ({error})") from None
    is_split = isinstance(tree, dict) and set(tree) <= set(SPLITS) and all(isinstance(v, list) for v in tree.values())
    if not is_split:
        raise ConfigError(f"data.split={path}: must be an object of lists named {', '.join(SPLITS)}")
    return {part: [str(name) for name in tree.get(part, [])] for part in SPLITS}


def hash_split(names: list[str], fractions: tuple[float, float, float]) -> dict[str, list[str]]:
    """The split by a hash of each name alone, so that slides added later move none of the others."""
    split: dict[str, list[str]] = {part: [] for part in SPLITS}
    for name in names:
        place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
        part = "train" if place < fractions[0] else "val" if place < fractions[0] + fractions[1] else "test"
        split[part].append(name)
    return split


def split_lengths(folder: Path) -> list[tuple[int, int, int, str, int]]:
    """(resolution, patch, split value, slide, tokens) of every token file that was built with a split value.

    Raises:
        ValueError: Not a folder, or an unreadable file; one line names it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    found = []
    for name in token_names(folder):
        meta = read_meta(token_path(folder, name))
        value = meta["params"].get("split_value")
        if value is not None:
            found.append((int(meta["frame_px"]), int(meta["patch"]), int(value), name, int(meta["rows"])))
    return found


def check_same_slide(path: Path, meta: dict[str, Any], folder: Path, own: dict[str, Any], masks: bool = True) -> None:
    """Check that a file with metadata `meta` and one in `folder` with metadata `own` show the same slide.

    With `masks` their masks must be the same too, read in the same way.

    Raises:
        ConfigError: They differ.
    """
    for kind in ("source", "mask") if masks else ("source",):
        if meta[f"{kind}_sha256"] != own[f"{kind}_sha256"]:
            what = {"source": "slide", "mask": "mask"}[kind]
            raise ConfigError(f"{path}: was built from another {what} than that of {folder}")
    for key in ("aspect", "mask_kind", "mask_classes") if masks else ("aspect",):
        has, wants = (it["params"].get(key) for it in (meta, own))
        if has != wants:
            raise ConfigError(f"{path}: was built with {key} {has}, {folder} with {wants}")


class TokenFiles:
    """The token files of one configuration, in splits, read lazily and kept in memory up to a limit.

    Whatever reads a file raises StoreError when it became unreadable.

    Raises:
        ConfigError: See `read_split` and `check_variants`.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.folder = Path(config.dir)
        self.split = read_split(config)
        check_variants(config, self.split["train"])
        self._drawn = [self.folder, *map(Path, config.variants)]
        self._budget = int(config.cache_gib * 2**30)
        self._cache: dict[tuple[str, Path], Any] = {}
        self._sound: set[Path] = set()
        self._truth: dict[str, NDArray[np.int64]] = {}

    @property
    def split_sha256(self) -> str:
        """SHA-256 of the names in every split."""
        return split_digest(self.split)

    def check(self) -> None:
        """Check the parameters of every file, and of variants of training slides, against the configuration.

        Raises:
            ConfigError: One line with the file, its value, and the key that asks for another.
        """
        trained = set(self.split["train"])
        masks = self.config.labels in (None, "mask")
        for name in (name for part in SPLITS for name in self.split[part]):
            own = self._check_file(token_path(self.folder, name), own=True)
            for folder in self._drawn[1:] if name in trained else ():
                path = token_path(folder, name)
                other = self._check_file(path, own=False)
                check_same_slide(path, other, self.folder, own, masks)

    def _check_file(self, path: Path, own: bool) -> dict[str, Any]:
        """The metadata of a file that fits the configuration; trees of a variant (not `own`) may be cut otherwise."""
        try:
            meta = read_meta(path)
        except StoreError as error:
            raise ConfigError(str(error)) from None
        params, config = meta["params"], self.config
        found = {key: built_with(params, key) for key in SETTINGS}
        found |= {"resolution": meta["frame_px"], "patch": meta["patch"], "classes": meta["classes"]}
        found["fov"] = bool(found["fov"])
        if not meta["classes"] and config.labels in (None, "mask"):
            raise ConfigError(f"{path}: has no mask counts; build it again with --masks DIR")
        if not own:
            del found["split_on"]
        if not own or config.thresholds is None:
            del found["thresholds"]
        if config.labels is not None:
            del found["classes"]  # data.classes are those of the labels
            if config.labels != "mask":
                del found["fov"]  # nothing is read from the masks
        for key, value in found.items():
            asked = getattr(config, key)
            if value != asked:
                cure = f"; build it with{'' if asked else 'out'} --fov" if key == "fov" else ""
                raise ConfigError(f"{path}: was built with {key} {value}, but data.{key}={asked}{cure}")
        if self.config.flips and params.get("fit") == "drop":  # turning puts tokens back into Morton order
            raise ConfigError(f"{path}: was built with --fit drop, which needs data.flips=false")
        if meta["rows"] > self.config.length:
            raise ConfigError(f"{path}: has {meta['rows']} tokens, more than data.length={self.config.length}")
        return meta

    def load(self, name: str) -> TokenSet:
        """The token set of one slide in data.dir."""
        return self._load(token_path(self.folder, name))

    def draw(self, name: str, rng: np.random.Generator) -> TokenSet:
        """A training slide from data.dir or one of data.variants, each as likely; without variants nothing is drawn."""
        index = int(rng.integers(len(self._drawn))) if len(self._drawn) > 1 else 0
        return self._load(token_path(self._drawn[index], name))

    def _load(self, path: Path) -> TokenSet:
        tokens: TokenSet = self._remember(("tokens", path), lambda: self._read(path))
        return tokens

    def _read(self, path: Path) -> TokenSet:
        """The file's tokens; the first read compares the checksum, so that nobody trains on damage."""
        tokens, meta = read_tokens(path, check=path not in self._sound)
        self._sound.add(path)
        if meta["params"].get("packing") == "strip":  # a model that wants strips makes them itself
            tokens = replace(tokens, tokens=unpack_strip(tokens.tokens))
        return tokens

    def truth_pixels(self, name: str, tokens: TokenSet) -> NDArray[np.int64]:
        """Foreground pixels of a slide's frame per class, (K,), with the leaves that `--fit drop` left out."""
        assert tokens.mask_counts is not None
        if name not in self._truth:
            whole = read_meta(token_path(self.folder, name))["mask_pixels"]
            counted = tokens.mask_counts.sum(axis=(0, 1, 2), dtype=np.int64)
            self._truth[name] = counted if whole is None else np.array(whole, np.int64)
        return self._truth[name]

    def content_pixels(self, name: str, tokens: TokenSet) -> int:
        """Pixels of a slide's frame that are scored, with the leaves that `--fit drop` left out."""
        seen = read_meta(token_path(self.folder, name)).get("content_pixels")  # only with a field of view
        width, height = tokens.content_wh
        return width * height if seen is None else int(seen)

    def load_raster(self, name: str) -> Raster:
        """The pictures of one slide whose leaves are as large as the patch (uniform patching).

        Raises:
            ConfigError: The leaves are larger than the patch, so the file lacks the pictures.
        """
        raster: Raster = self._remember(("raster", token_path(self.folder, name)), lambda: self._raster(name))
        return raster

    def _raster(self, name: str) -> Raster:
        tokens = self._read(token_path(self.folder, name))
        if (tokens.leaf_size != tokens.tokens.shape[1]).any() or tokens.mask_counts is None:
            raise ConfigError(f"{self.folder / name}: data.kind=tiles needs leaves as large as the patch")

        def paint(values: NDArray[Any]) -> NDArray[Any]:
            return rebuild(values, tokens.leaf_xy, tokens.leaf_size, tokens.size_px)

        masks, content = paint(tokens.mask_counts > 0), paint(tokens.content_counts > 0)
        return Raster(paint(tokens.tokens), masks, content, tokens.content_wh)

    def _remember(self, key: tuple[str, Path], make: Any) -> Any:
        if key in self._cache:
            return self._cache[key]
        value = make()
        size = _bytes(value)
        if size <= self._budget:
            if self.config.foreground_crops:  # look it up now, so that its size counts
                if isinstance(value, Raster):
                    _ = value.foreground_pixels
                elif self.config.kind == "tokens" and value.mask_counts is not None:
                    _ = value.foreground_cells
            self._budget -= _bytes(value)
            self._cache[key] = value
        return value

    def preprocessing_seconds(self) -> float | None:
        """Mean build time of a slide of the splits, from build_log.jsonl; None without one.

        Variants add their time, for the training slides alone.
        """
        names = {name for part in SPLITS for name in self.split[part]}
        total = 0.0
        for folder in self._drawn:
            used = names if folder is self.folder else set(self.split["train"])
            seconds = _mean_seconds(folder, used)
            if seconds is None:
                return None
            total += seconds * (len(used) / len(names))
        return total


def _bytes(value: Any) -> int:
    return sum(array.nbytes for array in vars(value).values() if isinstance(array, np.ndarray))


def _mean_seconds(folder: Path, names: set[str]) -> float | None:
    last: dict[str, float] = {}
    try:
        for entry in read_log(folder):
            if entry.get("status") == "done" and entry.get("slide") in names and entry.get("seconds"):
                last[entry["slide"]] = float(entry["seconds"])
    except (OSError, ValueError, TypeError):
        return None
    return sum(last.values()) / len(last) if last else None
