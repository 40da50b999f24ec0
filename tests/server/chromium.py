"""A headless Chromium for tests, spoken to in the DevTools protocol over a pipe: no package is needed, only a browser.

https://chromedevtools.github.io/devtools-protocol/ lists the calls. Chromium reads them from descriptor 3 and answers
on descriptor 4, each message one JSON object with a zero byte after it.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",  # root in a container cannot have one; the pages are our own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
)
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, ""), "ArrowUp": (38, ""), "ArrowRight": (39, "")}
MODIFIERS = {"alt": 1, "ctrl": 2, "shift": 8}
PATIENCE = 30  # seconds
READY = "document.readyState === 'complete' && document.querySelector('#model').textContent"


def find() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """One browser process; its pages share nothing."""

    def __init__(self, profile: str):
        reads, self.to = (_high(end) for end in os.pipe())
        self.back, writes = (_high(end) for end in os.pipe())
        quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
        pipes = [(os.POSIX_SPAWN_DUP2, reads, 3), (os.POSIX_SPAWN_DUP2, writes, 4)]
        command = [find(), *FLAGS, f"--user-data-dir={profile}"]
        self.pid = os.posix_spawn(command[0], command, os.environ, file_actions=quiet + pipes, setpgroup=0)
        os.close(reads)
        os.close(writes)
        self.count, self.rest, self.events = 0, b"", []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params, **({"sessionId": session} if session else {})}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (got := self._read()).get("id") != message["id"]:
            self.events.append(got)
        if "error" in got:
            raise RuntimeError(f"{method}: {got['error']}")
        return got["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            if not select.select([self.back], [], [], PATIENCE)[0]:
                raise TimeoutError("Chromium does not answer")
            if not (piece := os.read(self.back, 1 << 20)):
                raise RuntimeError("Chromium has ended")
            self.rest += piece
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def page(
        self, address: str, width: int = 1280, height: int = 800, theme: str = "light", ready: str = READY
    ) -> "Page":
        """Opens an address with empty storage, as on a screen of this size, and waits until `ready` is true."""
        page = Page(self, width, height, theme)
        page.call("Page.navigate", url=address)
        page.wait(ready)
        return page

    def close(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.to)
        os.close(self.back)


class Page:
    def __init__(self, browser: Chromium, width: int, height: int, theme: str):
        self.browser, self.start = browser, len(browser.events)
        self.context = browser.call("Target.createBrowserContext")["browserContextId"]
        made = browser.call("Target.createTarget", url="about:blank", browserContextId=self.context)
        self.session = browser.call("Target.attachToTarget", targetId=made["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        phone = {"deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, **phone)
        self.theme(theme)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def theme(self, name: str) -> None:
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        got = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in got:
            raise RuntimeError(f"{expression}: {got['exceptionDetails']['exception'].get('description')}")
        return got["result"].get("value")

    def wait(self, expression: str, seconds: float = PATIENCE) -> Any:
        """The expression's value as soon as it is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(expression)):
            if time.monotonic() > end:
                raise TimeoutError(f"not true within {seconds} s: {expression}")
            time.sleep(0.02)
        return value

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str, *modifiers: str) -> None:
        code, text = KEYS[key]
        held = sum(MODIFIERS[name] for name in modifiers)
        about = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": held}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def seen(self, *methods: str) -> list[dict[str, Any]]:
        """The events of these kinds since the page was opened."""
        self.run("0")  # what happened before it has been read after it
        events = self.browser.events[self.start :]
        return [e["params"] for e in events if e.get("sessionId") == self.session and e["method"] in methods]

    def screenshot(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def close(self) -> None:
        self.browser.call("Target.disposeBrowserContext", browserContextId=self.context)


def _high(descriptor: int) -> int:
    """The same end of a pipe with a number above those that Chromium wants."""
    higher = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return higher
