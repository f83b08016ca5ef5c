"""A headless Chromium spoken to over its debugging pipe: what a page looks like, what its keys do, what it prints."""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find() -> str | None:
    """The path of an installed Chromium or Chrome, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def _until(ask: Callable[[], Any], limit_s: float = 120) -> Any:
    """What `ask` gives once it gives anything; the browser may still be starting or reading."""
    until = time.monotonic() + limit_s
    while not (answer := ask()):
        assert time.monotonic() < until, "the browser does not get there"
        time.sleep(0.02)
    return answer


class Browser:
    """One page in a browser without a window.

    Args:
        program: What `find` gave.
        profile: An empty folder for the browser's own files.
        width_px: Of the window.
        height_px: Of the window.
    """

    def __init__(self, program: str, profile: Path, width_px: int = 1280, height_px: int = 900):
        to_it, mine = os.pipe()
        its, from_it = os.pipe()
        # The pipe's ends must be descriptors 3 and 4 of the browser; a shell gives them these numbers.
        command = (
            f'exec "{program}" --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars '
            f'--no-first-run --user-data-dir="{profile}" --window-size={width_px},{height_px} '
            f"--remote-debugging-pipe about:blank 3<&{to_it} 4>&{from_it}"
        )
        with (profile.parent / "browser.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", command], pass_fds=(to_it, from_it), stdout=log, stderr=log, start_new_session=True
            )
        os.close(to_it)
        os.close(from_it)
        self._write, self._read = mine, its
        self._rest, self._last, self._session = b"", 0, None
        try:
            page = _until(self._first_page)
            self._session = self._ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        except BaseException:
            self.close()
            raise

    def _first_page(self) -> str | None:
        targets = self._ask("Target.getTargets")["targetInfos"]
        return next((t["targetId"] for t in targets if t["type"] == "page"), None)

    def close(self) -> None:
        """End the browser and all its processes."""
        os.close(self._write)
        os.close(self._read)
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self._process.wait()

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command of the DevTools protocol and return its result."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(120)
            if answer.get("id") == self._last:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self, limit_s: float) -> dict[str, Any]:
        until = time.monotonic() + limit_s
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, until - time.monotonic()))
            data = os.read(self._read, 1 << 20) if ready else b""
            assert data, "the browser does not answer"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def open(self, path: Path) -> None:
        """Show a file and wait until all of it is there."""
        self._ask("Page.enable")
        self._ask("Page.navigate", url=path.resolve().as_uri())
        _until(lambda: self.run(f"document.readyState == 'complete' && location.href == '{path.resolve().as_uri()}'"))

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self._ask("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """Press and release one key."""
        for kind in ("rawKeyDown", "keyUp"):
            self._ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def resize(self, width_px: int, height_px: int) -> None:
        """Give the page another window."""
        self._ask(
            "Emulation.setDeviceMetricsOverride", width=width_px, height=height_px, deviceScaleFactor=1, mobile=False
        )

    def picture(self) -> bytes:
        """A PNG of the window."""
        return base64.b64decode(self._ask("Page.captureScreenshot", format="png")["data"])

    def pdf(self) -> bytes:
        """The page as it prints, on the paper its style sheet asks for."""
        return base64.b64decode(self._ask("Page.printToPDF", preferCSSPageSize=True, printBackground=False)["data"])

    def names(self) -> list[tuple[str, str]]:
        """Role and name of everything that a screen reader would come by, in order."""
        self._ask("Accessibility.enable")
        nodes = self._ask("Accessibility.getFullAXTree")["nodes"]
        return [
            (n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n["ignored"] and "role" in n
        ]
