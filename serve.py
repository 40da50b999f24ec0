"""Serves a model over HTTP: OpenAI's and Anthropic's APIs, a chat page, and sparsity chosen per request.

python serve.py --checkpoint demo --sparsity 0.5
"""

import argparse
import math
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

from teal_fast.cli import (
    ModelChoice,
    add_model_arguments,
    open_model,
    parse_with_model,
    positive_int,
    positive_number,
    run,
    size,
    sparsity,
    text,
)
from teal_fast.engine.engine import Engine
from teal_fast.engine.prefix_file import identity, load_prefixes, save_prefixes
from teal_fast.engine.prefixes import PrefixStore
from teal_fast.engine.request import Request
from teal_fast.engine.speculation.find import find_drafts
from teal_fast.files.paths import command
from teal_fast.files.store import check_writable

try:
    import uvicorn

    from teal_fast.server.app import make_app
    from teal_fast.server.service import Limits, Service
    from teal_fast.server.worker import Loaded, Worker
except ImportError as error:  # the packages of the extra `serve`, without which the other commands go on
    MISSING: ImportError | None = error
else:
    MISSING = None

PREFIXES = "prefixes.safetensors"
LONGEST = 32_768  # tokens of a context where none is named: agents send 10,000 to 40,000 of tools alone
ECHO = 0.3  # seconds in which a signal is still the same one: coreutils' timeout sends it to a process and to its group


