"""Many clients at once, half of which go away: who stays gets an answer of his own, and the server is as it was before.

    python -m teal_fast.tests.server.load --checkpoint demo

Starts serve.py on the loopback and counts what becomes of each request. Each client has a marker
for its prompt; what each is answered was written down before, from a server with nothing else to do, so that text of
another stream is seen. First all come at once to a queue that holds them, then to the default one. Then memory and
threads are watched over many requests, and at last SIGTERM must let a running answer end. Prints what was found as one
JSON line; whatever is not as it should be is named, and the exit code is 1.
"""

import argparse
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from teal_fast.benchmarks.http_client import Exchange
from teal_fast.benchmarks.servers import STOP, Server
from teal_fast.cli import positive_int, run, sparsity
from teal_fast.tests.server.clients import Load, Outcome, ask, expect, fates, follow, mixed_up, steady, storm

DRAINED, LONG = 4, 300  # answers that SIGTERM must let end, and their tokens
CACHE_BYTES = 20_000_000  # of prefixes: full after the first requests, so that memory is level from then on


def drain(load: Load, server: Server) -> dict:
    """SIGTERM during an answer, with others waiting: what became of all, of one that came later, and the exit code."""
    started = threading.Event()

    def come(_: int) -> str:
        found = Outcome("broken")
        body = load.body(0, cache=False, max_tokens=LONG, ignore_eos=True, stream=True)
        with Exchange(server.port, "POST", "/v1/completions", body, load.timeout) as exchange:
            follow(exchange, found, time.monotonic() + load.timeout, None, started.set)
        return found.fate

    with ThreadPoolExecutor(DRAINED) as pool:
        answers = [pool.submit(come, 0)]
        if not started.wait(load.timeout):
            raise ValueError("the server answers nothing any more")
        answers += [pool.submit(come, number) for number in range(1, DRAINED)]
        time.sleep(0.2)  # until they wait
        server.terminate()
        time.sleep(0.3)  # uvicorn looks every 0.1 s whether it is to end
        late = ask(load, server.port, load.body(0, cache=False))
        in_time = not all(answer.done() for answer in answers)
    outcomes = [answer.result() for answer in answers]
    return {"answers": outcomes, "late": late.fate, "late_in_time": in_time, "exit_code": server.process.wait(STOP)}


def settled_threads(server: Server, at_most: int) -> int:
    """How many threads it has once those of the last requests are gone, or after 20 s."""
    for _ in range(200):
        if server.threads() <= at_most:
            break
        time.sleep(0.1)
    return server.threads()


def crowd(load: Load, server: Server, expected: list[str], seed: int) -> tuple[dict, list[str]]:
    """A storm: what became of the clients, and what is wrong."""
    outcomes = storm(load, server.port, seed)
    stayed, left = outcomes[::2], outcomes[1::2]
    wrong = mixed_up(outcomes, expected, exactly=True)
    wrong += [f"a client that stayed: {o.fate} {o.said}" for o in stayed if o.fate not in ("answered", "refused")]
    wrong += [f"a client that left: {o.fate} {o.said}" for o in left if o.fate in ("broken", "silent")]
    after = ask(load, server.port, load.body(0, cache=False))
    if after.text != expected[0]:
        wrong.append(f"afterwards the server answers {after.text!r}, not {expected[0]!r}: {after.fate} {after.said}")
    return {"stayed": fates(stayed), "left": fates(left)}, wrong


def endure(load: Load, server: Server, expected: list[str]) -> tuple[dict, list[str]]:
    """Many requests, over which memory and threads stay as they are."""
    steady(load, server.port, load.requests)  # warms up: what is kept of the last requests is kept from then on
    time.sleep(1)
    memory, threads = server.memory(), server.threads()
    outcomes = steady(load, server.port, load.requests)
    time.sleep(1)
    grown, left = server.memory() / memory - 1, settled_threads(server, threads)
    wrong = mixed_up(outcomes, expected, exactly=False)
    wrong += [f"request {i}: {o.fate} {o.said}" for i, o in enumerate(outcomes) if o.fate not in ("answered", "left")]
    return {"requests": fates(outcomes), "memory": memory, "growth": grown, "threads": [threads, left]}, wrong


def verdict(load: Load, found: dict) -> list[str]:
    """What is wrong with the numbers."""
    wrong, lasting, drained = [], found["lasting"], found["drained"]
    if found["queue_for_all"]["stayed"].get("answered", 0) < 0.8 * len(range(0, load.clients, 2)):
        wrong.append(f"a queue for all: {found['queue_for_all']}, expected at least 80 % of who stays answered")
    if not found["default_queue"]["stayed"].get("answered"):
        wrong.append(f"the default queue: {found['default_queue']}, expected some answered")
    if lasting["growth"] >= 0.02:
        wrong.append(f"memory grew by {lasting['growth']:.1%}, expected less than 2 %")
    if lasting["threads"][1] > lasting["threads"][0]:
        wrong.append(f"threads before and after: {lasting['threads']}")
    if drained["answers"] != ["answered"] * DRAINED:
        wrong.append(f"SIGTERM cut answers off: {drained}")
    if drained["late"] == "answered" or not drained["late_in_time"] or drained["exit_code"]:
        wrong.append(f"SIGTERM: {drained}, expected a late request refused while others run, and exit code 0")
    return wrong


def try_server(load: Load, *words: str) -> tuple[dict, list[str]]:
    """Everything: what was found, and what is wrong. words: more flags of the server whose queue is too short."""
    found = {}
    with load.server("--max_queue", str(load.clients)) as server:
        expected = expect(load, server.port)
        found["queue_for_all"], of_held = crowd(load, server, expected, 0)
    print(f"a queue for all: {found['queue_for_all']}", file=sys.stderr, flush=True)
    with load.server("--cache_bytes", str(CACHE_BYTES), *words) as server:
        found["default_queue"], of_default = crowd(load, server, expected, 1)
        print(f"the default queue: {found['default_queue']}", file=sys.stderr, flush=True)
        found["lasting"], of_lasting = endure(load, server, expected)
        print(f"lasting: {found['lasting']}", file=sys.stderr, flush=True)
        found["drained"] = drain(load, server)
    return found, of_held + of_default + of_lasting + verdict(load, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="demo", help="(default: %(default)s)")
    parser.add_argument("--clients", type=positive_int, default=200, help="at once (default: %(default)s)")
    parser.add_argument("--requests", type=positive_int, default=2000, help="for memory (default: %(default)s)")
    parser.add_argument("--new_tokens", type=positive_int, default=8, help="of an answer (default: %(default)s)")
    parser.add_argument("--sparsity", type=sparsity, default=0.5, help="(default: %(default)s)")
    parser.add_argument("--timeout", type=positive_int, default=600, help="seconds a request (default: %(default)s)")
    options = parser.parse_args()
    load = Load(**vars(options))
    found, wrong = try_server(load)
    print(json.dumps(found | {"wrong": wrong}))
    if wrong:
        raise ValueError(f"{len(wrong)} things are wrong, above all: {wrong[0]}")


if __name__ == "__main__":
    run(main)
