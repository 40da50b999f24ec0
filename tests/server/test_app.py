"""Who may ask, errors by dialect, what a client that goes away leaves, and limits."""

import asyncio
import http.client
import json
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest

from teal_fast.server import body
from teal_fast.server.app import Guard
from teal_fast.server.service import Limits
from teal_fast.tests.server.live import serving

LONG = {"prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def live(demo):
    with serving(demo, api_key="geheim", names=("demo", "small")) as live:
        yield live


def ask(live, method, path, body=None, key="geheim", **headers):
    """Status, headers and parsed body of one request."""
    connection = http.client.HTTPConnection(urlsplit(live.url).netloc, timeout=60)
    given = {"Authorization": f"Bearer {key}"} if key else {}
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, data, given | {k.replace("_", "-"): v for k, v in headers.items()})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    found = json.loads(text) if "json" in response.headers.get("content-type", "") else text.decode()
    return response.status, response.headers, found


def test_a_key_is_asked_for(live):
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/messages", "/metrics"):
        method = "GET" if path == "/metrics" else "POST"
        for key in (None, "", "falsch", "geheimnis"):
            status, _, found = ask(live, method, path, {}, key)
            assert status == 401 and found["error"]["type"] == "authentication_error"
    assert ask(live, "GET", "/health", key=None)[0] == 200
    assert ask(live, "GET", "/metrics", key=None, x_api_key="geheim")[0] == 200


def test_pages_of_other_sites_are_refused(tiny):
    """Where no key is asked for: a page of another site has none."""
    with serving(tiny, calibrated=False) as live:
        check_origins(live)


def check_origins(live):
    host = urlsplit(live.url).netloc
    for origin in ("https://evil.example", "null", f"http://{host}.evil.example", "http://[", "http://127.0.0.1:1"):
        status, _, found = ask(live, "POST", "/v1/completions", LONG, Origin=origin)
        assert status == 403 and "allowed_origin" in found["error"]["message"], origin
    body = LONG | {"max_tokens": 1}
    status, headers, _ = ask(live, "POST", "/v1/completions", body, Origin=f"http://{host}")
    assert status == 200 and "access-control-allow-origin" not in headers
    rebound = ask(live, "POST", "/v1/completions", body, Origin="http://rebound.example", Host="rebound.example")
    assert rebound[0] == 403


def test_allowed_origins_may_ask(tiny):
    with serving(tiny, allowed_origins=("https://chat.example",)) as live:
        headers = {"Origin": "https://chat.example", "Access_Control_Request_Method": "POST"}
        status, found, _ = ask(live, "OPTIONS", "/v1/completions", **headers)
        assert status == 200 and found["access-control-allow-origin"] == "https://chat.example"


def test_names_of_models(live):
    body = LONG | {"max_tokens": 1}
    assert ask(live, "POST", "/v1/completions", body | {"model": "small"})[2]["model"] == "small"
    assert ask(live, "POST", "/v1/completions", body)[2]["model"] == "demo"
    status, _, found = ask(live, "POST", "/v1/completions", body | {"model": "gpt-5"})
    assert status == 404 and found["error"]["code"] == "model_not_found"


BODIES = [(b"", "not JSON"), (b"{", "not JSON"), (b'{"prompt": NaN}', "NaN is no number"), (b"\xff", "not JSON")]
BODIES += [(b"[" * 100_000, "not JSON"), (b"[1]", "expected a JSON object"), (b'"a"', "expected a JSON object")]
BODIES += [(b'{"user": 1e999}', "1e999 is no number"), (b'{"prompt": "\\ud800"}', "surrogates not allowed")]


BODIES += [
    (b'{"x": %b1%b}' % (a * n, b * n), said)
    for a, b in ((b"[", b"]"), (b'{"a":', b"}"))
    for n, said in ((199, "prompt is missing"), (201, "within one another"), (900, "within one another"))
]


@pytest.mark.parametrize("body, said", BODIES, ids=lambda value: str(value)[:20])
def test_bodies_that_are_none(live, body, said):
    status, _, found = ask(live, "POST", "/v1/completions", body)
    assert status == 400 and said in found["error"]["message"] and len(found["error"]["message"]) < 300


def test_errors_have_the_shape_of_their_dialect(live):
    status, _, found = ask(live, "GET", "/v1/unknown")
    assert status == 404 and found["error"]["type"] == "not_found_error"
    status, headers, found = ask(live, "GET", "/v1/completions")
    assert status == 405 and headers["allow"] == "POST" and "GET" in found["error"]["message"]
    status, _, found = ask(live, "GET", "/v1/messages/unknown")
    assert status == 404 and found["type"] == "error"


def test_a_body_beyond_the_limit(live):
    status, _, found = ask(live, "POST", "/v1/completions", b" " * (32 * 2**20 + 1))
    assert status == 413 and "bytes" in found["error"]["message"]


