"""Clients of a server under load: what they ask for, when they go away, and whether an answer is a client's own."""

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teal_fast.benchmarks.http_client import Exchange, piece
from teal_fast.benchmarks.servers import Server, ours

WORKERS = 8  # clients at once while memory is watched
REFUSED = (429, 503)


@dataclass(frozen=True)
class Load:
    """What is asked of the server, by how many; timeout: seconds in which each must be served or refused."""

    checkpoint: str | Path
    clients: int = 200
    requests: int = 2000
    new_tokens: int = 8
    sparsity: float = 0.5
    timeout: float = 600.0

    def server(self, *words: str) -> Server:
        return Server(ours(self.checkpoint, "--device", "cpu", *words))

    def marker(self, client: int) -> list[int]:
        """A few tokens that are no other client's."""
        return random.Random(client).sample(range(1000 + 40 * client, 1040 + 40 * client), 4)

    def body(self, client: int, cache: bool, **fields) -> dict:
        """The client's marker is its prompt, and nothing else can be its answer."""
        marker = self.marker(client)
        settings = {"model": "any", "temperature": 0, "sparsity": self.sparsity, "max_tokens": self.new_tokens}
        settings |= {"prompt": 3 * marker, "logit_bias": {str(id): 100 for id in marker}, "cache": cache}
        return settings | fields


@dataclass
class Outcome:
    """What became of one request: answered, refused, left (by the client), silent (for too long) or broken."""

    fate: str
    text: str = ""
    id: str | None = None
    said: str = ""


@dataclass(frozen=True)
class Leaving:
    """When a client goes away: after so many pieces of text, or after so many seconds in which nothing has come."""

    pieces: int
    seconds: float


def ask(load: Load, port: int, body: dict, leaving: Leaving | None = None) -> Outcome:
    """One streamed request."""
    found, deadline = Outcome("broken"), time.monotonic() + load.timeout
    try:
        with Exchange(port, "POST", "/v1/completions", body | {"stream": True}, load.timeout) as exchange:
            if leaving:
                exchange.wait(leaving.seconds)
            try:
                follow(exchange, found, deadline, leaving.pieces if leaving else None)
            except TimeoutError:
                found.fate = "left" if leaving else "silent"
            if found.fate == "left":
                exchange.cut()
    except TimeoutError:
        found.fate = "silent"
    except (OSError, http.client.HTTPException, ValueError) as error:
        found.said = f"{type(error).__name__}: {error}"
    return found


def follow(
    exchange: Exchange,
    found: Outcome,
    deadline: float,
    pieces: int | None = None,
    began: Callable[[], Any] = lambda: None,
) -> None:
    """Reads an answer into `found`, to its end or to so many pieces of text. began: called at every event."""
    status, reason = exchange.answered(), None
    if status != 200:
        found.said = f"{status}: {exchange.read()}"
        found.fate = "refused" if status in REFUSED else "broken"
        return
    for data in exchange.events():
        if time.monotonic() > deadline:
            raise TimeoutError
        if data == b"[DONE]":
            found.fate = "answered" if reason == "length" else "broken"
            return
        began()
        event = json.loads(data)
        if "error" in event:
            found.said = str(event["error"])
            found.fate = "refused" if event["error"].get("code") == "timeout" else "broken"
            return
        if found.id not in (None, event["id"]):
            found.said = f"a chunk of {event['id']} in {found.id}"
            return
        found.id, found.text = event["id"], found.text + piece(event)
        reason = reason or next((choice["finish_reason"] for choice in event["choices"]), None)
        if pieces is not None and piece(event):
            pieces -= 1
            if not pieces:
                found.fate = "left"
                return
    found.said = f"the stream ended early, after {found.text!r}"


def expect(load: Load, port: int) -> list[str]:
    """What each client's marker is answered by a server with nothing else to do; no two alike."""
    texts = []
    for client in range(load.clients):
        found = ask(load, port, load.body(client, cache=False))
        if found.fate != "answered":
            raise ValueError(f"the idle server did not answer: {found.fate}, {found.said}")
        texts.append(found.text)
    if alike := [text for text, times in Counter(texts).items() if times > 1]:
        raise ValueError(f"several markers have the answer {alike[0]!r}: this model cannot tell streams apart")
    return texts


def is_own(text: str, client: int, expected: list[str]) -> bool:
    """Whether the text goes along with no other client's answer farther than with this one's."""
    return shared(text, expected[client]) == max(shared(text, other) for other in expected)


def shared(text: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))


def storm(load: Load, port: int, seed: int) -> list[Outcome]:
    """All clients at once. Every second one leaves: some while they wait, some after a few pieces of text."""
    chance, together = random.Random(seed), threading.Barrier(load.clients)

    def leave() -> Leaving:
        waits = chance.random() < 0.5
        return Leaving(
            load.new_tokens if waits else chance.randint(1, 4), 3 * chance.random() if waits else load.timeout
        )

    plans = [leave() if client % 2 else None for client in range(load.clients)]

    def come(client: int) -> Outcome:
        together.wait()
        return ask(load, port, load.body(client, cache=False), plans[client])

    with ThreadPoolExecutor(load.clients) as pool:
        return list(pool.map(come, range(load.clients)))


def steady(load: Load, port: int, requests: int) -> list[Outcome]:
    """So many requests by a few clients, every fourth of which leaves; half of them may use the prefix cache."""

    def come(number: int) -> Outcome:
        body = load.body(number % load.clients, cache=number % 2 == 0)
        return ask(load, port, body, Leaving(2, load.timeout) if number % 4 == 3 else None)

    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(come, range(requests)))


def mixed_up(outcomes: Iterable[Outcome], expected: list[str], exactly: bool) -> list[str]:
    """Answers that are not their client's own; not exactly: with a cache, prompts round otherwise."""
    wrong = []
    for number, found in enumerate(outcomes):
        client = number % len(expected)
        if exactly:
            own = (
                found.text == expected[client] if found.fate == "answered" else expected[client].startswith(found.text)
            )
        else:
            own = is_own(found.text, client, expected)
        if not own:
            wrong.append(f"client {client} got {found.text!r}, expected {expected[client]!r}")
    ids = Counter(found.id for found in outcomes if found.id)
    return wrong + [f"{times} answers have the id {id}" for id, times in ids.items() if times > 1]


def fates(outcomes: list[Outcome]) -> dict[str, int]:
    return dict(Counter(found.fate for found in outcomes))
