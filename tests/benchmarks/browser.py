"""Opens a page in Chromium and tells what came of it, through the DevTools protocol over two pipes."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE_SECONDS = 100.0
# Chromium reads commands from descriptor 3 and answers on 4, which may be in use here.
_HAND_OVER = """
import os, sys
commands, answers, *browser = sys.argv[1:]
os.dup2(int(commands), 3)
os.dup2(int(answers), 4)
os.execv(browser[0], browser)
"""
_COMPLAINTS = ("Runtime.exceptionThrown", "Log.entryAdded", "Network.loadingFailed")


@dataclass
class Seen:
    """What a browser says of a page.

    Attributes:
        complaints: errors and warnings of its console, and requests that failed.
        requests: addresses that it asked for, those of data apart.
        images: of each image whether it is loaded, and its own width and height.
        shot: the window as PNG.
    """

    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    images: list[tuple[bool, int, int]] = field(default_factory=list)
    shot: bytes = b""


def look_at(page: Path, profile: Path, *, width: int, height: int) -> Seen:
    """Open `page`, with the browser's own files in folder `profile`."""
    seen = Seen()
    with _browser(profile) as browser:
        target = browser.ask("Target.createTarget", url="about:blank")["targetId"]
        browser.session = browser.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            browser.ask(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        browser.ask("Emulation.setDeviceMetricsOverride", **size)
        browser.ask("Page.navigate", url=page.as_uri())
        browser.wait_for("Page.loadEventFired")
        images = "[...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight])"
        found = browser.ask("Runtime.evaluate", expression=images, returnByValue=True)
        seen.images = [tuple(image) for image in found["result"]["value"]]
        seen.shot = base64.b64decode(browser.ask("Page.captureScreenshot", format="png")["data"])
        for event in browser.events:
            what, told = event["method"], event["params"]
            loud = what == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning")
            if loud or what in _COMPLAINTS:
                seen.complaints.append(json.dumps(event))
            elif what == "Network.requestWillBeSent" and not told["request"]["url"].startswith("data:"):
                seen.requests.append(told["request"]["url"])
    return seen


class _Conversation:
    def __init__(self, commands: int, answers: int) -> None:
        self.session = ""
        self.events: list[dict[str, Any]] = []
        self._commands, self._answers = commands, answers
        self._number, self._rest = 0, b""

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def wait_for(self, event: str) -> None:
        while not any(known["method"] == event for known in self.events):
            self._next()

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_SECONDS
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while b"\0" not in self._rest:
                assert selector.select(deadline - time.monotonic()), "the browser says nothing"
                more = os.read(self._answers, 2**20)
                assert more, "the browser has ended"
                self._rest += more
        text, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message


@contextlib.contextmanager
def _browser(profile: Path) -> Iterator[_Conversation]:
    assert BROWSER is not None
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    # Above the descriptors that Chromium expects.
    high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]
    command = [sys.executable, "-S", "-c", _HAND_OVER, *map(str, high), BROWSER]
    command += ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
    command += ["--disable-background-networking", f"--user-data-dir={profile}"]
    silent = subprocess.DEVNULL
    process = subprocess.Popen(command, pass_fds=high, stdin=silent, stdout=silent, stderr=silent)
    for end in (theirs_in, theirs_out, *high):
        os.close(end)
    try:
        yield _Conversation(ours_out, ours_in)
    finally:
        process.kill()
        process.wait()
        os.close(ours_out)
        os.close(ours_in)
