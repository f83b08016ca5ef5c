"""Reads and writes the token file: one HDF5 file per slide and setting (design 4.5), written whole or not at all.

`launch` reads token files through this module. Layout, measured on 65,536 patches of 16 x 16 (50 MB): `tokens` are
stored plain, since gzip-1 saves 41 % of the bytes but reads 4,096 rows 8 times slower. The counts, nearly constant,
shrink 170-fold under gzip-1 and read as fast.
HDF5 crashes the process when the disk fills under it, so it writes through `_Spill`, which never fails. HDF5 may read a
damaged file for ever, so the first 512 bytes (a user block, which every reader skips) hold a SHA-256 of the rest, to be
checked first. Nothing in the file depends on when, where or by how many ranks it was made.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

# One writer per file and whole files only, so locks add nothing, and network file systems without them fail on open.
os.environ.setdefault("HDF5_USE_FILE_LOCKING", "FALSE")

import h5py
import numpy as np
from numpy.typing import NDArray

from data_prep.system.files import replacing
from data_prep.tokens.token_set import TokenSet

if TYPE_CHECKING:
    from data_prep.token_files.pack_format import PackedFile

SCHEMA = 1
SUFFIX = ".tokens.h5"
CHUNK_ROWS = 1024
_PREAMBLE_BYTES = 512  # the smallest user block of HDF5
_CHUNK_BYTES_MAX = 1 << 30  # HDF5 itself stops at 4 GiB per chunk
_READ_BYTES = 1 << 20
_DATASETS = ("tokens", "leaf_xy", "leaf_size", "content_counts", "mask_counts")
_TEXT_KEYS = ("slide", "source_sha256", "code_version")
_JSON_KEYS = (
    *("params", "size0_wh", "content_wh", "frame_px", "mpp", "mask_sha256", "mask_pixels"),
    *("ceiling", "budget_used", "edge_pixels", "damaged", "content_pixels"),
)
_SOMETIMES = {"content_pixels"}  # keys that are not written where they are None


class StoreError(ValueError):
    """A token file that cannot be read; one line that names the file."""


class RowsError(IndexError):
    """Rows that a token file does not have."""


def token_path(folder: Path, stem: str) -> Path:
    """Where the token file of slide `stem` lies in `folder`."""
    return folder / f"{stem}{SUFFIX}"


def token_names(folder: Path) -> list[str]:
    """Sorted names of the slides with token files in a folder or pack. Raises StoreError for a damaged pack."""
    from data_prep.token_files.pack_format import PackError, is_pack, read_index  # only for who reads folders

    try:
        there = read_index(folder).entries if is_pack(folder) else [path.name for path in folder.glob(f"[!.]*{SUFFIX}")]
    except PackError as error:
        raise StoreError(str(error)) from error
    return sorted(name.removesuffix(SUFFIX) for name in there if name.endswith(SUFFIX))


def new_meta(**known: Any) -> dict[str, Any]:
    """All metadata keys of a token file: the given ones, and None (text: empty) for the others.

    Keys: `schema`; `slide` (stem); `params` (dict of every build parameter, with the thresholds `lo`, `hi` that were
    used); `size0_wh` (level-0 size); `frame_px` (R); `content_wh` (part of the frame that the slide covers); `mpp` (um
    per level-0 pixel); `source_sha256`, `mask_sha256`; `code_version`; `mask_pixels` (foreground of the frame per
    class; after `--fit drop` the tokens hold less); `ceiling` (best Dice per class that these tokens can reach);
    `budget_used` (leaves / length, before any drop or duplication); `edge_pixels`; `damaged` (white tiles of the slide
    that could not be decoded, each [level, x, y, w, h] in pixels of its level); `content_pixels` (frame pixels inside a
    field of view; None: all of `content_wh`).

    Raises:
        ValueError: A key that does not exist.
    """
    meta: dict[str, Any] = {"schema": SCHEMA, **dict.fromkeys(_TEXT_KEYS, ""), **dict.fromkeys(_JSON_KEYS)}
    unknown = sorted(set(known) - set(meta))
    if unknown:
        raise ValueError(f"unknown token file key {unknown[0]!r}; valid keys: {', '.join(meta)}")
    meta.update(known)
    meta["params"] = meta["params"] or {}
    return meta


def write_tokens(path: Path, token_set: TokenSet, meta: dict[str, Any]) -> None:
    """Write one token file; readers see it whole or not at all.

    Args:
        path: Ends in `.tokens.h5`.
        token_set: Rows of `tokens` (N,p,p,3) uint8, `leaf_xy` (N,2), `leaf_size` (N,), `content_counts` (N,p,p) and,
            with annotation, `mask_counts` (N,p,p,K).
        meta: Keys of `new_meta`; the token set gives `frame_px` and `content_wh`.

    Raises:
        OSError: The file cannot be written (full disk, folder missing, ...); nothing is left behind.
        ValueError: Unknown metadata key.
    """
    width, height = token_set.content_wh
    known = {**meta, "schema": SCHEMA, "frame_px": int(token_set.size_px), "content_wh": [int(width), int(height)]}
    whole = new_meta(**known)
    arrays = _arrays_of(token_set)
    with replacing(path) as out:
        spill = _Spill(out)
        try:
            _fill(spill, arrays, whole)
        except Exception:  # what HDF5 makes of zeros where it wrote something is of no interest
            if spill.error is None:
                raise
        if spill.error is not None:
            raise spill.error
        # The head tells of the rest.
        out.seek(_PREAMBLE_BYTES)
        head, _ = _preamble_of(out)
        out.seek(0)
        out.write(head)


def read_tokens(
    path: Path, rows: slice | NDArray[np.integer[Any]] | None = None, check: bool = False
) -> tuple[TokenSet, dict[str, Any]]:
    """Read the token set and the metadata of a token file, whole or some of its rows.

    Args:
        rows: Rows to read: a slice, or an index array (any order, repeats allowed); None reads all.
        check: Also compare the content with its checksum; needs all rows.

    Raises:
        StoreError: Not a token file, cut off, of another schema, or (`check`) not what was written.
        RowsError: An index outside the file.
    """
    if check and rows is not None:
        raise ValueError("check=True needs all rows of the file")
    if check:
        check_bytes(path)
    with _open(path, whole=rows is None) as file:
        meta = _decode(path, file)
        arrays = {name: _read_rows(file[name], rows) for name in _DATASETS if name in file}
        if check:
            _compare(path, file, meta, arrays)
    return _token_set(path, arrays, meta), meta


def read_meta(path: Path) -> dict[str, Any]:
    """Only the metadata of a token file, plus `rows` (N), `patch` (p) and `classes` (K, 0 without annotation).

    Raises:
        StoreError: Not a token file, cut off, or of another schema.
    """
    with _open(path) as file:
        meta = _decode(path, file)
        shape = file["tokens"].shape
        classes = file["mask_counts"].shape[-1] if "mask_counts" in file else 0
    return {**meta, "rows": int(shape[0]), "patch": int(shape[1]), "classes": int(classes)}


def check_bytes(path: Path) -> None:
    """Compare the bytes of a token file with the SHA-256 in its first block, without HDF5.

    HDF5 files without such a block pass; other readers decide whether they are token files.

    Raises:
        StoreError: Cut off, changed after it was written, or no token file at all.
    """
    path = Path(path)
    try:
        packed = None if path.exists() else _packed(path)
        with path.open("rb") if packed is None else packed as file:
            head = file.read(_PREAMBLE_BYTES)
            right, size = _preamble_of(file)
    except FileNotFoundError:
        raise StoreError(f"{path}: no such token file") from None
    except OSError as error:
        raise StoreError(f"{path}: cannot be read ({error.strerror})") from error
    if head == right or head.startswith(b"\x89HDF"):
        return
    wanted = re.search(rb"^bytes (\d+)$", head, re.MULTILINE)
    if wanted is None:
        raise StoreError(f"{path}: not a whole token file (its first block is none)")
    if size < int(wanted[1]):
        raise StoreError(f"{path}: not a whole token file ({size} of {int(wanted[1])} bytes)")
    raise StoreError(f"{path}: content does not match its checksum (changed after it was written)")


# ---------------------------------------------------------------------------------------------------------------------
# Inside


def _fill(image: Any, arrays: dict[str, NDArray[Any]], meta: dict[str, Any]) -> None:
    """Write the HDF5 part of a token file into a binary file object."""
    attributes = _encode(meta)
    with h5py.File(image, "w", userblock_size=_PREAMBLE_BYTES) as out:
        for name, array in arrays.items():
            row_bytes = max(1, array[:1].nbytes)
            rows = max(1, min(len(array), CHUNK_ROWS, _CHUNK_BYTES_MAX // row_bytes))
            packed = {} if name == "tokens" else {"compression": "gzip", "compression_opts": 1, "shuffle": True}
            out.create_dataset(name, data=array, chunks=(rows, *array.shape[1:]), track_times=False, **packed)
        coords, notes = _coords(meta, arrays)
        made = out.create_dataset("coords", data=coords, chunks=(min(len(coords), CHUNK_ROWS), 2), track_times=False)
        made.attrs.update(notes)
        out.attrs.update(attributes)
        out.attrs["checksum"] = _checksum(arrays, attributes)


def _preamble_of(rest: Any) -> tuple[bytes, int]:
    """The first block of a file whose other bytes `rest` reads, and their number."""
    digest, size = hashlib.sha256(), 0
    while block := rest.read(_READ_BYTES):
        digest.update(block)
        size += len(block)
    text = f"APF token file, HDF5 from byte {_PREAMBLE_BYTES}\nbytes {size}\nsha256 {digest.hexdigest()}\n"
    return text.encode().ljust(_PREAMBLE_BYTES), size


class _Spill:
    """A binary file for HDF5 that never fails: it keeps the first error in `error` and drops all later writes.

    HDF5 takes only objects for files that can be read too. After an error it reads zeros, or nothing.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self._guarded(lambda: self._file.write(data))
        return len(data)

    def truncate(self, size: int) -> int:
        self._guarded(lambda: self._file.truncate(size))
        return size

    def flush(self) -> None:
        self._guarded(self._file.flush)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._guarded(lambda: self._file.seek(offset, whence))  # may write what was held back
        return self._file.tell() if self.error is None else offset

    def tell(self) -> int:
        return self._file.tell() if self.error is None else 0

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size) if self.error is None else b""

    def readinto(self, buffer: Any) -> int:
        memoryview(buffer).cast("B")[:] = bytes(len(buffer))
        if self.error is None:
            self._file.readinto(buffer)  # type: ignore[attr-defined]
        return len(buffer)

    def _guarded(self, action: Callable[[], Any]) -> None:
        if self.error is None:
            try:
                action()
            except OSError as error:
                self.error = error


