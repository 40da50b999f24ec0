"""Servers to be measured or tried, each a process of its own on a free port of the loopback."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

from teal_fast.benchmarks.http_client import Exchange
from teal_fast.files.paths import ROOT

START = 300.0  # seconds that loading may take
STOP = 30.0


class Server:
    """A running server, ready once it is made. Raises ValueError with what it said last if it ends before.

    words: its command, to which `--port` and a free port are added.
    """

    def __init__(self, words: list[str]):
        self.words, self.port, self.said = words, free_port(), tempfile.TemporaryFile()  # noqa: SIM115
        command = [*words, "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.said, stderr=subprocess.STDOUT)
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def _wait(self) -> None:
        deadline = time.monotonic() + START
        while not self.healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise ValueError(f"{' '.join(self.words[:4])} … does not serve: {self.last_line()}")
            time.sleep(0.1)

    def healthy(self) -> bool:
        """Whether it says that it is ready."""
        try:
            with Exchange(self.port, "GET", "/health", timeout=5) as exchange:
                return exchange.answered() == 200
        except (OSError, http.client.HTTPException):
            return False

    def last_line(self) -> str:
        """What it said last."""
        self.said.seek(0)
        return next(iter(self.said.read().decode(errors="replace").strip().splitlines()[-1:]), "it said nothing")

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def memory(self) -> int:
        """Bytes of memory that are its own, with its share of what it has in common with others (PSS)."""
        lines = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """Ends it, by force if it does not drain in time; its exit code."""
        self.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP)
        self.process.kill()
        code = self.process.wait()
        self.said.close()
        return code


def ours(checkpoint: str | Path, *words: str) -> list[str]:
    """The command of our own server."""
    return [sys.executable, str(ROOT / "serve.py"), "--checkpoint", str(checkpoint), *words]


def free_port() -> int:
    """A port that nothing listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
