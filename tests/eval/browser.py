"""A headless Chromium, driven through its own protocol over a pipe: no library, no port, no network."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# --host-rules: whatever a page might ask of a network fails at once.
FLAGS = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-dev-shm-usage --no-first-run"
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND"


class Browser:
    """One page in one browser. Use as a context manager."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="chromium-")
        hear, answer = os.pipe(), os.pipe()  # what the browser hears, and what it answers
        command = f'exec "$0" "$@" 3<&{hear[0]} 4>&{answer[1]}'
        flags = [*FLAGS.split(), OFFLINE, f"--user-data-dir={self.folder}", "--remote-debugging-pipe", "about:blank"]
        self.process = subprocess.Popen(
            ["bash", "-c", command, str(CHROMIUM), *flags],
            pass_fds=(hear[0], answer[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(hear[0])
        os.close(answer[1])
        self._out, self._in = os.fdopen(hear[1], "wb"), os.fdopen(answer[0], "rb")
        self._rest, self._number, self._session = b"", 0, ""
        self.complaints: list[str] = []  # errors and warnings of the console, and what failed to load
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for part in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{part}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *exception: object) -> None:
        self._out.close()
        self.process.kill()
        self.process.wait()
        self._in.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def ask(self, method: str, **parameters: Any) -> Any:
        """One call of the protocol and its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        self._out.flush()
        while (found := self._next()).get("id") != self._number:
            self._note(found)
        assert "error" not in found, found
        return found["result"]

    def open(self, page: Path, *, width: int, dark: bool = False) -> None:
        """Show a file in a window of this many CSS pixels, and wait until it is there."""
        self.complaints.clear()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=page.as_uri())
        while not self.value("document.readyState === 'complete' && location.protocol === 'file:'"):
            pass

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript comes to."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """One key, such as ("Tab", 9) or ("Enter", 13)."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def picture(self, path: Path, height: int | None = None) -> None:
        """A PNG of the whole page, or of its top."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": height or size["height"], "scale": 1}
        shot = self.ask("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._in.fileno(), 1 << 16)
            assert part, "the browser has gone"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def _note(self, event: dict[str, Any]) -> None:
        details = event.get("params", {})
        kinds = {
            "Runtime.exceptionThrown": True,
            "Runtime.consoleAPICalled": details.get("type") in ("error", "warning", "assert"),
            "Log.entryAdded": True,
            "Network.loadingFailed": True,
        }
        if kinds.get(event.get("method", "")):
            self.complaints.append(json.dumps(details)[:500])