@contextmanager
def _open(path: Path, whole: bool = False) -> Iterator[Any]:
    """Open a file with h5py so that every error is a one-line `StoreError`; `whole` reads a packed file at once."""
    path = Path(path)
    packed: Any = None
    if not path.exists():
        packed = _packed(path)
        if packed is None:
            raise StoreError(f"{path}: no such token file")
        if whole:
            with packed:
                packed = io.BytesIO(packed.read())
    try:
        file = h5py.File(path if packed is None else packed, "r", rdcc_nbytes=1 << 26)
    except OSError as error:
        raise StoreError(f"{path}: not a whole token file ({_first_line(error)})") from error
    try:
        yield file
    except (StoreError, RowsError):
        raise
    except Exception as error:  # a flipped bit can turn a dataset into anything, and h5py's error with it
        raise StoreError(f"{path}: damaged token file ({_first_line(error)})") from error
    finally:
        file.close()
        if packed is not None:
            packed.close()


def _packed(path: Path) -> PackedFile | None:
    """The token file inside a pack, if `path.parent` is one that holds it."""
    from data_prep.token_files.pack_format import PackError, open_packed  # builds and folders do without packs

    try:
        return open_packed(path)
    except PackError as error:
        raise StoreError(str(error)) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].strip("'\"")


def _arrays_of(token_set: TokenSet) -> dict[str, NDArray[Any]]:
    kinds = {"tokens": "u1", "leaf_xy": "<i4", "leaf_size": "<i4", "content_counts": "<u4", "mask_counts": "<u4"}
    return {
        name: np.ascontiguousarray(value, dtype=kinds[name])
        for name in _DATASETS
        if (value := getattr(token_set, name)) is not None
    }


