"""A live server on a loopback port, in a thread of the test's process."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from teal_fast.cli import ModelChoice, open_model
from teal_fast.engine.engine import Engine
from teal_fast.server.app import make_app
from teal_fast.server.service import Limits, Service
from teal_fast.server.worker import Loaded, Worker


class Live:
    """url: where it listens, without a slash at the end."""

    def __init__(self, url: str, service: Service):
        self.url, self.service = url, service

    @property
    def engine(self) -> Engine:
        return self.service.engine


@contextmanager
def serving(
    folder: Path,
    dtype: str | None = None,
    context: int = 2048,
    max_queue: int = 64,
    calibrated: bool = True,
    **limits,
) -> Iterator[Live]:
    """Serves a checkpoint, with its calibration or without one, until the block ends; limits: of `Limits`."""

    def load() -> Loaded:
        opened = open_model(ModelChoice(str(folder), "cpu", dtype), calibrated)
        engine = Engine(opened.model, opened.calibration, opened.tokenizer.eos_ids, context, chunk=128)
        return Loaded(engine, opened.tokenizer, opened.name)

    service = Service(Worker(load, max_queue, lambda error: None), Limits(**limits))
    server = uvicorn.Server(uvicorn.Config(make_app(service), log_level="warning", access_log=False))
    sock = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    try:
        deadline = time.monotonic() + 120
        while service.worker.loaded is None:
            assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.05)
        yield Live(url, service)
    finally:
        server.should_exit = True
        thread.join()
