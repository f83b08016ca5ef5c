"""Token files made on the disk: the bytes of those made in memory, and one line when there is no room."""

import io
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.token_files import token_file
from data_prep.token_files.token_file import new_meta, read_tokens, write_tokens
from data_prep.token_files.verify import verify_file
from tests.helpers.builds import leftovers, make_set, plain_env
from tests.helpers.repository import ROOT

META = new_meta(slide="s", params={"patch": 8}, size0_wh=[200, 256])

FILL = """
import sys
from pathlib import Path
from data_prep.token_files import token_file as store
from tests.helpers.builds import make_set
try:
    store.write_tokens(Path(sys.argv[1]), make_set(length=256), store.new_meta(slide="s"))
except OSError as error:
    print(error)
print("alive")
"""


@pytest.mark.parametrize("masks", [True, False])
def test_on_the_disk_as_in_memory(masks: bool, tmp_path: Path):
    token_set = make_set(masks=masks, length=256)
    target = tmp_path / "b.tokens.h5"
    write_tokens(target, token_set, META)
    assert leftovers(tmp_path) == []
    made = io.BytesIO()
    whole = {**META, "frame_px": token_set.size_px, "content_wh": list(token_set.content_wh)}
    token_file._fill(made, token_file._arrays_of(token_set), whole)
    assert target.read_bytes()[512:] == made.getvalue()[512:]
    read_tokens(target, check=True)
    assert verify_file(target) == []


@pytest.mark.parametrize("room", [0, 300, 3000, 20_000, 50_000])
def test_no_room_is_an_error_and_no_crash(room: int, tmp_path: Path):
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    target = tmp_path / "s.tokens.h5"
    done = subprocess.run(
        [sys.executable, "-B", "-c", FILL, str(target)],
        cwd=ROOT,
        env=plain_env(),
        capture_output=True,
        text=True,
        preexec_fn=small_files,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"[Errno 27] File too large: '{target}'\nalive\n"
    assert list(tmp_path.iterdir()) == []
