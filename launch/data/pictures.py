"""A folder of pictures as a data set: which are in which split, their labels, read and brought to one size.

Pictures are decoded by OpenCV at their own depth (8 or 16 bits). Must not import torch.
"""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from launch.config.config import ConfigError
from launch.config.data import DataConfig
from launch.data.token_files import SPLITS, TokenFiles, file_split, hash_split

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
PAD_VALUE = 0.0  # mammograms are black around the breast


class ImageError(ValueError):
    """A picture cannot be read; one line names the file."""


def read_labels(path: Path, classes: int) -> dict[str, int]:
    """Labels by name from a CSV file with the columns `name,label`; other columns are ignored.

    Args:
        path: The file. Names may have a suffix, which is dropped.
        classes: Number of classes. Labels 0..classes-1 are taken as they are; other texts are numbered in sorted order.

    Raises:
        ConfigError: Not such a file, an empty or doubled name, or another number of classes.
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
        ConfigError: A slide without label, or see `read_labels`.
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
    """Pictures and labels of one configuration.

    A picture's name is its path below the folder, without suffix.

    Args:
        config: The data section, with kind=images.

    Raises:
        ConfigError: Missing folder, split or labels; a picture without label.
    """

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.folder = Path(config.dir)
        if not self.folder.is_dir():
            raise ConfigError(f"data.dir={config.dir}: no such folder")
        self._paths = self._find()
        self.labels = self._read_labels()
        split = (
            hash_split(list(self._paths), config.fractions) if config.split is None else file_split(Path(config.split))
        )
        self.split = {part: split[part] for part in SPLITS}
        self._check_split()
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

    def _check_split(self) -> None:
        names = [name for part in self.split.values() for name in part]
        for name in names:
            if name not in self._paths:
                raise ConfigError(f"data.split={self.config.split}: no picture {name!r} in {self.folder}")
            if name not in self.labels:
                raise ConfigError(f"data.labels={self.config.labels}: no label for {name!r}")
        if len(set(names)) < len(names):
            raise ConfigError(f"data.split={self.config.split}: a name is listed twice; splits must not overlap")
        for part in ("train", "test"):
            if not self.split[part]:
                raise ConfigError(f"data.split={self.config.split}: no picture in {part} ({len(self._paths)} found)")

    @property
    def split_sha256(self) -> str:
        """Hash of the names in every split."""
        return hashlib.sha256(json.dumps(self.split, sort_keys=True).encode()).hexdigest()

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width that every picture is brought to."""
        return self.config.image_hw or (self.config.resolution, self.config.resolution)

    def check(self) -> None:
        """Try the first picture; the others are found out when they are read.

        Raises:
            ConfigError: It cannot be read.
        """
        try:
            self.load(self.split["train"][0])
        except ImageError as error:
            raise ConfigError(str(error)) from None

    def preprocessing_seconds(self) -> float | None:
        """Pictures are read as they are: nothing was prepared."""
        return None

    def load(self, name: str) -> NDArray[np.float32]:
        """One picture, (H, W, C) float32 in [0, 1], H and W those of the configuration.

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
    """Decode a picture: (H, W, channels) float32 in [0, 1], RGB or gray (luma).

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

    Args:
        values: The picture.
        image_hw: Height and width asked for.
        how: pad (largest size that fits, top left, the rest black), squash (each axis by itself) or crop (smallest size
            that covers, middle part).
    """
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
    out = np.full((asked_h, asked_w, values.shape[2]), PAD_VALUE, np.float32)
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
