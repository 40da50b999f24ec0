"""The light client against a server of the standard library, which writes what it is told."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from teal_fast.benchmarks.http_client import Exchange, piece, timed
from teal_fast.benchmarks.served import Client


class Scripted(BaseHTTPRequestHandler):
    """Answers a post by chunks of the server's `script`; a threading.Event in it is waited for."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.server.asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(self.server.status)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for part in self.server.script:
            if isinstance(part, threading.Event):
                part.wait(20)
            else:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_):
        pass


@pytest.fixture
def scripted():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    server.status, server.broken = 200, []
    server.handle_error = lambda request, address: server.broken.append(address)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def event(**choice) -> bytes:
    return b"data: " + json.dumps({"id": "x", "choices": [choice]}).encode() + b"\n\n"


USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\ndata: [DONE]\n\n'


def test_events_come_as_they_are_sent_and_whole_though_a_chunk_ends_within_one(scripted):
    first, second, more = event(text="one"), event(text="two"), threading.Event()
    scripted.script = [b": a comment\n\n", first[:9], first[9:], more, second]
    with Exchange(scripted.server_port, "POST", "/", {"a": 1}) as exchange:
        assert exchange.answered() == 200 and scripted.asked == {"a": 1}
        events = exchange.events()
        assert piece(json.loads(next(events))) == "one"
        more.set()  # the second one is not sent before the first has been read
        assert [piece(json.loads(data)) for data in events] == ["two"]


def test_text_its_times_and_its_usage(scripted):
    role = event(delta={"role": "assistant"}, finish_reason=None)
    parts = [event(delta={"content": text}, finish_reason=None) for text in ("a ", "b")]
    scripted.script = [role, *parts, event(delta={}, finish_reason="length"), USAGE]
    with Client() as client:
        found = client.ask(scripted.server_port, "/v1/chat/completions", {"stream": True})
    assert (found["text"], found["finish_reason"], found["usage"]) == ("a b", "length", {"completion_tokens": 2})
    assert 0 < found["first_s"] <= found["last_s"]


def test_an_error_is_told_with_its_status(scripted):
    scripted.status, scripted.script = 429, [b'{"error": {"message": "full"}}']
    assert timed(scripted.server_port, "/", {}) == {"status": 429, "error": {"error": {"message": "full"}}}
    with Client() as client, pytest.raises(ValueError, match=r"429.*full.*expected a streamed text"):
        client.ask(scripted.server_port, "/", {})


def test_an_answer_without_text_is_no_measurement(scripted):
    scripted.script = [event(text="", finish_reason="stop"), USAGE]
    with Client() as client, pytest.raises(ValueError, match="expected a streamed text"):
        client.ask(scripted.server_port, "/", {})


def test_who_cuts_off_is_gone_at_once(scripted):
    more = threading.Event()
    scripted.script = [event(text="one"), more, *[event(text="x" * 1000)] * 1000]
    exchange = Exchange(scripted.server_port, "POST", "/", {})
    assert exchange.answered() == 200 and next(exchange.events())
    exchange.cut()
    more.set()
    for _ in range(1000):
        if scripted.broken:
            break
        threading.Event().wait(0.01)
    assert scripted.broken  # writing to it failed


def test_silence_is_an_error(scripted):
    more = threading.Event()
    scripted.script = [more]
    with Exchange(scripted.server_port, "POST", "/", {}, timeout=20) as exchange:
        exchange.answered()
        exchange.wait(0.05)
        with pytest.raises(TimeoutError):
            next(exchange.events())
    more.set()