def _token_set(path: Path, arrays: dict[str, NDArray[Any]], meta: dict[str, Any]) -> TokenSet:
    missing = [name for name in _DATASETS[:4] if name not in arrays]
    if missing:
        raise StoreError(f"{path}: dataset {missing[0]!r} is missing")
    width, height = meta["content_wh"]
    parts: dict[str, Any] = {"mask_counts": None, **arrays}
    return TokenSet(**parts, size_px=meta["frame_px"], content_wh=(width, height))


def _read_rows(dataset: Any, rows: slice | NDArray[np.integer[Any]] | None) -> NDArray[Any]:
    if rows is None:
        return np.asarray(dataset[...])
    if isinstance(rows, slice):
        return np.asarray(dataset[rows])
    wanted = np.asarray(rows)
    if wanted.size == 0:
        return np.asarray(dataset[:0])
    # HDF5 takes index lists one row at a time; one span and a NumPy index is far faster.
    first, last = int(wanted.min()), int(wanted.max())
    if first < 0 or last >= len(dataset):
        raise RowsError(f"rows {first}..{last} are outside a file of {len(dataset)} tokens")
    span = np.asarray(dataset[first : last + 1])
    return np.take(span, wanted - first, axis=0)


def _encode(meta: dict[str, Any]) -> dict[str, Any]:
    texts = {key: str(meta[key]) for key in _TEXT_KEYS}
    said = [key for key in _JSON_KEYS if key not in _SOMETIMES or meta[key] is not None]
    nested = {key: json.dumps(meta[key], sort_keys=True) for key in said}
    return {"schema": SCHEMA, **texts, **nested}


