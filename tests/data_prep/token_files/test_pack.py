"""Packs give back the same bytes, are read like the folder they were made of, and name their damage."""

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.__main__ import main
from data_prep.token_files import pack_format
from data_prep.token_files.pack_format import (
    INDEX,
    PackedFile,
    PackError,
    check_pack,
    read_index,
    shard_path,
    unpack_file,
    write_pack,
)
from data_prep.token_files.token_file import (
    StoreError,
    new_meta,
    read_meta,
    read_tokens,
    token_names,
    token_path,
    write_tokens,
)
from data_prep.token_files.verify import verify_file
from tests.helpers.builds import command, make_set, plain_env
from tests.helpers.repository import ROOT


def write_files(folder: Path, contents: dict[str, bytes]) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return {name: folder / name for name in contents}


NAMES = st.text(st.sampled_from("abz019._- +"), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..", INDEX) and not name.startswith("shard-")
)


@settings(max_examples=60, deadline=None)
@given(
    contents=st.dictionaries(NAMES, st.binary(max_size=9000), min_size=1, max_size=8),
    size=st.integers(1, 30000),
    data=st.data(),
)
def test_exact_inverse(tmp_path_factory, contents: dict[str, bytes], size: int, data):
    folder = tmp_path_factory.mktemp("p")
    index = write_pack(write_files(folder / "files", contents), folder / "pack", size)
    assert read_index(folder / "pack") == index and list(index.entries) == sorted(contents)
    assert check_pack(folder / "pack") == []
    for name, entry in index.entries.items():
        assert entry.offset % pack_format.ALIGN == 0
        unpack_file(folder / "pack", entry, folder / "back")
        assert (folder / "back").read_bytes() == contents[name]
        with PackedFile(folder / "pack", entry) as file:
            at = data.draw(st.integers(0, len(contents[name])))
            file.seek(at)
            assert file.read() == contents[name][at:] and file.tell() == len(contents[name])
    alone = {n: sum(e.shard == n and e.size > 0 for e in index.entries.values()) for n in range(len(index.shards))}
    assert all(shard.size <= size or alone[n] <= 1 for n, shard in enumerate(index.shards))
    again = write_pack(write_files(folder / "files", contents), folder / "again", size)
    assert again == index
    same = [path.read_bytes() for path in sorted((folder / "again").iterdir())]
    assert same == [path.read_bytes() for path in sorted((folder / "pack").iterdir())]


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    folder = tmp_path / "tokens"
    folder.mkdir()
    for seed in range(5):
        meta = new_meta(slide=f"slide{seed}", params={"resolution": 256, "patch": 8, "patching": "apf"})
        write_tokens(token_path(folder, f"slide{seed}"), make_set(seed=seed), meta)
    (folder / "build_log.jsonl").write_text('{"slide": "slide0"}\n')
    (folder / "notes.txt").write_text("not part of it")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


def test_pack_reads_like_its_folder(tokens: Path, tmp_path: Path, capsys):
    pack = tmp_path / "pack"
    assert run("pack", tokens, "--out", pack, "--shard-size", "500K") == 0
    assert "5 token files in " in capsys.readouterr().out
    assert token_names(pack) == token_names(tokens) == [f"slide{n}" for n in range(5)]
    for name in token_names(pack):
        assert verify_file(token_path(pack, name)) == []
        assert read_meta(token_path(pack, name)) == read_meta(token_path(tokens, name))
        for rows in (None, slice(3, 9), np.array([5, 1, 5])):
            ours, theirs = (read_tokens(token_path(folder, name), rows)[0] for folder in (pack, tokens))
            assert all(np.array_equal(getattr(ours, key), getattr(theirs, key)) for key in vars(ours))
    with pytest.raises(StoreError, match="no such token file"):
        read_meta(token_path(pack, "other"))
    assert run("verify", pack) == 0 and "5 of 5 token files are good" in capsys.readouterr().out


