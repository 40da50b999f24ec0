"""A few hundred malformed requests, as many as CI has time for. By hand, with more: see fuzz.py."""

import logging
import socket
import time

import pytest

from teal_fast.tests.server.fuzz import Fault, Run, fuzz
from teal_fast.tests.server.live import serving
from teal_fast.tests.server.malformed import Case


@pytest.fixture(scope="module")
def live(calibrated):
    with serving(calibrated, context=256) as live:
        yield live


def test_malformed_requests(live, caplog):
    caplog.set_level(logging.ERROR)
    run = Run(live.url, 30, lambda: caplog.text, ends=time.monotonic() + 120)
    counts = fuzz(run, 300, 0)
    assert counts.total() > 100 and counts[200] > 20 and counts[400] > 20, "the server is slow, or cases say little"
    ends = time.monotonic() + 5
    while live.service.worker.running or live.service.worker.waiting:  # of clients that sent too little and left
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_what_must_not_be_is_found(live, monkeypatch):
    """The fuzzer itself: a server that fails, one that says nothing, and one that is not there."""
    monkeypatch.setattr(live.service, "check_model", lambda name: 1 / 0)
    with pytest.raises(Fault, match="status 500"):
        fuzz(Run(live.url, 30), 300, 0)
    monkeypatch.undo()
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(Fault, match="no answer within"):
        Run(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.2).check(Case("GET", "/health"))
    with pytest.raises(Fault, match="cut"):
        Run("http://127.0.0.1:9", 5).check(Case("GET", "/health"))
