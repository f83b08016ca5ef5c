"""A folder of pictures as a data set: the pictures of each split and their labels, read and brought to one size."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from launch.config.config import ConfigError
from launch.config.data import DataConfig
from launch.data.token_files import TokenFiles, split_digest, split_of

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


class ImageError(ValueError):
    """A picture cannot be read; one line names the file."""


def read_labels(path: Path, classes: int) -> dict[str, int]:
    """Labels by name from a CSV file with the columns `name,label`; other columns and the names' suffixes are ignored.

    Labels 0..classes-1 are taken as they are; other texts are numbered in sorted order.

    Raises:
        ConfigError: Another form of file, an empty or doubled name, or another number of classes.
    """
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"data.labels={path}: {getattr(error, 'strerror', None) or error}") from None
    if not rows or not {"name", "label"} <= set(rows[0]):
        raise ConfigError(f"data.labels={path}: needs a header line with the columns name and label, and rows below it")
    texts: dict[str, str] = {}
    for number, row in enumerate(rows, 2):
        name, label = (row["name"] or "").strip(), (row["label"] or "").strip()
        name = name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in SUFFIXES else name
        if not name or not label:
            raise ConfigError(f"data.labels={path}: line {number} lacks a name or a label")
        if name in texts:
            raise ConfigError(f"data.labels={path}: {name!r} stands there twice")
        texts[name] = label
    return _numbered(texts, classes, f"data.labels={path}")


def _numbered(texts: dict[str, str], classes: int, where: str) -> dict[str, int]:
    found = set(texts.values())
    if found <= {str(i) for i in range(classes)}:
        return {name: int(text) for name, text in texts.items()}
    if len(found) != classes:
        shown = ", ".join(sorted(found)[:5]) + (" ..." if len(found) > 5 else "")
        raise ConfigError(f"{where}: has {len(found)} classes ({shown}), but data.classes={classes}")
    order = {text: i for i, text in enumerate(sorted(found))}
    return {name: order[text] for name, text in texts.items()}


def slide_labels(config: DataConfig, files: TokenFiles) -> dict[str, int]:
    """Labels of token files from a CSV file; empty when they come from masks.

    Raises:
        ConfigError: A slide has no label, or see `read_labels`.
    """
    if config.labels in (None, "mask"):
        return {}
    if config.labels == "folders":
        raise ConfigError("data.labels=folders needs data.kind=images")
    labels = read_labels(Path(str(config.labels)), config.classes)
    for name in (name for names in files.split.values() for name in names):
        if name not in labels:
            raise ConfigError(f"data.labels={config.labels}: no label for {name!r}")
    return labels


class ImageFiles:
    """Pictures and labels of a configuration with kind=images; a picture's name is its path without suffix.

    Raises:
        ConfigError: Missing folder, split or labels, or a picture without label.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.folder = Path(config.dir)
        if not self.folder.is_dir():
            raise ConfigError(f"data.dir={config.dir}: no such folder")
        self._paths = self._find()
        self.labels = self._read_labels()
        self.split = split_of(config, list(self._paths), "picture")
        for name in (name for names in self.split.values() for name in names):
            if name not in self.labels:
                raise ConfigError(f"data.labels={config.labels}: no label for {name!r}")
        self._cache: dict[str, NDArray[np.float32]] = {}
        self._budget = int(config.cache_gib * 2**30)

    def _find(self) -> dict[str, Path]:
        paths: dict[str, Path] = {}
        for path in sorted(self.folder.rglob("*")):
            if path.suffix.lower() in SUFFIXES and path.is_file():
                name = path.relative_to(self.folder).with_suffix("").as_posix()
                if name in paths:
                    raise ConfigError(f"data.dir={self.folder}: {paths[name].name} and {path.name} have the same name")
                paths[name] = path
        if not paths:
            raise ConfigError(f"data.dir={self.folder}: no pictures in it ({', '.join(SUFFIXES)})")
        return paths

    def _read_labels(self) -> dict[str, int]:
        asked = str(self.config.labels)
        if asked == "mask":
            raise ConfigError("data.labels=mask needs token files with masks (data.kind=tokens or tiles)")
        if asked == "folders":
            texts = {name: name.partition("/")[0] for name in self._paths if "/" in name}
            return _numbered(texts, self.config.classes, f"data.dir={self.folder}")
        return read_labels(Path(asked), self.config.classes)

    @property
    def split_sha256(self) -> str:
        """SHA-256 of the names in every split."""
        return split_digest(self.split)

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width that every picture is brought to."""
        return self.config.image_hw or (self.config.resolution, self.config.resolution)

    def check(self) -> None:
        """Try the first picture; faults of the others show when they are read.

        Raises:
            ConfigError: It cannot be read.
        """
        try:
            self.load(self.split["train"][0])
        except ImageError as error:
            raise ConfigError(str(error)) from None

    def preprocessing_seconds(self) -> float | None:
        """None: pictures are read as they are."""
        return None

    def load(self, name: str) -> NDArray[np.float32]:
        """One picture, (H, W, C) float32 in [0, 1], of the configuration's size.

        Raises:
            ImageError: It cannot be decoded.
        """
        if name in self._cache:
            return self._cache[name]
        values = fit(read_picture(self._paths[name], self.config.channels), self.image_hw, self.config.fit)
        if values.nbytes <= self._budget:
            self._budget -= values.nbytes
            self._cache[name] = values
        return values


def read_picture(path: Path, channels: int) -> NDArray[np.float32]:
    """Decode a picture at its own depth: (H, W, channels) float32 in [0, 1], RGB or gray (luma).

    Raises:
        ImageError: Not a picture, or of another type than 8 or 16 bits.
    """
    values: Any = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if values is None:
        raise ImageError(f"{path}: cannot be decoded as a picture")
    if values.dtype not in (np.uint8, np.uint16):
        raise ImageError(f"{path}: has {values.dtype} pixels; 8 or 16 bits can be read")
    top = np.float32(np.iinfo(values.dtype).max)
    if values.ndim == 3:
        values = values[..., :3] if values.shape[2] >= 3 else values[..., :1]
        if values.shape[2] == 3:
            values = cv2.cvtColor(values, cv2.COLOR_BGR2RGB if channels == 3 else cv2.COLOR_BGR2GRAY)
    if values.ndim == 2:
        values = values[..., None]
    if values.shape[2] == 1 and channels == 3:
        values = np.repeat(values, 3, axis=2)
    scaled: NDArray[np.float32] = values.astype(np.float32) / top
    return scaled


def fit(values: NDArray[np.float32], image_hw: tuple[int, int], how: str) -> NDArray[np.float32]:
    """Bring a picture (H, W, C) to a size.

    `how` is pad (largest size that fits, top left, the rest black), squash (each axis by itself) or crop (smallest size
    that covers, middle part).
    """
    # The size before padding or cropping.
    (h, w), (asked_h, asked_w) = values.shape[:2], image_hw
    if how == "squash":
        target = (asked_h, asked_w)
    else:
        scale = (min if how == "pad" else max)(asked_h / h, asked_w / w)
        rounded = (max(1, round(h * scale)), max(1, round(w * scale)))
        bound = np.minimum if how == "pad" else np.maximum
        target = (int(bound(rounded[0], asked_h)), int(bound(rounded[1], asked_w)))
    if target != (h, w):
        shrinks = target[0] < h or target[1] < w
        resized = cv2.resize(values, target[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        values = np.asarray(resized, np.float32).reshape(*target, -1)
    if how == "crop":
        y, x = (target[0] - asked_h) // 2, (target[1] - asked_w) // 2
        return np.ascontiguousarray(values[y : y + asked_h, x : x + asked_w])
    out = np.zeros((asked_h, asked_w, values.shape[2]), np.float32)
    out[: values.shape[0], : values.shape[1]] = values
    return out


Files = TokenFiles | ImageFiles


def open_files(config: DataConfig) -> Files:
    """The data set of a configuration, with labels where it asks for them.

    Raises:
        ConfigError: It is not there, or does not fit.
    """
    if config.kind == "images":
        return ImageFiles(config)
    files = TokenFiles(config)
    slide_labels(config, files)
    return files
