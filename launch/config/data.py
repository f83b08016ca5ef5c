"""Settings of the data section: which files, and how they become batches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from launch.config.base import OptionalInt, OptionalText, Section, none_from_text, number_from_text


class DataConfig(Section):
    """Which token files, and how they become batches."""

    dir: str = Field(description="folder of *.tokens.h5 (`python -m data_prep build`), or of pictures (kind=images)")
    variants: tuple[str, ...] = Field(
        default=(),
        description="[folder, ...] of the same slides cut otherwise; a training sample draws one of dir and these",
    )
    split: OptionalText = Field(
        default=None, description="JSON file {train, val, test: [slide names]}; null: by `fractions`"
    )
    fractions: tuple[float, float, float] = Field(
        default=(0.7, 0.1, 0.2),
        description="shares of train, val and test by a hash of the slide name, when split is null",
    )
    kind: Literal["tokens", "tiles", "images"] = Field(
        default="tokens", description="whole token sequences, crops of the raster, or files of pictures"
    )
    labels: OptionalText = Field(
        default=None,
        description="classification: CSV file `name,label`; `mask`: is there foreground; `folders`: one per class",
    )
    patching: Literal["apf", "uniform"] = Field(default="apf", description="how the files were cut (checked)")
    split_on: Literal["edges", "variance", "entropy"] = Field(
        default="edges", description="patching=apf: what the files' trees were split by (checked)"
    )
    resample: Literal["mean", "cubic"] = Field(
        default="mean", description="patching=apf: how the files' leaves were shrunk to patches (checked)"
    )
    thresholds: Annotated[tuple[int, int] | None, BeforeValidator(none_from_text)] = Field(
        default=None, description="[low, high] of Canny in the files (checked); null: auto for prep, not checked"
    )
    fov: bool = Field(
        default=False, description="score and train inside a field of view only: the files were built so (checked)"
    )
    resolution: int = Field(gt=0, description="R, side of the frame in pixels (checked)")
    patch: int = Field(default=1, gt=0, description="p, side of a patch in pixels (checked); kind=images: not used")
    length: int = Field(
        default=1, gt=0, description="L, tokens per image after padding; more in a file is an error (images: unused)"
    )
    classes: int = Field(default=1, gt=0, description="K, foreground classes (checked), or classes of labels")
    channels: Annotated[Literal[1, 3], BeforeValidator(number_from_text)] = Field(
        default=3, description="1: gray pictures (kind=images), 3: RGB"
    )
    image_hw: tuple[int, int] | None = Field(
        default=None, description="kind=images: height and width of every picture; null: resolution x resolution"
    )
    fit: Literal["pad", "squash", "crop"] = Field(
        default="pad", description="kind=images: how a picture gets that size; pad keeps the aspect ratio"
    )
    sizes: tuple[int, ...] = Field(
        default=(), description="kind=images: train on each picture at these sides too, largest first; (): one size"
    )
    flips: bool = Field(default=True, description="train on the eight flips and quarter turns of the frame")
    part: float = Field(
        default=1.0, gt=0, le=1, description="kind=tokens: a step sees the leaves in a random square of this share of R"
    )
    jitter: float = Field(default=0.0, ge=0, le=0.9, description="strength of the colour jitter in training, 0 = off")
    mirror: bool = Field(default=False, description="kind=images, flips=false: swap left and right half of the time")
    rotate_deg: float = Field(default=0.0, ge=0, le=180, description="kind=images: turn by up to this many degrees")
    noise: float = Field(default=0.0, ge=0, le=1, description="kind=images: deviation of Gaussian noise in training")
    crop_px: int = Field(default=256, gt=0, description="kind=tiles: side of a training crop")
    window_px: OptionalInt = Field(
        default=None, gt=0, description="kind=tiles: side of the sliding window of predictions; null: crop_px"
    )
    foreground_crops: float = Field(
        default=0.0, ge=0, le=1, description="share of the crops around a foreground pixel, or parts around such a cell"
    )
    overlap: float = Field(default=0.25, ge=0, lt=1, description="kind=tiles or part: overlap of sliding windows")
    cache_gib: float = Field(default=2.0, ge=0, description="memory per rank for files already read, in GiB")
    prefetch: int = Field(default=2, ge=0, description="batches prepared ahead by a background thread, 0 = none")

    def check_part(self, key: str, share: float) -> None:
        """Raise ValueError if a part with `share` of the frame's side, set by `key`, is smaller than a patch."""
        if share < 1 and share * self.resolution < self.patch:
            raise ValueError(f"{key}={share:g} of resolution={self.resolution} is less than patch={self.patch}")

    def check_split(self) -> None:
        """Raise ValueError if `split_on`, `resample` or `thresholds` are set for files without a tree."""
        has_tree = self.patching == "apf" and self.kind == "tokens"
        for key, default in (("split_on", "edges"), ("resample", "mean")):
            value = getattr(self, key)
            if value != default and not has_tree:
                raise ValueError(f"{key}={value} is for patching=apf with kind=tokens")
        if self.fov and (self.kind == "images" or self.labels is not None):
            raise ValueError("fov=true is for segmentation with kind=tokens or tiles")
        if self.thresholds is None:
            return
        low, high = self.thresholds
        if not has_tree or self.split_on != "edges":
            raise ValueError(f"thresholds={low},{high} are for edges: they need patching=apf with split_on=edges")
        if not 0 <= low <= high:
            raise ValueError(f"thresholds must be [low, high] with 0 <= low <= high, got {[low, high]}")

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        # Which files.
        self.check_split()
        if self.split is None and (min(self.fractions) < 0 or abs(sum(self.fractions) - 1) > 1e-6):
            raise ValueError(f"fractions must be three shares that sum to 1 (got {list(self.fractions)})")
        if self.variants and (self.kind != "tokens" or self.patching != "apf"):
            raise ValueError(f"variants={list(self.variants)} is for kind=tokens with patching=apf")
        if not all(self.variants):
            raise ValueError(f"variants={list(self.variants)} has an empty name")
        if len({Path(folder) for folder in self.variants}) < len(self.variants):
            raise ValueError(f"variants={list(self.variants)} names a folder twice")
        # Their kind, and their labels.
        if self.kind == "tiles" and self.patching != "uniform":
            raise ValueError("kind=tiles needs uniform token files: set data.patching=uniform")
        if self.kind == "tiles" and self.crop_px > self.resolution:
            raise ValueError(f"crop_px={self.crop_px} is larger than resolution={self.resolution}")
        if self.kind == "images" and self.labels is None:
            raise ValueError("kind=images needs labels: a CSV file `name,label`, or `folders`")
        if self.kind == "tiles" and self.labels not in (None, "mask"):
            raise ValueError("kind=tiles takes its labels from the mask: set labels=mask")
        if self.labels == "mask" and self.classes != 2:
            raise ValueError(f"labels=mask has two classes, got classes={self.classes}")
        # What a training step, and a prediction, sees of a frame.
        if self.sizes and (self.kind != "images" or list(self.sizes) != sorted(set(self.sizes), reverse=True)):
            raise ValueError(f"sizes needs kind=images and descending sides, got {list(self.sizes)}")
        if self.part < 1 and (self.kind != "tokens" or self.labels is not None):
            raise ValueError(f"part={self.part:g} is for segmentation with kind=tokens; crops have crop_px")
        self.check_part("part", self.part)
        if self.window_px is not None and (self.kind != "tiles" or self.labels is not None):
            raise ValueError(f"window_px={self.window_px} is for segmentation with kind=tiles")
        if self.window_px is not None and not self.crop_px <= self.window_px <= self.resolution:
            raise ValueError(f"window_px={self.window_px} must lie between crop_px={self.crop_px} and resolution")
        if self.image_hw is not None and min(self.image_hw) < 1:
            raise ValueError(f"image_hw must be positive, got {list(self.image_hw)}")
        return self
