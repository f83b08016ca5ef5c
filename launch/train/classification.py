"""Classification of token sets, crops or pictures: batches, loss, and accuracy and AUC over all ranks."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from data_prep.system.files import write_atomic
from hpc_models.training import metrics
from hpc_models.training.distill import scale_loss, teacher_loss
from launch.config.config import Config, ConfigError
from launch.data.augment import change_picture
from launch.data.batches import Batch, Sample, collate, crop_sample, token_sample
from launch.data.pictures import ImageFiles, slide_labels
from launch.data.token_files import TokenFiles
from launch.engines.base import Engine, Forward
from launch.train.task import score_items

FOREGROUND_SHARE = 0.01  # labels=mask: a crop with less foreground than this has none


@dataclass(frozen=True)
class ClassScores:
    """Class probabilities of a split, from all ranks."""

    names: list[str]  # slides or pictures, or `slide@x,y` for crops
    labels: torch.Tensor  # (N,) int64
    probabilities: torch.Tensor  # (N, classes) float64
    tokens: float | None  # mean per item, None for pictures
    at_sizes: dict[int, ClassScores] = field(default_factory=dict)  # the same pictures at other sides (eval.sizes)

    def headline(self) -> float:
        """What model selection compares: AUC, or accuracy where a class is missing."""
        auc = metrics.auc(self.probabilities, self.labels)
        return metrics.accuracy(self.probabilities, self.labels) if auc is None else auc

    def numbers(self) -> dict[str, float | None]:
        """Accuracy (at other sides too), AUC (of class 1, or the mean over classes), cross-entropy."""
        picked = self.probabilities[torch.arange(len(self.labels)), self.labels].clamp(min=1e-12)
        return {
            "accuracy": metrics.accuracy(self.probabilities, self.labels),
            "auc": metrics.auc(self.probabilities, self.labels),
            "cross_entropy": float(-picked.log().mean()),
            **{f"accuracy_{side}": value for side, value in self._by_size().items()},
        }

    def _by_size(self) -> dict[str, float]:
        return {str(k): metrics.accuracy(s.probabilities, s.labels) for k, s in self.at_sizes.items()}

    def record(self) -> dict[str, Any]:
        """What the record keeps."""
        numbers = self.numbers()
        known = {"accuracy": numbers["accuracy"], "auc": numbers["auc"], "tokens_per_image": self.tokens}
        return {**known, "accuracy_by_size": self._by_size() or None}


class Classification:
    """The task of a classifier.

    Raises:
        ConfigError: Labels are missing or do not fit.
    """

    def __init__(self, config: Config, files: TokenFiles | ImageFiles) -> None:
        self.config, self.files = config, files
        self.parts = max(1, len(config.data.sizes))
        if config.train.scale_distill and not config.model.gives_token:
            raise ConfigError(f"train.scale_distill: model {config.model.name} has no class token to learn from")
        self._labels = files.labels if isinstance(files, ImageFiles) else slide_labels(config.data, files)

    def batch(self, picks: list[tuple[int, int]]) -> Batch:
        """The augmented batch of some (image index, global sample index) pairs; a function of them and the seed."""
        names, seed = self.files.split["train"], self.config.train.seed
        return collate([self._sample(names[i], np.random.default_rng([seed, 2, sample])) for i, sample in picks])

    def _sample(self, name: str, rng: np.random.Generator | None) -> Sample:
        data = self.config.data
        if isinstance(self.files, ImageFiles):
            values = self.files.load(name)
            if rng is not None:
                values = change_picture(values, rng, data)
            return {"image": values.transpose(2, 0, 1), "label": np.array(self._labels[name])}
        if data.kind == "tiles":
            assert rng is not None
            raster = self.files.load_raster(name)
            sample = crop_sample(raster, data.crop_px, rng, data.flips, data.jitter, data.foreground_crops)
            return self._crop(sample, name)
        tokens = self.files.load(name) if rng is None else self.files.draw(name, rng)
        sample = token_sample(tokens, data.length, rng, data.flips, data.jitter if rng is not None else 0.0)
        if data.labels == "mask":
            assert tokens.mask_counts is not None
            label = int(tokens.mask_counts.any())
        else:
            label = self._labels[name]
        return {**_inputs(sample), "label": np.array(label)}

    def _crop(self, sample: Sample, name: str) -> Sample:
        if self.config.data.labels == "mask":
            label = int(sample["mask_counts"].max(-1).mean() >= FOREGROUND_SHARE)
        else:
            label = self._labels[name]
        return {"image": sample["tokens"][0].transpose(2, 0, 1), "label": np.array(label)}

    def losses(self, forward: Forward, batch: Batch, teacher: Forward | None) -> Iterator[torch.Tensor]:
        """Loss of each image, (B,), once per training size; the step's loss is the mean over the sizes.

        The class probabilities of a teacher are a second target: `train.distill` times their cross-entropy is added.
        """
        labels, train = batch["label"], self.config.train
        classes = self.config.data.classes
        larger: torch.Tensor | None = None
        for inputs in self._sized(batch):
            target = None
            if teacher is not None:
                # The teacher goes first: it borrows the parameters, which must not change before the backward pass.
                with torch.no_grad():
                    target = teacher(inputs)
            answer = forward({**inputs, "features": True} if train.scale_distill else inputs)
            logits, cls = answer[:, :classes], answer[:, classes:]
            loss = F.cross_entropy(logits, labels, reduction="none", label_smoothing=train.label_smoothing)
            if target is not None:
                loss = loss + train.distill * teacher_loss(logits, target)
            if train.scale_distill and larger is not None:
                loss = loss + train.scale_distill * scale_loss(cls, larger)
            larger = cls.detach()
            yield loss

    def _sized(self, batch: Batch) -> Iterator[Any]:
        inputs = {k: v for k, v in batch.items() if k != "label"}
        if not self.config.data.sizes:
            yield inputs
            return
        for side in self.config.data.sizes:
            yield {"image": resized(inputs["image"], side)}

    @torch.no_grad()
    def evaluate(
        self, engine: Engine, part: str, device: torch.device, pictures: Path | None = None, label: str = "eval"
    ) -> ClassScores:
        """See `Task`; rank 0 writes scores.csv. The test split is also scored at the sides of eval.sizes
        (scores_SIDE.csv).
        """
        scores = self._scores(engine, part, device, label)
        for side in self.config.eval.sizes if part == "test" else ():
            update = {"resolution": side, "image_hw": None, "sizes": ()}
            data = self.config.data.model_copy(update=update)
            there = Classification(self.config.model_copy(update={"data": data}), ImageFiles(data))
            scores.at_sizes[side] = there._scores(engine, part, device, f"{label}, {side} px")
        if pictures is not None and dist.get_rank() == 0:
            pictures.mkdir(parents=True, exist_ok=True)
            write_atomic(pictures / "scores.csv", scores_csv(scores))
            for side, there_scores in scores.at_sizes.items():
                write_atomic(pictures / f"scores_{side}.csv", scores_csv(there_scores))
        return scores

    def _scores(self, engine: Engine, part: str, device: torch.device, label: str) -> ClassScores:
        items = self._items(part)

        def row_of(index: int, _mine: bool) -> torch.Tensor:
            sample, tokens = self._item(*items[index])
            inputs = {k: v.to(device) for k, v in collate([sample]).items() if k != "label"}
            row = engine.forward(inputs)[0].double().softmax(-1).cpu()
            return torch.cat([torch.tensor([float(sample["label"]), tokens], dtype=torch.float64), row])

        table = score_items(engine, len(items), 2 + self.config.data.classes, label, "items", row_of)
        names = [name if at is None else f"{name}@{at[0]},{at[1]}" for name, at in items]
        tokens_mean = None if self.config.data.kind != "tokens" else float(table[:, 1].mean())
        return ClassScores(names, table[:, 0].long(), table[:, 2:], tokens_mean)

    def _items(self, part: str) -> list[tuple[str, tuple[int, int] | None]]:
        """What is scored: every slide or picture, or every square of the grid for crops."""
        names = self.files.split[part]
        if self.config.data.kind != "tiles":
            return [(name, None) for name in names]
        side = self.config.data.crop_px
        starts = range(0, self.config.data.resolution - side + 1, side)
        return [(name, (x, y)) for name in names for y in starts for x in starts]

    def _item(self, name: str, at: tuple[int, int] | None) -> tuple[Sample, float]:
        if at is None:
            sample = self._sample(name, None)
            return sample, float(sample["valid"].sum()) if "valid" in sample else 0.0
        assert isinstance(self.files, TokenFiles)
        raster, side = self.files.load_raster(name), self.config.data.crop_px
        window = (slice(at[1], at[1] + side), slice(at[0], at[0] + side))
        image = raster.image[window].astype(np.float32) / np.float32(255)
        return self._crop({"tokens": image[None], "mask_counts": raster.masks[window][None]}, name), 0.0

    def trivial_baselines(self) -> dict[str, float]:
        """Share of the most frequent class among the test items."""
        labels = [int(self._item(*item)[0]["label"]) for item in self._items("test")]
        return {"most_frequent_class": float(np.bincount(labels).max() / len(labels))}


def _inputs(sample: Sample) -> Sample:
    return {k: v for k, v in sample.items() if k not in ("mask_counts", "content_counts")}


def resized(images: torch.Tensor, side: int) -> torch.Tensor:
    """Square pictures (B, C, H, H) at another side, bilinear with antialiasing."""
    if images.shape[-1] == side and images.shape[-2] == side:
        return images
    return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)


def scores_csv(scores: ClassScores) -> bytes:
    """name, label and a probability per class, one line per item."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["name", "label", *(f"p{i}" for i in range(scores.probabilities.shape[1]))])
    for name, label, row in zip(scores.names, scores.labels.tolist(), scores.probabilities.tolist(), strict=True):
        writer.writerow([name, label, *(f"{p:.9g}" for p in row)])
    return out.getvalue().encode()
