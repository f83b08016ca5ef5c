"""Where the repository and its sample slides lie, and how a test runs a command line there."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "data_prep" / "sample_data"
GLOMERULI = SAMPLES / "glomeruli24"
WSI = SAMPLES / "wsi"


def shell(command: str, timeout_s: float = 900, **env: str) -> subprocess.CompletedProcess[str]:
    """Run one command line from the repository, with this interpreter's programs first on PATH."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env={**os.environ, "PATH": path, **env},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