def _decode(path: Path, file: Any) -> dict[str, Any]:
    if "schema" not in file.attrs or "checksum" not in file.attrs:
        raise StoreError(f"{path}: not a token file (HDF5 without the attributes schema and checksum)")
    schema = int(file.attrs["schema"])
    if schema != SCHEMA:
        raise StoreError(f"{path}: token file schema {schema}, this code reads {SCHEMA}: build it again")
    try:
        meta = {key: str(file.attrs[key]) for key in _TEXT_KEYS}
        said = [key for key in _JSON_KEYS if key not in _SOMETIMES or key in file.attrs]
        return new_meta(**meta, **{key: json.loads(file.attrs[key]) for key in said})
    except (KeyError, ValueError) as error:
        raise StoreError(f"{path}: damaged attributes ({_first_line(error)})") from error


def _compare(path: Path, file: Any, meta: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
    """Raise unless the checksum holds, and `coords` and its attributes follow from the rest of the file."""
    if file.attrs["checksum"] != _checksum(arrays, _encode(meta)):
        raise StoreError(f"{path}: content does not match its checksum (changed after it was written)")
    if "leaf_xy" not in arrays or "leaf_size" not in arrays or "tokens" not in arrays:
        raise StoreError(f"{path}: datasets are missing")
    coords, notes = _coords(meta, arrays)
    if not np.array_equal(np.asarray(file["coords"]), coords):
        raise StoreError(f"{path}: coords do not follow from leaf_xy")
    stored = dict(file["coords"].attrs)
    if set(stored) != set(notes) or any(not np.array_equal(stored[key], value) for key, value in notes.items()):
        raise StoreError(f"{path}: attributes of coords do not follow from the rest")


def _checksum(arrays: dict[str, NDArray[Any]], attributes: dict[str, Any]) -> str:
    """SHA-256 over names, types, shapes and bytes of the datasets, and over the root attributes."""
    digest = hashlib.sha256(json.dumps(attributes, sort_keys=True).encode())
    for name in _DATASETS:
        if name in arrays:
            array = np.ascontiguousarray(arrays[name])
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(array.data)
    return digest.hexdigest()


def scale_xy(meta: dict[str, Any]) -> tuple[Fraction, Fraction]:
    """Frame pixels per level-0 pixel, as `frame.make_frame` defines it; 1 if the slide size is unknown."""
    if not meta["size0_wh"]:
        return Fraction(1), Fraction(1)
    width, height = meta["size0_wh"]
    if meta["params"].get("aspect") == "squash":
        return Fraction(meta["frame_px"], width), Fraction(meta["frame_px"], height)
    scale = min(Fraction(1), Fraction(meta["frame_px"], max(width, height)))
    return scale, scale


def level0_xy(meta: dict[str, Any], leaf_xy: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """Top left (N, 2) of leaves in level-0 pixels, rounded down."""
    xy = leaf_xy.astype(np.int64)
    return np.stack([xy[:, i] * s.denominator // s.numerator for i, s in enumerate(scale_xy(meta))], axis=1)


def magnification(meta: dict[str, Any]) -> float:
    """Magnification of level 0, by the usual reading of mpp; 0 if mpp is unknown."""
    return 10.0 / meta["mpp"] if meta["mpp"] else 0.0


def reader_attributes(meta: dict[str, Any], patch_px: int, side0_px: int, scale: Fraction) -> dict[str, Any]:
    """What TRIDENT and CLAM readers look for on `coords`: patches of `patch_px` made of `side0_px` level-0 pixels.

    `scale` is in patch pixels per level-0 pixel.
    """
    width, height = meta["size0_wh"] or meta["content_wh"]
    return {
        "patch_size": patch_px,
        "patch_size_level0": side0_px,
        "level0_magnification": round(magnification(meta)),
        "target_magnification": float(magnification(meta) * scale),
        "overlap": 0,
        "name": meta["slide"],
        "savetodir": "",
        "level0_width": int(width),
        "level0_height": int(height),
        "patch_level": 0,
        "downsample": float(1 / scale),
        "level_dim": np.array([width, height], np.int64),
        "downsampled_level_dim": np.array(meta["content_wh"], np.int64),
        "save_path": "",
    }


def _coords(meta: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> tuple[NDArray[np.int64], dict[str, Any]]:
    """`coords` (N,2) at level 0, and its attributes.

    Readers of `coords` know one patch size per file. An adaptive file tells them its smallest leaf; the true sides are
    in the dataset `leaf_size` (frame pixels).
    """
    sides, scale = arrays["leaf_size"], scale_xy(meta)[0]
    smallest = int(sides.min()) if len(sides) else 0
    return level0_xy(meta, arrays["leaf_xy"]), {
        **reader_attributes(meta, int(arrays["tokens"].shape[1]), round(smallest / scale), scale),
        "adaptive": bool(len(np.unique(sides)) > 1),
        "order": "morton",
        "note": "patch_size_level0 is the smallest leaf; side of row i in frame pixels: leaf_size[i]",
    }