def test_unpack_gives_back_the_folder_or_one_file(tokens: Path, tmp_path: Path):
    pack, back = tmp_path / "pack", tmp_path / "back"
    assert run("pack", tokens, "--out", pack, "--shard-size", "500K") == 0
    assert run("unpack", pack, "--out", back) == 0
    wanted = contents(tokens)
    del wanted["notes.txt"]
    assert contents(back) == wanted
    assert run("unpack", pack, "--out", tmp_path / "one", "--only", "slide3") == 0
    assert list(contents(tmp_path / "one")) == ["slide3.tokens.h5"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("flip", "content does not match its checksum"),
        ("cut", "cut off"),
        ("missing", "No such file"),
        ("index", "pack.json: not the index of a pack"),
        ("index flip", "pack.json: does not match its checksum"),
        ("beside", "build_log.jsonl: is missing or changed"),
    ],
)
def test_damage_is_named(damage: str, words: str, tokens: Path, tmp_path: Path, capsys):
    pack = tmp_path / "pack"
    assert run("pack", tokens, "--out", pack) == 0
    shard = shard_path(pack, 0)
    data = bytearray(shard.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 4
        shard.write_bytes(data)
    elif damage == "cut":
        shard.write_bytes(data[:-4096])
    elif damage == "missing":
        shard.unlink()
    elif damage == "beside":
        (pack / "build_log.jsonl").write_text("")
    else:
        text = (pack / INDEX).read_text()
        (pack / INDEX).write_text(text.replace("slide1", "slide7", 1) if damage == "index flip" else text[:100])
    assert run("verify", pack) in (1, 64)
    assert run("unpack", pack, "--out", tmp_path / "back") == 1
    captured = capsys.readouterr()
    assert words in captured.out + captured.err and "Traceback" not in captured.err
    assert not list(tmp_path.rglob("*.tmp-*"))


def test_names_that_would_leave_the_folder(tmp_path: Path):
    files = write_files(tmp_path / "f", {"a": b"1"})
    for name in ("../a", "x/y", "", "..", INDEX, "shard-00000.pack"):
        with pytest.raises(PackError, match="cannot be the name"):
            write_pack({name: files["a"]}, tmp_path / "p", 100)
    write_pack(files, tmp_path / "p", 100)
    index = json.loads((tmp_path / "p" / INDEX).read_text())
    index["entries"][0][0] = "../evil"
    body = {key: index[key] for key in ("entries", "shards", "beside")}
    index["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (tmp_path / "p" / INDEX).write_text(json.dumps(index, sort_keys=True))
    with pytest.raises(PackError, match=r"'\.\./evil' cannot be the name"):
        read_index(tmp_path / "p")


def test_what_is_in_the_way(tokens: Path, tmp_path: Path, capsys):
    pack = tmp_path / "pack"
    pack.mkdir()
    (pack / "other.txt").write_text("mine")
    assert run("pack", tokens, "--out", pack) == 64 and "other.txt: is in the way" in capsys.readouterr().err
    (pack / "other.txt").unlink()
    assert run("pack", tokens, "--out", pack) == 0
    assert run("pack", tokens, "--out", pack) == 64 and "already holds a pack" in capsys.readouterr().err
    assert run("pack", pack, "--out", tmp_path / "q") == 64 and "is a pack already" in capsys.readouterr().err
    assert run("pack", tmp_path / "none", "--out", tmp_path / "q") == 64
    assert run("pack", tokens, "--out", tokens) == 64 and "folder of its own" in capsys.readouterr().err
    assert run("pack", tokens, "--out", tmp_path / "q", "--shard-size", "lots") == 64
    assert not (tmp_path / "q").exists()


def test_what_is_no_pack(tokens: Path, tmp_path: Path, capsys):
    assert run("unpack", tokens, "--out", tmp_path / "b") == 64
    assert capsys.readouterr().err == f"error: {tokens}: not a pack (no {INDEX} in it)\n"
    assert run("unpack", tmp_path / "none", "--out", tmp_path / "b") == 64
    assert capsys.readouterr().err == f"error: {tmp_path / 'none'}: no such folder\n"
    assert run("pack", tokens, "--out", tmp_path / "p") == 0
    assert run("unpack", tmp_path / "p", "--out", tmp_path / "b", "--only", "slide9") == 64
    assert run("unpack", tmp_path / "p", "--out", tmp_path / "p") == 64
    assert not (tmp_path / "b").exists()


def test_unpack_keeps_files_that_differ(tokens: Path, tmp_path: Path, capsys):
    pack, back = tmp_path / "pack", tmp_path / "back"
    assert run("pack", tokens, "--out", pack) == 0
    back.mkdir()
    (back / "slide3.tokens.h5").write_bytes(b"mine")
    (back / "build_log.jsonl").write_bytes(b"mine too")
    before = contents(back)
    capsys.readouterr()
    assert run("unpack", pack, "--out", back) == 64
    said = capsys.readouterr().err
    assert "build_log.jsonl: differs from what the pack holds (and 1 more); --force replaces it" in said
    assert contents(back) == before
    assert run("unpack", pack, "--out", back, "--only", "slide1") == 0  # it is not in the way of others
    assert "1 file -> " in capsys.readouterr().out
    assert run("unpack", pack, "--out", back, "--force") == 0
    wanted = {name: data for name, data in contents(tokens).items() if name != "notes.txt"}
    assert contents(back) == wanted
    times = {path.name: path.stat().st_mtime_ns for path in back.iterdir()}
    assert run("unpack", pack, "--out", back) == 0
    assert times == {path.name: path.stat().st_mtime_ns for path in back.iterdir()}


def test_a_damaged_token_file_is_not_packed(tokens: Path, tmp_path: Path, capsys):
    path = token_path(tokens, "slide2")
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    assert run("pack", tokens, "--out", tmp_path / "pack") == 1
    assert "slide2.tokens.h5: content does not match" in capsys.readouterr().err
    assert not (tmp_path / "pack").exists()


def test_after_a_kill_whole_shards_are_kept(tokens: Path, tmp_path: Path, monkeypatch):
    files = {path.name: path for path in tokens.glob("*.h5")}
    calm = write_pack(files, tmp_path / "calm", 60_000)
    assert len(calm.shards) > 2
    written = []
    real = pack_format._write_shard

    def counting(files, names, number, folder):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(number)
        return real(files, names, number, folder)

    monkeypatch.setattr(pack_format, "_write_shard", counting)
    with pytest.raises(KeyboardInterrupt):
        write_pack(files, tmp_path / "pack", 60_000)
    assert not (tmp_path / "pack" / INDEX).exists()
    (tmp_path / "pack" / ".shard-00002.pack.tmp-host-1").write_bytes(b"left")
    data = bytearray(shard_path(tmp_path / "pack", 0).read_bytes())
    data[5000] ^= 1
    shard_path(tmp_path / "pack", 0).write_bytes(data)
    written.clear()
    written.append(-1)
    monkeypatch.setattr(pack_format, "_write_shard", lambda *a: (written.append(a[2]), real(*a))[1])
    assert write_pack(files, tmp_path / "pack", 60_000) == calm
    assert written[1:] == [0, *range(2, len(calm.shards))]  # shard 1 was whole
    assert contents(tmp_path / "pack") == contents(tmp_path / "calm")


def test_full_disk(tokens: Path, tmp_path: Path):
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    done = subprocess.run(
        command("pack", tokens, "--out", tmp_path / "pack"),
        cwd=ROOT,
        env=plain_env(),
        capture_output=True,
        text=True,
        preexec_fn=small_files,
    )
    assert done.returncode == 1 and "shard-00000.pack" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert list((tmp_path / "pack").iterdir()) == []


def test_a_pack_survives_fork(tokens: Path, tmp_path: Path):
    assert run("pack", tokens, "--out", tmp_path / "pack") == 0
    whole = read_tokens(token_path(tmp_path / "pack", "slide0"))[0]
    pid = os.fork()
    if pid == 0:
        same = all(
            np.array_equal(read_tokens(token_path(tmp_path / "pack", "slide0"))[0].tokens, whole.tokens)
            for _ in range(20)
        )
        os._exit(0 if same else 1)
    for _ in range(20):
        assert np.array_equal(read_tokens(token_path(tmp_path / "pack", "slide0"))[0].tokens, whole.tokens)
    assert os.waitpid(pid, 0)[1] == 0
    shutil.rmtree(tmp_path / "pack")
