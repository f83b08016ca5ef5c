"""The token file: what is written is read, bytes depend on nothing else, and every fault is found."""

import dataclasses
import errno
import time
from fractions import Fraction
from pathlib import Path

import h5py
import numpy as np
import pytest

from data_prep.system import files
from data_prep.token_files import token_file
from data_prep.token_files.token_file import RowsError, StoreError, new_meta, read_meta, read_tokens, write_tokens
from data_prep.token_files.verify import token_files, verify_file
from tests.helpers.builds import leftovers, make_set

META = {
    "slide": "s",
    "size0_wh": [300, 384],
    "mpp": 0.25,
    "source_sha256": "ab",
    "mask_sha256": "cd",
    "code_version": "x",
    "params": {"resolution": 256, "patch": 8, "aspect": "keep", "thresholds": [100, 200]},
    "ceiling": [0.5, 1.0],
    "budget_used": 0.984375,
    "edge_pixels": 12,
}
ARRAYS = ("tokens", "leaf_xy", "leaf_size", "content_counts", "mask_counts")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "s.tokens.h5"
    write_tokens(target, make_set(), meta_of(make_set()))
    return target


def meta_of(token_set) -> dict[str, object]:
    masks = token_set.mask_counts
    params = {**META["params"], "resolution": token_set.size_px, "patch": token_set.tokens.shape[1]}
    return {**META, "params": params, "mask_pixels": None if masks is None else masks.sum(axis=(0, 1, 2)).tolist()}


def assert_same(a, b):
    for name in ARRAYS:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
    assert (a.size_px, tuple(a.content_wh)) == (b.size_px, tuple(b.content_wh))


@pytest.mark.parametrize("masks", [True, False])
def test_reads_what_was_written(tmp_path: Path, masks: bool):
    token_set = make_set(masks=masks)
    target = tmp_path / "a.tokens.h5"
    write_tokens(target, token_set, meta_of(token_set))
    back, meta = read_tokens(target, check=True)
    assert_same(back, token_set)
    assert meta == {**new_meta(**meta_of(token_set)), "frame_px": 256, "content_wh": [200, 256]}
    short = read_meta(target)
    assert (short["rows"], short["patch"], short["classes"]) == (len(token_set), 8, 2 if masks else 0)
    assert verify_file(target) == []
    assert leftovers(tmp_path) == []


def test_bytes_depend_on_content_alone(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    first, second = tmp_path / "a.tokens.h5", tmp_path / "elsewhere" / "other.tokens.h5"
    write_tokens(first, make_set(), META)
    time.sleep(1.1)  # HDF5 keeps whole seconds
    write_tokens(second, make_set(), META)
    assert first.read_bytes() == second.read_bytes()
    write_tokens(second, make_set(seed=1), META)
    assert first.read_bytes() != second.read_bytes()


def test_layout_and_chunks(tmp_path: Path):
    target = tmp_path / "a.tokens.h5"
    token_set = make_set(size_px=512, p=4, length=2500, content_wh=(512, 512))
    write_tokens(target, token_set, META)
    with h5py.File(target) as file:
        n = len(token_set)
        want = {
            "tokens": ((n, 4, 4, 3), "u1"),
            "leaf_xy": ((n, 2), "i4"),
            "leaf_size": ((n,), "i4"),
            "mask_counts": ((n, 4, 4, 2), "u4"),
            "content_counts": ((n, 4, 4), "u4"),
            "coords": ((n, 2), "i8"),
        }
        assert {name: (d.shape, d.dtype.str[1:]) for name, d in file.items()} == want
        assert all(dataset.chunks[0] >= 1024 for dataset in file.values())
        assert file.attrs["schema"] == 1
        trident = {
            "patch_size",
            "patch_size_level0",
            "level0_magnification",
            "target_magnification",
            "overlap",
            "name",
            "savetodir",
            "level0_width",
            "level0_height",
        }
        clam = {"patch_size", "patch_level", "downsample", "downsampled_level_dim", "level_dim", "name", "save_path"}
        assert trident | clam <= set(file["coords"].attrs)


def test_coords_are_level0_pixels(path: Path):
    with h5py.File(path) as file:
        scale = Fraction(256, 384)  # frame pixels per level-0 pixel, aspect kept
        expected = [[int(x / scale), int(y / scale)] for x, y in file["leaf_xy"][:].tolist()]
        assert file["coords"][:].tolist() == expected
        notes = file["coords"].attrs
        smallest = int(file["leaf_size"][:].min())
        assert (notes["level0_width"], notes["level0_height"]) == (300, 384)
        assert notes["patch_size_level0"] == round(smallest / scale)
        assert (notes["level0_magnification"], notes["patch_size"]) == (40, 8)
        assert notes["target_magnification"] == pytest.approx(40 * 256 / 384)


@pytest.mark.parametrize("rows", [slice(3, 20), slice(None, None, 2), np.array([5, 1, 1, 60]), np.array([], int)])
def test_reads_some_rows(path: Path, rows):
    whole, _ = read_tokens(path)
    part, _ = read_tokens(path, rows)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[rows])


