"""A light HTTP client for streamed answers, and their times as such a client sees them.

    python -m teal_fast.benchmarks.http_client < jobs

As a program it reads jobs, one JSON object {"port", "path", "body"} a line, and writes one line of JSON for each: what
was answered and when. It is a process of its own, imports the standard library only and reads no JSON before an answer
is whole, so that it leaves the processor to the server.
"""

import http.client
import json
import socket
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any, Self

RESET = struct.pack("ii", 1, 0)  # linger for no time: closing says RST, as of a client that is gone


class Exchange:
    """One request and its answer, on a connection of its own to a port of the loopback.

    timeout: the seconds that nothing may come for, else it raises TimeoutError. What the server closes early raises
    ConnectionError or http.client.HTTPException.
    """

    def __init__(self, port: int, method: str, path: str, body: Any = None, timeout: float = 600.0):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
        data = None if body is None else json.dumps(body).encode()
        try:
            self.connection.request(method, path, data, {"Content-Type": "application/json"})
        except OSError:
            self.connection.close()
            raise
        self.socket, self.response = self.connection.sock, None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.connection.close()
        if self.response is not None:
            self.response.close()

    def answered(self) -> int:
        """The status, once it has come."""
        self.response = self.connection.getresponse()
        return self.response.status

    def read(self) -> Any:
        """The whole answer's JSON."""
        return json.loads(self.response.read())

    def events(self) -> Iterator[bytes]:
        """The data of server-sent events as they come; each is one line here, as every server writes them."""
        held = b""
        while data := self.response.read1(1 << 16):  # a third of the time that reading lines takes
            *lines, held = (held + data).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip()

    def wait(self, seconds: float) -> None:
        """From now on nothing may come for at most so long."""
        self.socket.settimeout(seconds)

    def cut(self) -> None:
        """Leaves at once, as a client that was killed."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.__exit__()


def piece(event: dict) -> str:
    """The text in one event of a completion or of a chat."""
    choice = next(iter(event.get("choices") or ()), {})
    return choice.get("text") or (choice.get("delta") or {}).get("content") or ""


def timed(port: int, path: str, body: dict) -> dict:
    """Posts a streamed request: its status, its text, seconds to the first and the last piece of it, its usage."""
    started = time.perf_counter()
    with Exchange(port, "POST", path, body) as exchange:
        if (status := exchange.answered()) != 200:
            return {"status": status, "error": exchange.read()}
        came = [(time.perf_counter() - started, data) for data in exchange.events()]
    events = [(seconds, json.loads(data)) for seconds, data in came if data != b"[DONE]"]
    pieces = [(seconds, text) for seconds, event in events if (text := piece(event))]
    reasons = [choice.get("finish_reason") for _, event in events for choice in event.get("choices") or ()]
    return {
        "status": status,
        "text": "".join(text for _, text in pieces),
        "first_s": pieces[0][0] if pieces else None,
        "last_s": pieces[-1][0] if pieces else None,
        "finish_reason": next(filter(None, reasons), None),
        "usage": next((event["usage"] for _, event in reversed(events) if event.get("usage")), {}),
    }


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(timed(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
