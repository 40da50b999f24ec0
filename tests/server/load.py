"""Many clients at once, half of which go away: who stays gets an answer of his own, and the server is as it was before.

    python -m teal_fast.tests.server.load --checkpoint demo

Starts serve.py on the loopback and counts what becomes of each request. A client's marker is three numbers, which the
model continues; what each is answered was written down before, from a server with nothing else to do, so that text of
another stream is seen. First all come at once to a queue that holds them, then to the default one. Then memory and
threads are watched over many requests, and at last SIGTERM must let a running answer end. Prints what was found as one
JSON line; whatever is not as it should be is named, and the exit code is 1.
"""

import argparse
import json
import threading
import time

from teal_fast.benchmarks.http_client import Exchange
from teal_fast.benchmarks.servers import Server
from teal_fast.cli import positive_int, run, sparsity
from teal_fast.tests.server.clients import WORKERS, Load, ask, expect, fates, mixed_up, steady, storm

CACHE_BYTES = 20_000_000  # of prefixes: full after the first requests, so that memory is level from then on


def drain(load: Load, server: Server) -> dict:
    """SIGTERM during an answer, with another one waiting: what became of both, of a later one, and the exit code."""
    started, outcomes = threading.Event(), {}

    def come(name: str, **fields) -> None:
        outcomes[name] = ask(load, server.port, load.body(0, cache=False, **fields)).fate

    def run_long() -> None:
        body = load.body(0, cache=False, max_tokens=10 * load.new_tokens, stream=True)
        with Exchange(server.port, "POST", "/v1/completions", body, load.timeout) as exchange:
            exchange.answered()
            events = []
            for data in exchange.events():
                events.append(data)
                started.set()
        outcomes["running"] = "answered" if events[-1:] == [b"[DONE]"] else f"cut after {len(events)} events"

    threads = [threading.Thread(target=run_long), threading.Thread(target=come, args=("waiting",))]
    threads[0].start()
    if not started.wait(load.timeout):
        raise ValueError("the server answers nothing any more")
    threads[1].start()
    time.sleep(0.3)  # until it waits
    server.terminate()
    time.sleep(0.3)
    running = threads[0].is_alive()
    come("late")
    for thread in threads:
        thread.join()
    return outcomes | {"late_while_running": running, "exit_code": server.stop()}


def settled_threads(server: Server, at_most: int) -> int:
    """How many threads it has once those of the last requests are gone, or after 20 s."""
    for _ in range(200):
        if server.threads() <= at_most:
            break
        time.sleep(0.1)
    return server.threads()


def crowd(load: Load, seed: int, *words: str) -> tuple[dict, list[str]]:
    """A storm on a server with these flags: what was found, and what is wrong."""
    with load.server(*words) as server:
        expected = expect(load, server.port)
        outcomes = storm(load, server.port, seed)
        stayed = outcomes[::2]
        wrong = mixed_up(outcomes, expected, exactly=True)
        wrong += [f"a client that stayed: {o.fate} {o.said}" for o in stayed if o.fate not in ("answered", "refused")]
        wrong += [f"a client that left: {o.fate} {o.said}" for o in outcomes[1::2] if o.fate in ("broken", "silent")]
        after = ask(load, server.port, load.body(0, cache=False))
        if after.text != expected[0]:
            wrong.append(
                f"afterwards the server answers {after.text!r}, not {expected[0]!r}: {after.fate} {after.said}"
            )
    return {"stayed": fates(stayed), "left": fates(outcomes[1::2])}, wrong


def endure(load: Load) -> tuple[dict, list[str]]:
    """Many requests to one server, whose memory and threads stay as they are; then SIGTERM."""
    with load.server("--cache_bytes", str(CACHE_BYTES)) as server:
        expected = expect(load, server.port)
        steady(load, server.port, max(load.requests // 5, 4 * WORKERS))  # warms up
        time.sleep(1)
        memory, threads = server.memory(), server.threads()
        outcomes = steady(load, server.port, load.requests)
        time.sleep(1)
        grown, left = server.memory() / memory - 1, settled_threads(server, threads)
        wrong = mixed_up(outcomes, expected, exactly=False)
        wrong += [
            f"request {i}: {o.fate} {o.said}" for i, o in enumerate(outcomes) if o.fate not in ("answered", "left")
        ]
        drained = drain(load, server)
    found = {"requests": fates(outcomes), "memory": memory, "growth": grown, "threads": [threads, left]}
    return found | {"drained": drained}, wrong


def verdict(load: Load, held: dict, default: dict, lasting: dict) -> list[str]:
    """What is wrong with the numbers."""
    wrong, drained = [], lasting["drained"]
    staying = (load.clients + 1) // 2
    if held["stayed"].get("answered", 0) < 0.8 * staying:
        wrong.append(f"a queue for all: {held['stayed']}, expected at least 80 % answered")
    if not default["stayed"].get("answered"):
        wrong.append(f"the default queue: {default['stayed']}, expected some answered")
    if lasting["growth"] >= 0.02:
        wrong.append(f"memory grew by {lasting['growth']:.1%}, expected less than 2 %")
    if lasting["threads"][1] > lasting["threads"][0]:
        wrong.append(f"threads before and after: {lasting['threads']}")
    if drained["running"] != "answered" or drained["waiting"] not in ("answered", "refused"):
        wrong.append(f"SIGTERM cut an answer off: {drained}")
    if not drained["late_while_running"] or drained["late"] == "answered" or drained["exit_code"]:
        wrong.append(f"SIGTERM: {drained}, expected a late request refused while one runs, and exit code 0")
    return wrong


def try_server(load: Load, queue: int | None = None) -> tuple[dict, list[str]]:
    """Everything: what was found, and what is wrong. queue: a smaller one than the default, for few clients."""
    held, of_held = crowd(load, 0, "--max_queue", str(load.clients))
    default, of_default = crowd(load, 1, *(() if queue is None else ("--max_queue", str(queue))))
    lasting, of_lasting = endure(load)
    found = {"queue_for_all": held, "default_queue": default, "lasting": lasting}
    return found, of_held + of_default + of_lasting + verdict(load, held, default, lasting)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="demo", help="(default: %(default)s)")
    parser.add_argument("--clients", type=positive_int, default=200, help="at once (default: %(default)s)")
    parser.add_argument("--requests", type=positive_int, default=2000, help="for memory (default: %(default)s)")
    parser.add_argument("--new_tokens", type=positive_int, default=16, help="of an answer (default: %(default)s)")
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
