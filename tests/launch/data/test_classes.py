"""From masks with two classes to a record with the Dice of both."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_prep.tokens.ceiling import dice
from launch.records.record import read_record
from tests.helpers.repository import ROOT
from tests.helpers.small_runs import PATCH, SIZE, clean_env, finish_well, overrides, picture

NAMES = ["a", "b", "c"]


def make_slides(folder: Path) -> dict[str, np.ndarray]:
    """Images and masks of discs; what lies in the left half of the frame is class 2. Returns the class ids."""
    masks = {}
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for seed, name in enumerate(NAMES):
        image, mask = picture(seed, (SIZE, SIZE))
        mask[:, : SIZE // 2] *= 2
        masks[name] = mask
        cv2.imwrite(str(folder / "images" / f"{name}.png"), image)
        cv2.imwrite(str(folder / "masks" / f"{name}.png"), mask)
    return masks


def build(folder: Path, *options: str) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "data_prep",
            "build",
            str(folder / "images"),
            "--masks",
            str(folder / "masks"),
            "--out",
            str(folder / "tokens"),
            "--resolution",
            str(SIZE),
            "--patch",
            str(PATCH),
            *options,
        ],
        cwd=ROOT,
        env=clean_env(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def counts_of(run_dir: Path, name: str) -> np.ndarray:
    return np.load(run_dir / "predictions" / f"{name}.npz")["counts"]


@pytest.mark.gloo
def test_two_classes_from_masks_to_dice(tmp_path, start):
    masks = make_slides(tmp_path)
    build(tmp_path, "--length", "25", "--classes", "2")
    (tmp_path / "split.json").write_text(json.dumps({"train": ["a", "b"], "test": ["c"]}))
    words = overrides(
        tmp_path / "tokens",
        tmp_path,
        run_id="r",
        data__split=tmp_path / "split.json",
        data__classes=2,
        data__length=25,
        train__max_steps=4,
    )
    finish_well(start(1, words))
    record, counts = read_record(tmp_path / "smoke" / "r"), counts_of(tmp_path / "smoke" / "r", "c")
    truth = [int((masks["c"] == k).sum()) for k in (1, 2)]
    assert counts.shape == (2, 3) and counts[:, 2].tolist() == truth and min(truth) > 0
    assert record["dice"] == pytest.approx(float(dice(*counts.T).mean()))
    everything = [2 * t / (SIZE * SIZE + t) for t in truth]
    assert record["floors"]["all_foreground"] == pytest.approx(np.mean(everything))
    assert record["floors"]["all_background"] == 0
    assert 0 < record["dice_ceiling"] <= 1
