"""Malformed requests against a live server on this machine, made from its own description.

    python -m teal_fast.tests.server.fuzz --url http://127.0.0.1:8000 --cases 5000 --seed 1 --log server.log

Bodies that the description allows are changed in one place or more: other types, numbers out of range, fields gone,
nesting, no UTF-8, cut JSON; and requests have wrong methods, types and lengths. The server must answer each in time and
with no 5xx but 503, log no traceback, and answer a good request afterwards. Hypothesis shrinks what fails. Start the
server with a short context, `--max_seq_length 256`, so that a case whose max_tokens is gone ends soon.
"""

import argparse
import http.client
import json
import socket
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from hypothesis import HealthCheck, Phase, given, seed, settings

from teal_fast.tests.server.malformed import Case, cases

GOOD = {"prompt": "Hello", "max_tokens": 1}
EVERY = 25  # cases, after which a good request must be answered


class Fault(AssertionError):
    """What the server must not do."""


def send(url: str, case: Case, timeout: float) -> tuple[int, bytes]:
    """Status and body. Raises OSError or HTTPException where no whole answer comes."""
    parts = urlsplit(url)
    head = [f"{case.method} {case.path} HTTP/1.1", f"Host: {parts.netloc}", "Connection: close"]
    head += [f"{name}: {value}" for name, value in case.headers]
    body = case.body
    if case.length is None:
        head.append("Transfer-Encoding: chunked")
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
    elif body or case.length:
        head.append(f"Content-Length: {len(body) + case.length}")
    with socket.create_connection((parts.hostname, parts.port), timeout) as sock:
        try:
            sock.sendall("\r\n".join([*head, "", ""]).encode("latin-1") + body)
            if case.length:
                sock.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it may have answered before all was sent
        response = http.client.HTTPResponse(sock, method=case.method)
        response.begin()
        return response.status, response.read()


@dataclass
class Run:
    """Sends cases, counts their statuses, and raises Fault at what must not be. logged: the log since the last call."""

    url: str
    timeout: float
    logged: Callable[[], str] = lambda: ""
    ends: float = float("inf")
    counts: Counter = field(default_factory=Counter)
    broken: Fault | None = None

    def check(self, case: Case) -> None:
        if self.broken:  # so that Hypothesis sees the same again
            raise self.broken
        if time.monotonic() > self.ends:
            return
        began, sound = time.monotonic(), case.length in (0, None)
        try:
            status, body = send(self.url, case, self.timeout)
        except TimeoutError:
            raise Fault(f"no answer within {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            if sound:
                raise Fault(f"the connection was cut: {type(error).__name__}: {error}") from None
            status, body = 0, b""
        if time.monotonic() - began > self.timeout:
            raise Fault(f"the answer took over {self.timeout:g} s")
        if status >= 500 and status != 503:
            raise Fault(f"status {status}: {body[:300]!r}")
        if sound and status >= 400 and case.method != "HEAD" and b'"error"' not in body and body != UVICORN:
            raise Fault(f"status {status} without a reason: {body[:300]!r}")
        if "Traceback" in (log := self.logged()):
            raise Fault(f"a traceback in the log: {log[-1500:]}")
        self.counts[status] += 1
        if self.counts.total() % EVERY == 0:
            self.check_good()

    def check_good(self) -> None:
        for case in (Case("GET", "/health"), Case("POST", "/v1/completions", json.dumps(GOOD).encode())):
            try:
                status, body = send(self.url, case, self.timeout)
            except (OSError, http.client.HTTPException) as error:
                status, body = 0, f"{type(error).__name__}: {error}".encode()
            if status != 200:
                self.broken = Fault(f"a good request was answered with status {status}: {body[:300]!r}")
                raise self.broken


UVICORN = b"Invalid HTTP request received."  # before the application hears of it


def fuzz(run: Run, count: int, number: int) -> Counter:
    """How many cases had which status; 0: the connection was closed on a wrong length. Raises Fault, shrunk."""
    with urllib.request.urlopen(f"{run.url}/openapi.json", timeout=run.timeout) as answer:
        described = json.load(answer)
    bounds = settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )

    @seed(number)
    @bounds
    @given(cases(described))
    def check(case: Case) -> None:
        run.check(case)

    check()
    run.check_good()
    return run.counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server, on this machine")
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=30, help="seconds for each answer")
    parser.add_argument("--seconds", type=float, default=3600, help="after which no more cases are sent")
    parser.add_argument("--log", type=Path, help="the server's stderr, watched for tracebacks")
    options = parser.parse_args()
    if urlsplit(options.url).hostname not in ("127.0.0.1", "localhost"):
        parser.error("--url must be of this machine: http://127.0.0.1:PORT")
    log = options.log.open() if options.log else None
    run = Run(
        options.url.rstrip("/"),
        options.timeout,
        log.read if log else lambda: "",
        time.monotonic() + options.seconds,
    )
    try:
        counts = fuzz(run, options.cases, options.seed)
    except (Fault, ExceptionGroup) as fault:  # a group: what does not fail each time
        sys.exit(f"{fault}\nafter {run.counts.total()} cases: {dict(run.counts)}")
    print(json.dumps({"cases": counts.total(), "statuses": {str(k): counts[k] for k in sorted(counts)}}))


if __name__ == "__main__":
    main()
