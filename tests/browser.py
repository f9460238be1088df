"""A page in headless Chromium, over the DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Page:
    """One tab. Everything the page complains about, or asks of a network, is kept in ``errors`` and ``requests``."""

    def __init__(self, folder: Path) -> None:
        import websocket

        self.errors: list[str] = []
        self.requests: list[str] = []
        self._numbers = itertools.count(1)
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-default-apps",
            "--disable-sync",
            "--no-first-run",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--remote-debugging-port=0",
            "--remote-allow-origins=*",
            f"--user-data-dir={folder / 'profile'}",
        ]
        assert EXECUTABLE is not None
        self._process = subprocess.Popen(
            [EXECUTABLE, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            port_file = folder / "profile" / "DevToolsActivePort"
            while not port_file.is_file() or "\n" not in port_file.read_text():
                assert self._process.poll() is None, "Chromium ended before it was ready"
                time.sleep(0.05)
            port = port_file.read_text().splitlines()[0]
            targets = self._targets(port)
            address = next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page")
            self._socket = websocket.create_connection(
                address, socket=socket.create_connection(("127.0.0.1", int(port)))
            )
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def _targets(self, port: str) -> Any:
        """The file names the port a moment before it is served, seconds on a busy machine. No proxy leads to it."""
        direct = build_opener(ProxyHandler({}))
        while True:
            try:
                return json.load(direct.open(f"http://127.0.0.1:{port}/json/list"))
            except URLError:
                assert self._process.poll() is None, "Chromium ended before it was ready"
                time.sleep(0.05)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()

    def call(self, method: str, **parameters: Any) -> Any:
        """Send one command and wait for its answer, noting the events that come before it."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message.get('error')}"
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        parameters = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(json.dumps(parameters["exceptionDetails"]))
            case "Runtime.consoleAPICalled" if parameters["type"] in ("error", "assert", "warning"):
                self.errors.append(json.dumps(parameters["args"]))
            case "Log.entryAdded" if parameters["entry"]["level"] in ("error", "warning"):
                self.errors.append(parameters["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression; promises are awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def open(self, path: Path) -> None:
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def wait(self, condition: str) -> None:
        """Until a condition holds; ask for things that will surely come."""
        while not self.evaluate(condition):
            time.sleep(0.02)
        # Two frames later, what it led to has been drawn.
        self.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")

    def resize(self, width: int, height: int, *, mobile: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if mobile else 1,
            mobile=mobile,
        )
        self.wait("true")

    def dark(self, on: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if on else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.wait(f"matchMedia('(prefers-color-scheme: dark)').matches === {str(on).lower()}")

    def move(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.wait("true")

    def click(self, selector: str) -> None:
        """A real click in the middle of an element."""
        query = f"document.querySelector({json.dumps(selector)})"
        self.evaluate(f"{query}.scrollIntoView({{block: 'center'}})")
        box = self.evaluate(f"{query}.getBoundingClientRect().toJSON()")
        place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)
        self.wait("true")

    def press(self, key: str) -> None:
        codes = {"Tab": 9, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key])
        self.wait("true")

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))