def test_rows_outside_are_refused(path: Path):
    with pytest.raises(RowsError, match="outside a file of 64"):
        read_tokens(path, np.array([0, 64]))


def test_unknown_meta_key_names_the_valid_ones(tmp_path: Path):
    with pytest.raises(ValueError, match=r"unknown token file key 'sldie'; valid keys: schema, slide"):
        write_tokens(tmp_path / "a.tokens.h5", make_set(), {"sldie": "x"})
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def test_a_cut_file_is_found_wherever_it_is_cut(path: Path):
    whole = path.read_bytes()
    for share in (0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        faults = verify_file(path)
        assert len(faults) == 1 and "\n" not in faults[0], share
        with pytest.raises(StoreError, match=r"s\.tokens\.h5"):
            read_tokens(path, check=True)
    path.write_bytes(whole)
    assert verify_file(path) == []


def test_a_flipped_bit_is_found(path: Path, monkeypatch: pytest.MonkeyPatch):
    token_set = make_set(size_px=512, p=16, length=256, content_wh=(500, 512))
    write_tokens(path, token_set, meta_of(token_set))
    assert verify_file(path) == []
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    # HDF5 reads some damaged files for ever, so it must not see them.
    monkeypatch.setattr(token_file.h5py, "File", lambda *_, **__: pytest.fail("a damaged file was opened"))
    for offset in [0, 40, 100, 511, 512, *rng.integers(0, len(whole), 150)]:
        broken = bytearray(whole)
        broken[offset] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        assert len(verify_file(path)) == 1, offset
    for damaged in (whole + b"x", whole[512:513], b"", whole[:512], whole[:-1]):
        path.write_bytes(damaged)
        assert len(verify_file(path)) == 1


@pytest.mark.parametrize("name", [*ARRAYS, "coords"])
def test_an_edited_dataset_is_found(path: Path, name: str):
    with h5py.File(path, "r+") as file:
        file[name][3] = file[name][4] + 1
    assert len(verify_file(path)) == 1


def test_an_edited_attribute_is_found(path: Path):
    with h5py.File(path, "r+") as file:
        file.attrs["slide"] = "another"
    assert verify_file(path) == ["content does not match its checksum (changed after it was written)"]


def test_not_a_token_file(tmp_path: Path):
    text, other = tmp_path / "t.tokens.h5", tmp_path / "o.tokens.h5"
    text.write_text("hello")
    with h5py.File(other, "w") as file:
        file["x"] = 1
    assert "not a whole token file" in verify_file(text)[0]
    assert "not a token file" in verify_file(other)[0]
    assert "no such token file" in verify_file(tmp_path / "none.tokens.h5")[0]
    with pytest.raises(StoreError, match="no token files"):
        token_files(tmp_path / "empty") if (tmp_path / "empty").mkdir() is None else None


def test_another_schema_says_what_to_do(path: Path):
    with h5py.File(path, "r+") as file:
        file.attrs["schema"] = 2
    with pytest.raises(StoreError, match="schema 2, this code reads 1: build it again"):
        read_meta(path)


def moved(counts: np.ndarray, row: int) -> np.ndarray:
    """The cells of one leaf in another order: no sum and no bound tells."""
    counts = counts.copy()
    counts[row] = counts[row, :, ::-1]
    return counts


def swap(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array[[5, 6]] = array[[6, 5]]
    return array


def at_the_border(token_set) -> int:
    """A leaf that the end of the content cuts upright."""
    left, size = token_set.leaf_xy[:, 0], token_set.leaf_size
    return int(np.flatnonzero((left < 200) & (left + size > 200))[0])


def bump(array: np.ndarray, by: int) -> np.ndarray:
    array = array.copy()
    array.flat[0] += by
    return array


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda t: {name: swap(getattr(t, name)) for name in ARRAYS}, "leaves do not tile the frame in Morton order"),
        (lambda t: {name: getattr(t, name)[:-1] for name in ARRAYS}, "leaves do not tile"),
        (lambda t: {"leaf_size": bump(t.leaf_size, 1)}, "leaves do not tile"),
        (lambda t: {"content_counts": bump(t.content_counts, 1)}, "add up to 51201, the content has 200 x 256"),
        (lambda t: {"content_counts": bump(t.content_counts, 10_000)}, "exceed the area of a cell"),
        (lambda t: {"mask_counts": bump(t.mask_counts, 10_000)}, "mask_counts exceed content_counts"),
        (
            lambda t: {"content_counts": moved(t.content_counts, at_the_border(t))},
            "are not the part of its cells inside",
        ),
        (lambda t: {"mask_counts": t.mask_counts // 2}, "the mask has ["),
        (lambda t: {"tokens": t.tokens[..., :2]}, "tokens is (64, 8, 8, 2) uint8, should be (64, 8, 8, 3) uint8"),
        (lambda t: {"content_counts": t.content_counts[:-1]}, "content_counts is (63, 8, 8)"),
    ],
    ids=["order", "gap", "size", "content", "content-area", "mask", "content-order", "mask-sum", "channels", "rows"],
)
def test_files_that_are_whole_but_wrong(tmp_path: Path, change, fault: str):
    token_set = make_set()
    target = tmp_path / "w.tokens.h5"
    write_tokens(target, dataclasses.replace(token_set, **change(token_set)), meta_of(token_set))
    assert any(fault in line for line in verify_file(target)), verify_file(target)


# ---------------------------------------------------------------------------------------------------------------------
# Writing that fails


def test_a_full_disk_leaves_the_old_file_and_nothing_else(path: Path, monkeypatch: pytest.MonkeyPatch):
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*s\.tokens\.h5"):
        write_tokens(path, make_set(seed=2), META)
    assert path.read_bytes() == before
    assert leftovers(path.parent) == []


def test_stale_temporaries_go_and_living_ones_stay(tmp_path: Path):
    import os
    import subprocess

    dead = subprocess.Popen(["true"])
    dead.wait()
    name = files.temporary_name(tmp_path / "a.tokens.h5").name.rpartition("-")[0]
    for pid in (dead.pid, os.getpid(), os.getppid()):
        (tmp_path / f"{name}-{pid}").write_bytes(b"half")
    elsewhere = tmp_path / ".a.tokens.h5.tmp-otherhost-1"
    old = tmp_path / ".b.tokens.h5.tmp-otherhost-1"
    elsewhere.write_bytes(b"half")
    old.write_bytes(b"half")
    os.utime(old, (1, 1))
    (tmp_path / "a.tokens.h5").write_bytes(b"whole")
    removed = {path.name for path in files.remove_stale(tmp_path, [".tokens.h5"])}
    assert removed == {f"{name}-{dead.pid}", f"{name}-{os.getpid()}", old.name}
    assert {p.name for p in tmp_path.iterdir()} == {"a.tokens.h5", f"{name}-{os.getppid()}", elsewhere.name}