def port(text: str) -> int:
    """argparse type: a TCP port."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a port from 0 (any free one) to 65535")
    return int(text)


def parse_arguments() -> tuple[argparse.Namespace, ModelChoice]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser, "demo")
    parser.add_argument("--sparsity", type=sparsity, default=0.0, help="of requests that name none, 0 to 0.95")
    parser.add_argument("--calibration", type=Path, help="calibration file (default: the checkpoint's own)")
    parser.add_argument("--host", type=text, default="127.0.0.1", help="address to listen at (default: %(default)s)")
    parser.add_argument("--port", type=port, default=8000, help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--max_seq_length", type=positive_int, help="context in tokens (default: the model's or 32768)")
    parser.add_argument("--max_queue", type=positive_int, default=64, help="requests that may wait (default: 64)")
    parser.add_argument(
        "--request_timeout", type=positive_number, default=600, help="seconds a request may take (default: 600)"
    )
    parser.add_argument("--cache_bytes", type=size, default=10**9, help="for prefixes of conversations (default: 1e9)")
    parser.add_argument("--cache_dir", type=Path, help="keeps those prefixes over restarts, in this folder")
    # Each chunk reads all weights: for 4,000 tokens of an 8B model an H200 takes 0.14 s by 1024, 0.75 s by 128.
    parser.add_argument(
        "--prefill_chunk", type=positive_int, default=1024, help="tokens of a prompt read at once (default: 1024)"
    )
    key = os.environ.get("TEAL_API_KEY") or None
    parser.add_argument(
        "--api_key", type=text, default=key, help="what clients must send (default: TEAL_API_KEY, else none)"
    )
    parser.add_argument(
        "--served_model_name", type=text, nargs="+", default=["*"], help="names that may be asked for (default: any)"
    )
    parser.add_argument("--allowed_origin", type=origin, nargs="+", default=[], help="sites whose pages may ask")
    return parse_with_model(parser)


def origin(given: str) -> str:
    """argparse type: a site, as browsers name it, or *."""
    if not re.fullmatch(r"\*|https?://[^/\s]+", given):
        raise argparse.ArgumentTypeError(f"got {given!r}, expected a site such as http://localhost:3000, or *")
    return given.lower()


def load(options: argparse.Namespace, choice: ModelChoice) -> "Loaded":
    """The model and its engine. Without a calibration only sparsity 0 is served, which is said."""
    opened = open_model(choice, bool(options.sparsity) or None)
    if opened.calibration is None:
        todo = f"run `{command('calibrate')} --checkpoint {opened.folder}`"
        print(f"serving sparsity 0 only: {opened.folder} has no calibration: {todo}", file=sys.stderr)
    model, stop = opened.model, opened.tokenizer.eos_ids
    longest = model.args.max_position
    context = min(options.max_seq_length or LONGEST, longest)
    if longest < (options.max_seq_length or 0):
        print(f"the context is {longest} tokens: the model has no more", file=sys.stderr)
    store = PrefixStore(options.cache_bytes)
    drafts = find_drafts(opened.folder, model, opened.tokenizer)  # loaded by the first lossless request
    engine = Engine(
        model, opened.calibration, stop, context, chunk=options.prefill_chunk, prefixes=store, drafts=drafts
    )
    list(engine.stream(Request([0], sparsity=options.sparsity, max_new_tokens=2, stop=())))  # kernels start here
    engine.forget()
    if options.cache_dir is None:
        return Loaded(engine, opened.tokenizer, opened.name)
    path, of = options.cache_dir / PREFIXES, identity(opened.folder, model, opened.calibration)
    load_prefixes(store, path, of, engine.cache)

    def close() -> None:
        engine.held.keep()
        save_prefixes(store, path, of)

    return Loaded(engine, opened.tokenizer, opened.name, close)


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound. Raises OSError in one line where the address is taken or not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(2048)  # at once: who comes while packages start waits instead of being refused
    except (OSError, TypeError) as error:  # TypeError: of a name that is no host's
        sock.close()
        said = getattr(error, "strerror", None) or error
        raise OSError(f"{host}:{port} can't be listened at ({said}): choose another --host or --port") from None
    return sock


def main() -> None:
    options, choice = parse_arguments()
    if MISSING is not None:
        raise ValueError(f"the server's packages are missing ({MISSING}): pip install '.[serve]' in the clone")
    names, origins = tuple(options.served_model_name), tuple(options.allowed_origin)
    limits = Limits(names, options.sparsity, options.request_timeout, options.api_key, origins)
    if options.cache_dir is not None:
        check_writable(options.cache_dir / PREFIXES)
    failed: list[BaseException] = []
    signals: list[int] = []
    heard = 0.0  # when the first of them came

    def stopped(error: BaseException | None) -> None:
        failed.extend([error] if error else [])
        server.should_exit = True

    def stop(number: int, _: object) -> None:
        nonlocal heard
        if signals and time.monotonic() < heard + ECHO:
            return
        if signals:  # once more: without waiting for anything
            os.write(2, b"interrupted\n" if number == signal.SIGINT else b"")
            os._exit(128 + number)
        signals.append(number)
        heard = time.monotonic()
        server.should_exit = True
        if worker.running or worker.waiting:  # not by print: it may have been interrupted itself
            os.write(2, b"finishing the answers that are asked for; the same signal again ends at once\n")

    def loading() -> Loaded:
        loaded = load(options, choice)
        print("ready", file=sys.stderr, flush=True)
        return loaded

    worker = Worker(loading, options.max_queue, stopped)
    app = make_app(Service(worker, limits))
    grace = math.ceil(options.request_timeout)  # SIGTERM lets what runs and waits be answered
    settings = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=grace)
    server = uvicorn.Server(settings)
    sock = listen(options.host, options.port)
    server.handle_exit = stop  # uvicorn's own says nothing, and raises the signals again at its end
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    host = f"[{options.host}]" if ":" in options.host else options.host
    print(f"http://{host}:{sock.getsockname()[1]} is open, {options.checkpoint} is being loaded", file=sys.stderr)
    server.run(sockets=[sock])
    if failed:
        raise failed[0]
    code = 130 if signal.SIGINT in signals else 0
    if code:
        print("interrupted", file=sys.stderr)
    if worker.thread.is_alive():  # it loads: Python's own end would be an abort
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run(main)
