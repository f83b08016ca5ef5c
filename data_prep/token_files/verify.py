"""Checks token files without their slides: whole, unchanged, a tiling in Morton order, right counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from data_prep.token_files.token_file import SUFFIX, StoreError, read_tokens, token_names, token_path
from data_prep.tokens.token_set import TokenSet, content_counts
from data_prep.tree.quadtree import Leaves, check_tiling


def verify_file(path: Path) -> list[str]:
    """All faults of one token file, one line each without the file's name.

    The file opens; the checksum over datasets and attributes holds; shapes and types are right. The leaves tile the
    frame in Morton order (with `--fit drop` each row is a possible leaf). `content_counts` are each cell's part of the
    content (with a field of view at most that). `mask_counts` lie within them and add up to the mask.
    """
    try:
        token_set, meta = read_tokens(path, check=True)
    except StoreError as error:
        return [str(error).removeprefix(f"{path}: ")]
    if faults := _shape_faults(token_set, meta):
        return faults
    dropped = meta["params"].get("fit") == "drop"
    return _leaf_faults(token_set, dropped) or _count_faults(token_set, meta, dropped)


def _shape_faults(token_set: TokenSet, meta: dict[str, Any]) -> list[str]:
    rows, patch = token_set.tokens.shape[:2]
    masks = token_set.mask_counts
    classes = 0 if masks is None else masks.shape[-1]
    wanted: dict[str, tuple[tuple[int, ...], str]] = {
        "tokens": ((rows, patch, patch, 3), "uint8"),
        "leaf_xy": ((rows, 2), "int32"),
        "leaf_size": ((rows,), "int32"),
        "content_counts": ((rows, patch, patch), "uint32"),
        "mask_counts": ((rows, patch, patch, classes), "uint32"),
    }
    faults = []
    for name, (shape, kind) in wanted.items():
        array = getattr(token_set, name)
        if array is not None and (array.shape != shape or array.dtype != kind):
            faults.append(f"{name} is {array.shape} {array.dtype}, should be {shape} {kind}")
    if rows == 0:
        faults.append("no leaves")
    for key, value in (("patch", patch), ("resolution", token_set.size_px)):
        if meta["params"].get(key, value) != value:
            faults.append(f"parameter {key} is {meta['params'][key]}, the datasets say {value}")
    return faults


def _leaf_faults(token_set: TokenSet, dropped: bool) -> list[str]:
    xy, size = token_set.leaf_xy, token_set.leaf_size
    patch, size_px = token_set.tokens.shape[1], token_set.size_px
    if not dropped:
        try:
            check_tiling(Leaves(xy, size), size_px)
        except ValueError as error:
            return [f"leaves do not tile the frame in Morton order: {error}"]
    steps = size // patch
    bad = np.flatnonzero((size % patch != 0) | (steps <= 0) | (steps & (steps - 1) != 0) | (size > size_px))
    if len(bad):
        return [f"leaf {bad[0]} has side {size[bad[0]]}, not {patch} times a power of two"]
    side = size[:, None]
    bad = np.flatnonzero(((xy % side != 0) | (xy < 0) | (xy + side > size_px)).any(axis=1))
    return [f"leaf {bad[0]} is not on the grid of its size inside the frame"] if len(bad) else []


def _count_faults(token_set: TokenSet, meta: dict[str, Any], dropped: bool) -> list[str]:
    faults = []
    content, masks = token_set.content_counts, token_set.mask_counts
    width, height = token_set.content_wh
    total = int(content.sum(dtype=np.uint64))
    seen_in_part = bool(meta["params"].get("fov"))
    if not dropped and not seen_in_part and total != width * height:
        faults.append(f"content_counts add up to {total}, the content has {width} x {height} = {width * height} pixels")
    if not dropped and seen_in_part and total != meta["content_pixels"]:
        faults.append(f"content_counts add up to {total}, the field of view has {meta['content_pixels']} pixels")
    steps = token_set.leaf_size.astype(np.int64) // token_set.tokens.shape[1]
    bad = np.flatnonzero((content > (steps * steps)[:, None, None]).any(axis=(1, 2)))
    if len(bad):
        faults.append(f"leaf {bad[0]}: content_counts exceed the area of a cell")
    wanted = content_counts(token_set.leaf_xy, token_set.leaf_size, token_set.tokens.shape[1], token_set.content_wh)
    wrong = ((content > wanted) if seen_in_part else (content != wanted)).any(axis=(1, 2))
    if dropped:  # duplicates hold no pixels
        wrong &= content.any(axis=(1, 2))
    if not faults and wrong.any():
        faults.append(f"leaf {np.argmax(wrong)}: content_counts are not the part of its cells inside the content")
    if masks is not None:
        bad = np.flatnonzero((masks.sum(axis=-1, dtype=np.uint64) > content).any(axis=(1, 2)))
        if len(bad):
            faults.append(f"leaf {bad[0]}: mask_counts exceed content_counts")
        pixels = masks.sum(axis=(0, 1, 2), dtype=np.int64).tolist()
        if not dropped and meta["mask_pixels"] is not None and pixels != meta["mask_pixels"]:
            faults.append(f"mask_counts add up to {pixels} per class, the mask has {meta['mask_pixels']}")
    return faults


def token_files(folder: Path) -> list[Path]:
    """Every token file under a folder, sorted; one file or a pack will do too. Raises StoreError if there is none."""
    from data_prep.token_files.pack_format import is_pack  # a build verifies its files and knows no packs

    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise StoreError(f"{folder}: no such file or folder")
    if is_pack(folder):
        return [token_path(folder, name) for name in token_names(folder)]
    files = sorted(path for path in folder.rglob(f"*{SUFFIX}") if path.is_file())
    if not files:
        raise StoreError(f"{folder}: no token files (*{SUFFIX}) in this folder")
    return files
