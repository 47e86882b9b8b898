"""A debugger attaches to main.py: the commands of docs/debugging.md, with a client that speaks its protocol (DAP) over a socket."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

MAIN = ROOT / "main.py"
COMPLAINT = ROOT / "errors.py"  # where a mistake of the user's arrives
BIN = Path(sys.executable).parent
needs_debugpy = pytest.mark.skipif(importlib.util.find_spec("debugpy") is None, reason="needs debugpy")
needs_debugpy_run = pytest.mark.skipif(not (BIN / "debugpy-run").exists(), reason="needs debugpy-run")


class Client:
    """What an editor does: `ask("attach")`, `until("stopped")`."""

    def __init__(self, port: int, seconds: float = 40.0) -> None:
        until = time.monotonic() + seconds
        while True:
            try:
                self.socket = socket.create_connection(("127.0.0.1", port), timeout=seconds)
                break
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
        self.stream, self.number, self.seen = self.socket.makefile("rb"), 0, []

    def send(self, command: str, **arguments) -> int:
        self.number += 1
        body = {"seq": self.number, "type": "request", "command": command, "arguments": arguments}
        text = json.dumps(body).encode()
        self.socket.sendall(b"Content-Length: %d\r\n\r\n%s" % (len(text), text))
        return self.number

    def read(self) -> dict:
        length = 0
        while (line := self.stream.readline()) != b"\r\n":
            assert line, f"the connection ended after {self.seen[-5:]}"
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        self.seen.append(json.loads(self.stream.read(length)))
        return self.seen[-1]

    def until(self, event: str) -> dict:
        """The body of the next event of this name."""
        while (message := self.read()).get("event") != event:
            pass
        return message.get("body", {})

    def ask(self, command: str, **arguments) -> dict:
        """The body of the answer."""
        number = self.send(command, **arguments)
        while (message := self.read()).get("request_seq") != number:
            pass
        assert message["success"], message
        return message.get("body", {})

    def attach(self, path: Path, line: int) -> None:
        """With one breakpoint."""
        self.ask("initialize", adapterID="test", clientID="test", pathFormat="path", linesStartAt1=True)
        self.send("attach", justMyCode=False)
        self.until("initialized")
        found = self.ask("setBreakpoints", source={"path": str(path)}, breakpoints=[{"line": line}])
        assert found["breakpoints"][0]["verified"], found
        self.send("configurationDone")

    def evaluate(self, expression: str) -> str:
        """In the frame where it stopped."""
        thread = self.until("stopped")["threadId"]
        frame = self.ask("stackTrace", threadId=thread)["stackFrames"][0]
        answer = self.ask("evaluate", expression=expression, frameId=frame["id"])["result"]
        self.send("continue", threadId=thread)
        return answer


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def line_of(words: str) -> int:
    (found,) = [number for number, line in enumerate(COMPLAINT.read_text().splitlines(), 1) if words in line]
    return found


@pytest.fixture
def launch(tmp_path):
    """`launch(command)`: a process in an empty folder that speaks into the file `said`; its family is gone after the test.

    Not into a pipe: debugpy's adapter stays after its program while no debugger has come, and keeps the pipe open.
    """
    processes = []

    def begin(*command):
        environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}  # as in an activated .venv
        said = open(tmp_path / "said", "w")  # noqa: SIM115
        processes.append(
            subprocess.Popen(
                [*map(str, command)],
                cwd=tmp_path,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
        return processes[-1]

    yield begin
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


@needs_debugpy
def test_a_run_under_debugpy_is_the_same_run(launch, tmp_path):
    process = launch(sys.executable, "-m", "debugpy", "--listen", f"127.0.0.1:{free_port()}", MAIN, "--help")
    assert process.wait(60) == 0 and "--text TEXT" in (tmp_path / "said").read_text()


@needs_debugpy
def test_a_debugger_attaches_stops_at_a_breakpoint_and_sees_the_end(launch, tmp_path):
    """The exit status of main.py comes through."""
    port = free_port()
    command = ["-m", "debugpy", "--listen", f"127.0.0.1:{port}", "--wait-for-client"]
    process = launch(sys.executable, *command, MAIN, "--text", "a chair", "--itters", "3")
    client = Client(port)
    client.attach(COMPLAINT, line_of("return _complain(str(error))"))
    assert "unknown flag --itters" in client.evaluate("str(error)")
    client.until("terminated")
    assert process.wait(20) == 2
    assert "error: unknown flag --itters" in (tmp_path / "said").read_text()


@needs_debugpy
@needs_debugpy_run
@pytest.mark.parametrize("separator", [["--"], []])
def test_debugpy_run_waits_for_a_debugger(separator, launch, tmp_path):
    port = free_port()
    process = launch(
        BIN / "debugpy-run", "-E", "-p", f"127.0.0.1:{port}", MAIN, *separator, "--text", "a chair", "--w", "0"
    )
    client = Client(port)
    client.attach(COMPLAINT, line_of("return _complain(str(error))"))
    assert "--w 0: must be > 0" in client.evaluate("str(error)")
    client.until("terminated")
    process.wait(20)
    assert "error: --w 0: must be > 0" in (tmp_path / "said").read_text()