def test_a_body_that_stops(live, monkeypatch):
    monkeypatch.setattr(body, "SILENCE", 0.3)
    parts = urlsplit(live.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as sock:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer geheim\r\n"
        sock.sendall(f"{head}Content-Length: 100\r\n\r\n".encode())
        for _ in range(5):
            time.sleep(0.1)
            sock.sendall(b" ")
        assert sock.recv(1000).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("begun", [False, True])
def test_a_request_that_is_cancelled_is_told_so(begun):
    sent, start = [], {"type": "http.response.start", "status": 200, "headers": []}

    async def app(scope, receive, send):
        if begun:
            await send(start)
        raise asyncio.CancelledError

    async def send(message):
        sent.append(message)

    guard = Guard(app, Limits())
    asyncio.run(guard({"type": "http", "path": "/v1/completions", "headers": []}, None, send))
    assert [message.get("status") for message in sent] == ([200] if begun else [503, None])


def raw(live, body, path="/v1/completions"):
    """A connection on which a request was sent."""
    data, parts = json.dumps(body).encode(), urlsplit(live.url)
    sock = socket.create_connection((parts.hostname, parts.port), timeout=30)
    head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nAuthorization: Bearer geheim\r\n"
    sock.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return sock


def until(condition, seconds):
    """Seconds that it took until the condition held."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it took too long"
        time.sleep(0.002)
    return time.monotonic() - began


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_the_engine(live, stream):
    worker = live.service.worker
    sock = raw(live, LONG | {"stream": stream})
    if stream:
        assert b"data:" in sock.recv(4096) + sock.recv(4096)
    until(lambda: worker.running is not None and len(live.engine.held.ids) > 5, 20)
    sock.close()
    assert until(lambda: worker.running is None, 5) < 1  # a token takes 10 ms, on a busy machine ten times that
    assert live.service.worker.waiting == 0


def test_a_client_that_leaves_while_the_prompt_is_read(live):
    worker, held = live.service.worker, live.engine.held
    prompt = [(7 * i) % 40_000 + 20 for i in range(1900)]
    sock = raw(live, {"prompt": prompt, "max_tokens": 5})
    until(lambda: worker.running is not None and 0 < len(held.ids) < 1000, 30)
    assert ask(live, "GET", "/health")[0] == 200
    sock.close()
    until(lambda: worker.running is None, 5)
    assert len(held.ids) < 1900


ENDLESS = {"max_tokens": 1500, "ignore_eos": True}
ASKS = {
    "/v1/completions": {"prompt": "Once", **ENDLESS},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], **ENDLESS},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], **ENDLESS},
    "/v1/responses": {"input": "hi", "max_output_tokens": 1500, "ignore_eos": True},
}


@pytest.mark.parametrize("path", ASKS)
def test_a_refused_request_leaves_nothing_in_the_engine(live, path):
    for wrong in ({"stream": "yes"}, {"stream_options": 1}, {"n": 1.5}, {"top_logprobs": "a"}, {"metadata": 1}):
        if ask(live, "POST", path, ASKS[path] | wrong | {"max_tokens": 1, "max_output_tokens": 1})[0] != 200:
            assert ask(live, "POST", path, ASKS[path] | wrong)[0] == 400
            assert live.service.worker.running is None and live.service.worker.waiting == 0, wrong


@pytest.mark.parametrize(
    "path, body",
    [
        ("/v1/messages", {"max_tokens": 1, "messages": [{"role": "user", "content": "a" * 300}] * 10_000}),
        ("/v1/responses", {"input": [{"role": "user", "content": "a" * 300}] * 10_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 300}] * 10_000}),
        ("/v1/completions", {"prompt": "a" * 3_000_000}),
    ],
)
def test_texts_that_no_context_holds_are_refused_at_once(live, path, body):
    began = time.monotonic()
    status, _, found = ask(live, "POST", path, body)
    assert status == 400 and "prompt is too long" in found["error"]["message"]
    assert time.monotonic() - began < 3


def test_a_client_that_leaves_the_queue(live):
    worker = live.service.worker
    first, second = raw(live, LONG), None
    until(lambda: worker.running is not None, 20)
    second = raw(live, LONG)
    until(lambda: worker.waiting == 1, 20)
    second.close()
    until(lambda: worker.waiting == 0, 5)
    first.close()
    until(lambda: worker.running is None, 5)


def test_a_full_queue_and_a_request_that_takes_too_long(demo):
    with serving(demo, max_queue=1, timeout=3.0) as live:
        results = []

        def run(body):
            results.append(ask(live, "POST", "/v1/completions", body))

        threads = [threading.Thread(target=run, args=(LONG,)) for _ in range(2)]
        threads[0].start()
        until(lambda: live.service.worker.running is not None, 20)
        threads[1].start()
        until(lambda: live.service.worker.waiting == 1, 20)
        status, headers, found = ask(live, "POST", "/v1/completions", LONG)
        for path in ("/v1/completions", "/v1/chat/completions"):  # which no waiting makes possible
            refused = ask(live, "POST", path, ASKS[path] | {"n": 2})
            assert refused[0] == 400 and "2 answers" in refused[2]["error"]["message"]
        assert status == 429 and int(headers["retry-after"]) >= 1 and "--max_queue" in found["error"]["message"]
        for thread in threads:
            thread.join()
        assert [status for status, _, _ in results] == [503, 503]
        assert all(found["error"]["code"] == "timeout" for _, _, found in results)
        assert ask(live, "POST", "/v1/completions", LONG | {"max_tokens": 2})[0] == 200


def test_metrics_count(live):
    ask(live, "POST", "/v1/completions", LONG | {"max_tokens": 7, "sparsity": 0.5})
    until(lambda: live.service.worker.running is None, 5)
    _, headers, text = ask(live, "GET", "/metrics")
    assert headers["content-type"].startswith("text/plain")
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(found["teal:generation_tokens_total"]) >= 7 and float(found["teal:prompt_tokens_total"]) >= 4
    assert found["teal:num_requests_running"] == found["teal:num_requests_waiting"] == "0.0"
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"):
        assert float(found[f"teal:{name}_count"]) >= 1
    assert float(found["teal:achieved_sparsity_ratio_sum"]) > 0.3
    assert float(found['teal:request_success_total{finished_reason="length"}']) >= 1
