"""A real browser without a window: what a page asks for, what it complains of, how wide it is, what it looks like."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--no-first-run", "--disable-extensions", "--disable-background-networking", "--disable-sync"),
    *("--remote-debugging-pipe", "--force-color-profile=srgb"),
)


def browser_path() -> str | None:
    """Where a browser is that knows the DevTools protocol."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class Seen:
    """What a browser saw of a page."""

    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    overflow: int = 0
    """Pixels that the page is wider than the window."""
    values: dict[str, Any] = field(default_factory=dict)


class Browser:
    """One browser, spoken to through its pipe (DevTools protocol), one page at a time."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back = to, back
        self._number, self._rest = 0, b""
        self._events: list[dict[str, Any]] = []
        self._session: str | None = None

    def look(
        self,
        page: Path,
        width: int = 1600,
        *,
        dark: bool = False,
        media: str = "screen",
        scripts: bool = True,
        picture: Path | None = None,
        ask: dict[str, str] | None = None,
        before: str = "",
    ) -> Seen:
        """Open a page in a window of some width; `ask` are scripts whose values are wanted, run after `before`."""
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        self._call(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", {"media": media, "features": [scheme]})
        if not scripts:
            self._call("Emulation.setScriptExecutionDisabled", {"value": True})

        self._events.clear()
        self._call("Page.navigate", {"url": page.absolute().as_uri()})
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._events.append(self._message())

        if before:
            self._value(before)
        seen = Seen(values={name: self._value(script) for name, script in (ask or {}).items()})
        seen.overflow = self._value("document.documentElement.scrollWidth - window.innerWidth")
        if picture is not None:
            shot = self._call("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True})
            picture.write_bytes(base64.b64decode(shot["data"]))
        self._call("Runtime.evaluate", {"expression": "1"})
        self._note(seen, page)
        self._call("Page.disable")
        self._session = None
        self._call("Target.closeTarget", {"targetId": target})
        return seen

    def _value(self, script: str) -> Any:
        found = self._call("Runtime.evaluate", {"expression": script, "returnByValue": True})
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def _note(self, seen: Seen, page: Path) -> None:
        for event in self._events:
            method, parameters = event["method"], event["params"]
            if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                seen.complaints.append(json.dumps(parameters)[:300])
            if method == "Network.requestWillBeSent":
                url = parameters["request"]["url"]
                if not url.startswith("data:") and url != page.absolute().as_uri():
                    seen.requests.append(url)

    def _call(self, method: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters or {}}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")

        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer)
                result: dict[str, Any] = answer["result"]
                return result
            self._events.append(answer)

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._back, 1 << 20)
            assert part, "the browser has ended"
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message


@contextmanager
def open_browser(options: Sequence[str] = ()) -> Iterator[Browser]:
    """A browser with a profile of its own, which ends with the block."""
    path = browser_path()
    assert path is not None
    # It reads from its descriptor 3 and writes to 4.
    (read, to), (back, write) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory() as profile:
        command = [path, *OPTIONS, *options, f"--user-data-dir={profile}", "about:blank"]
        shell = f'exec "$@" 3<&{read} 4>&{write}'
        process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command],
            pass_fds=(read, write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(write)
        try:
            yield Browser(to, back)
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
            os.close(to)
            os.close(back)
