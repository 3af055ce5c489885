"""Headless Chromium, driven over its debugging pipe: no port, no driver program, no further dependency.

https://chromedevtools.github.io/devtools-protocol/; `--remote-debugging-pipe` reads commands from file descriptor 3 and
writes answers to 4, as JSON ended by a NUL each.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SWITCHES = (
    *("--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--disable-gpu", "--hide-scrollbars"),
    *("--no-first-run", "--disable-extensions", "--disable-background-networking", "--disable-component-update"),
    *("--disable-dev-shm-usage", "--disable-sync", "--disable-default-apps", "--force-color-profile=srgb"),
)
PATIENCE = 180.0


def binary() -> str | None:
    """Return the path of a Chromium, None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a headless Chromium.

    Args:
        profile: an empty folder for its files.
    """

    def __init__(self, profile: Path) -> None:
        ours, theirs = os.pipe(), os.pipe()
        read_end, write_end = ours[0], theirs[1]

        def adopt() -> None:
            # Copies of high numbers first, so that neither end can be overwritten by the other.
            high = os.dup2(read_end, 100), os.dup2(write_end, 101)
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        path = binary()
        assert path is not None
        self.process = subprocess.Popen(
            [path, *SWITCHES, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=adopt,
        )
        os.close(read_end)
        os.close(write_end)
        self._write, self._read = ours[1], theirs[0]
        self._held, self._number = b"", 0
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **values: Any) -> dict[str, Any]:
        """Send a command and return its result; events that come meanwhile are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": values}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + PATIENCE
        while True:
            answer = self._next(until)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])

    def _next(self, until: float) -> dict[str, Any]:
        """The next message; an event is kept too."""
        while b"\0" not in self._held:
            ready, _, _ = select.select([self._read], [], [], max(0.0, until - time.monotonic()))
            assert ready, "Chromium does not answer"
            piece = os.read(self._read, 1 << 20)
            assert piece, "Chromium has gone"
            self._held += piece
        text, self._held = self._held.split(b"\0", 1)
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message

    def named(self, method: str) -> list[dict[str, Any]]:
        """Return what the events of one kind say."""
        return [event["params"] for event in self.events if event["method"] == method]

    def open(self, page: Path, *, width: int = 1280, height: int = 900, dark: bool = False, media: str = "") -> None:
        """Load a file and wait until it stands; forgets the events before."""
        self.events.clear()
        self.size(width, height)
        self.media(media, dark=dark)
        self.call("Page.navigate", url=page.resolve().as_uri())
        self.wait(lambda: bool(self.named("Page.loadEventFired")))
        # Whatever was pointed at on the page before is so no more.
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=0, y=0)
        # What a page starts when it stands is over after two frames.
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")

    def open_without_scripts(self, page: Path) -> None:
        """Load a file while scripts are forbidden, so that nothing can be asked of the page."""
        self.events.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        self.wait(lambda: bool(self.named("Page.loadEventFired")))

    def wait(self, done: Callable[[], bool]) -> None:
        """Read events until something holds."""
        until = time.monotonic() + PATIENCE
        while not done():
            self._next(until)

    def size(self, width: int, height: int) -> None:
        """Set the size of the window in CSS pixels; a narrow one is a phone."""
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )

    def media(self, name: str = "", *, dark: bool = False) -> None:
        """Show the page on `print` or the screen, in light or dark."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=name, features=[scheme])

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page; promises are awaited."""
        found = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def hover(self, selector: str) -> None:
        """Move the pointer onto the first element of a selector."""
        self._pointer("mouseMoved", selector)

    def click(self, selector: str) -> None:
        """Press and release on the first element of a selector."""
        self._pointer("mouseMoved", selector)
        for kind in ("mousePressed", "mouseReleased"):
            self._pointer(kind, selector, button="left", clickCount=1)

    def _pointer(self, kind: str, selector: str, **more: Any) -> None:
        where = self.run(
            f"""(() => {{ const item = document.querySelector({json.dumps(selector)});
            item.scrollIntoView({{block: "center", behavior: "instant"}}); const box = item.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2]; }})()"""
        )
        self.call("Input.dispatchMouseEvent", type=kind, x=where[0], y=where[1], **more)

    def press(self, key: str) -> None:
        """Press and release a key by its DOM name."""
        code = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code[key])

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """Write what is seen as PNG."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def pdf(self) -> bytes:
        """Return the page as it would be printed."""
        found = self.call("Page.printToPDF", printBackground=True, preferCSSPageSize=True)
        return base64.b64decode(found["data"])

    def close(self) -> None:
        """End the browser."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._write)
        os.close(self._read)
