"""Browsers for the web viewer: its protocol spoken from Python, and a real one, headless Chromium moved by a small script for node."""

import io
import json
import math
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import viser
import zstandard
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

SCRIPT = Path(__file__).with_name("viewer_page.mjs")


class Client:
    """A browser without a screen: `messages` collects what the server sends (newest last), `picture` the newest picture it was sent."""

    def __init__(self, port: int) -> None:
        protocol = f"viser-v{viser.__version__}"
        self._socket = connect(f"ws://127.0.0.1:{port}", subprotocols=[protocol], max_size=None)
        self.messages: list[dict[str, Any]] = []
        self.picture, self.pictures, self.depth = None, 0, None
        self.news = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            for data in self._socket:
                self._take(data)
        except ConnectionClosed:
            pass

    def _take(self, data: bytes) -> None:
        length, coded = (int.from_bytes(data[i : i + 8], "little") for i in (0, 8))
        body = msgspec.msgpack.decode(zstandard.decompress(data[16 : 16 + coded], max_output_size=length))
        with self.news:
            for message in body["messages"]:
                self.messages.append(message)
                if message["type"] == "BackgroundImageMessage" and message["rgb_data"]:
                    self.picture = np.asarray(Image.open(io.BytesIO(message["rgb_data"])).convert("RGB"))
                    self.depth, self.pictures = message["depth_data"], self.pictures + 1
            self.news.notify_all()

    def wait(self, ready: Any, seconds: float = 20.0) -> Any:
        """What `ready()` says as soon as that is true."""
        with self.news:
            assert self.news.wait_for(ready, seconds), "the server has not answered"
            return ready()

    def close(self) -> None:
        self._socket.close()

    def send(self, **message: Any) -> None:
        self._socket.send(msgspec.msgpack.encode(message))

    def look(
        self, position: Any, target: Any = (0.0, 0.0, 0.0), width: int = 64, height: int = 48, fovy: float = 30.0
    ) -> None:
        """The camera has moved."""
        self.send(
            type="ViewerCameraMessage", wxyz=(1.0, 0.0, 0.0, 0.0), position=tuple(map(float, position)), fov=math.radians(fovy),
            near=0.01, far=1000.0, image_height=height, image_width=width, look_at=tuple(map(float, target)), up_direction=(0.0, 1.0, 0.0),
        )  # fmt: skip

    def control(self, label: str) -> dict[str, Any]:
        """The newest control with this label (or, of a button, this hint), as soon as there is one."""

        def find() -> dict[str, Any] | None:
            found = [
                m for m in self.messages if m["type"].startswith("Gui") and m.get("props", {}).get("label") == label
            ]
            return found[-1] if found else None

        return self.wait(find)

    def set(self, label: str, value: Any) -> None:
        """Change a control, or press a button."""
        self.send(type="GuiUpdateMessage", uuid=self.control(label)["uuid"], updates={"value": value})


class Chromium:
    """A page in headless Chromium. `requests` are the addresses it asked for outside of the server."""

    def __init__(self, playwright: Path, chromium: str, url: str, width: int = 900, height: int = 600) -> None:
        command = ["node", str(SCRIPT), str(playwright / "index.mjs"), chromium, url, str(width), str(height)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        assert line, "the browser has ended"
        return json.loads(line)

    def do(self, name: str, *arguments: Any) -> Any:
        self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def screenshot(self, path: Path) -> np.ndarray:
        self.do("screenshot", str(path))
        return np.asarray(Image.open(path).convert("RGB"))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(20)


def until(ready: Any, seconds: float = 20.0) -> Any:
    """What `ready()` says as soon as that is true."""
    end = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.02)
    return found
