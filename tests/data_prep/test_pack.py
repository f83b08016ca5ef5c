"""Packs give back the same bytes, and damage is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.pack_format import PackError, read_entry, read_index, shard_path, write_pack


def test_inverse_and_damage(tmp_path: Path) -> None:
    contents = {"b": b"x" * 5000, "a": b"", "c": bytes(range(256)) * 40}
    files = {name: tmp_path / name for name in contents}
    for name, data in contents.items():
        files[name].write_bytes(data)
    pack = tmp_path / "pack"
    write_pack(files, pack, 8192)
    entries = read_index(pack)
    assert list(entries) == ["a", "b", "c"]
    assert {name: read_entry(pack, entry) for name, entry in entries.items()} == contents
    path = shard_path(pack, entries["b"].shard)
    data = bytearray(path.read_bytes())
    data[entries["b"].offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(PackError, match="b does not match"):
        read_entry(pack, entries["b"])
