"""A headless Chromium for tests of pages, spoken to over a pipe; no driver package is needed."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_PATIENCE_S = 240.0
_MEASURE = """
(() => {
  const page = document.documentElement;
  const heading = [...document.querySelectorAll("h2,h3")].find(h => h.textContent == TITLE);
  const part = heading && heading.tagName == "H2" ? heading.closest("section") : heading;
  const top = part ? part.getBoundingClientRect().top - 16 : 0;
  const cells = [...document.querySelectorAll("table.wrap td:not(.num)")];
  const narrowest = Math.min(9999, ...cells.map(c => c.getBoundingClientRect().width));
  return JSON.stringify([page.scrollWidth, page.scrollHeight, narrowest, Math.max(0, top)]);
})()
"""


def find_browser() -> str | None:
    """A Chromium of this machine; None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@dataclass
class Shown:
    """What a browser made of a page: complaints, what it asked the network for, its sizes."""

    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    width_px: int = 0
    height_px: int = 0
    narrowest_px: float = 0.0
    """the narrowest cell of running text"""
    png: bytes = field(default=b"", repr=False)


class Browser:
    """One browser process; ``show`` opens a page in a tab of its own."""

    def __init__(self, profile: Path) -> None:
        program = find_browser()
        assert program is not None
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (to_read, to_write)]
        flags = "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --no-first-run"
        flags += " --remote-debugging-pipe --force-color-profile=srgb --disable-extensions"

        def connect() -> None:
            """What Chromium reads and writes: file descriptors 3 and 4."""
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self._process = subprocess.Popen(
            [program, *flags.split(), f"--user-data-dir={profile}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,  # all but these two close themselves
            preexec_fn=connect,  # noqa: PLW1509
        )
        for end in (to_read, to_write, *ends):
            os.close(end)
        self._number = 0
        self._unread = b""
        self._events: list[dict[str, Any]] = []

    def close(self) -> None:
        with contextlib.suppress(OSError, AssertionError):
            self._send("Browser.close", {})
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def show(
        self,
        page: Path,
        *,
        width_px: int = 1200,
        dark: bool = False,
        medium: str = "screen",
        section: str = "",
        height_px: int | None = None,
        scale: float = 1.0,
    ) -> Shown:
        """Open ``page`` and picture it: whole, or ``height_px`` of it from a heading on."""
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        flat = {"targetId": target, "flatten": True}
        session = self._call("Target.attachToTarget", flat)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            self._call(f"{domain}.enable", {}, session)
        size = {"width": width_px, "height": 900, "deviceScaleFactor": 1, "mobile": width_px < 600}
        self._call("Emulation.setDeviceMetricsOverride", size, session)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", {"media": medium, "features": [theme]}, session)
        self._events.clear()
        self._call("Page.navigate", {"url": page.resolve().as_uri()}, session)
        self._wait_for("Page.loadEventFired")
        measure = _MEASURE.replace("TITLE", json.dumps(section))
        found = self._call("Runtime.evaluate", {"expression": measure}, session)
        shown = Shown()
        measured = json.loads(found["result"]["value"])
        shown.width_px, shown.height_px, shown.narrowest_px, top = measured
        clip = {"x": 0, "y": top, "width": width_px, "scale": scale}
        clip["height"] = min(height_px or shown.height_px, shown.height_px - top)
        asked = {"format": "png", "captureBeyondViewport": True, "clip": clip}
        shown.png = base64.b64decode(self._call("Page.captureScreenshot", asked, session)["data"])
        for event in self._events:
            self._note(event, shown)
        self._call("Target.closeTarget", {"targetId": target})
        return shown

    def _note(self, event: dict[str, Any], shown: Shown) -> None:
        what, said = event["method"], event.get("params", {})
        if what == "Log.entryAdded":
            shown.complaints.append(str(said["entry"]["text"]))
        elif what in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Audits.issueAdded"):
            shown.complaints.append(json.dumps(said)[:400])
        elif what == "Network.requestWillBeSent":
            shown.requests.append(str(said["request"]["url"])[:200])

    def _call(self, method: str, said: dict[str, Any], session: str = "") -> dict[str, Any]:
        number = self._send(method, said, session)
        for message in self._messages():
            if message.get("id") == number:
                assert "error" not in message, message
                found: dict[str, Any] = message["result"]
                return found
            if "method" in message:
                self._events.append(message)
        raise AssertionError(f"no answer to {method}")

    def _send(self, method: str, said: dict[str, Any], session: str = "") -> int:
        self._number += 1
        message = {"id": self._number, "method": method, "params": said}
        if session:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        return self._number

    def _wait_for(self, method: str) -> None:
        if any(event["method"] == method for event in self._events):
            return
        for message in self._messages():
            if "method" in message:
                self._events.append(message)
            if message.get("method") == method:
                return

    def _messages(self) -> Iterator[dict[str, Any]]:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            while b"\0" in self._unread:
                raw, _, self._unread = self._unread.partition(b"\0")
                yield json.loads(raw)
            left = deadline - time.monotonic()
            assert left > 0, "the browser does not answer"
            if select.select([self._from], [], [], left)[0]:
                piece = os.read(self._from, 1 << 20)
                assert piece, "the browser ended"
                self._unread += piece
