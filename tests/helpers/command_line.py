"""`python -m launch` in this process, and the one line of a command that refused."""

import contextlib
import io
import os
import subprocess
from unittest import mock

from launch.__main__ import main
from tests.helpers.repository import ROOT
from tests.helpers.small_runs import clean_env


def launch(*words: object, **env: str) -> subprocess.CompletedProcess[str]:
    """`python -m launch WORDS`, without the second that a new Python takes."""
    out, err = io.StringIO(), io.StringIO()
    environment = mock.patch.dict(os.environ, clean_env() | {"PREFLIGHT": "0"} | env, clear=True)
    with environment, contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def error(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a command that refused."""
    assert done.returncode == 64, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line
