"""What benchmarks.serve asks of a server, and of generate.py as far as that can do it: one turn of one row."""

import itertools
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Self

from teal_fast.files.paths import DATA, ROOT
from teal_fast.files.store import parse_json
from teal_fast.files.tokenizer import Tokenizer

CLIENT = "teal_fast.benchmarks.http_client"
TEXT = DATA / "evaluation" / "austen-emma.txt"
SHORT = 32  # tokens of the prompt that is decoded after
ANSWER = 32  # tokens of a chat's first answer
FEW = 4  # tokens of an answer of which only the first one counts
SETTLE = 0.5  # seconds before a turn, in which the threads of the one before go to sleep


@dataclass(frozen=True)
class Plan:
    """What is asked for: texts to go on from, and how many new tokens after the short one."""

    short: str
    prompt: str
    turn: str
    new_tokens: int

    def check(self, tokens: int) -> None:
        """Raises ValueError unless the answer to the short prompt has as many tokens as were asked for."""
        if tokens != self.new_tokens:
            raise ValueError(f"an answer ended after {tokens} of {self.new_tokens} tokens: lower --new_tokens")


def make_plan(tokenizer: Tokenizer, prompt_tokens: int, turn_tokens: int, new_tokens: int) -> Plan:
    """The plan with prompts of about so many tokens."""
    ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_bos=False)
    return Plan(*(tokenizer.decode(ids[:tokens]) for tokens in (SHORT, prompt_tokens, turn_tokens)), new_tokens)


class Client:
    """benchmarks.http_client as a process."""

    def __init__(self):
        words = [sys.executable, "-m", CLIENT]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait()

    def ask(self, port: int, path: str, body: dict) -> dict:
        """The answer and its times. Raises ValueError unless it is a good one with some text."""
        print(json.dumps({"port": port, "path": path, "body": body}), file=self.process.stdin, flush=True)
        found = parse_json(self.process.stdout.readline(), "the client's answer", dict)
        if found["status"] != 200 or found["first_s"] is None:
            raise ValueError(f"{path} gave {found}, expected a streamed text")
        return found


@dataclass
class Row:
    """One way to be answered. numbers: those that its prompts begin with, so that no cache knows any of them."""

    about: dict
    plan: Plan
    numbers: itertools.count = field(default_factory=itertools.count)

    def turn(self) -> dict[str, Any]:
        """What one round measures, with what it was measured on."""
        time.sleep(SETTLE)
        return self.measure(f"{next(self.numbers):04d}. ")

    def measure(self, unseen: str) -> dict[str, Any]:
        raise NotImplementedError


@dataclass
class Served(Row):
    """By a server. fields: what each request to it has besides."""

    client: Client | None = None
    port: int = 0
    fields: dict = field(default_factory=dict)

    def ask(self, path: str, max_tokens: int, **body: Any) -> dict:
        settings = {"model": "any", "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
        return self.client.ask(self.port, path, settings | self.fields | {"max_tokens": max_tokens} | body)

    def measure(self, unseen: str) -> dict[str, Any]:
        decoded = self.ask("/v1/completions", self.plan.new_tokens, prompt=self.plan.short)
        self.plan.check(decoded["usage"]["completion_tokens"])
        read = self.ask("/v1/completions", FEW, prompt=unseen + self.plan.prompt)
        chat = [{"role": "user", "content": unseen + self.plan.turn}]
        first = self.ask("/v1/chat/completions", ANSWER, messages=chat)
        chat += [{"role": "assistant", "content": first["text"]}, {"role": "user", "content": "What happens next?"}]
        second = self.ask("/v1/chat/completions", FEW, messages=chat)
        return {
            "tokens_per_s": (self.plan.new_tokens - 1) / (decoded["last_s"] - decoded["first_s"]),
            "first_token_s": read["first_s"],
            "first_turn_s": first["first_s"],
            "second_turn_s": second["first_s"],
            "achieved_sparsity": decoded["usage"].get("achieved_sparsity"),
            "prompt_tokens": decoded["usage"]["prompt_tokens"],
            "first_token_prompt_tokens": read["usage"]["prompt_tokens"],
            "turns_prompt_tokens": [first["usage"]["prompt_tokens"], second["usage"]["prompt_tokens"]],
            "cached_tokens": second["usage"].get("prompt_tokens_details", {}).get("cached_tokens"),
        }


@dataclass
class Generated(Row):
    """By generate.py, a process a prompt, which has no chat of several turns. words: its model and sparsity."""

    words: list[str] = field(default_factory=list)

    def generate(self, prompt: str, new_tokens: int) -> dict:
        """The record that it prints."""
        words = ["--prompt", prompt, "--max_new_tokens", str(new_tokens), "--temperature", "0", "--json"]
        command = [sys.executable, str(ROOT / "generate.py"), *self.words, *words]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode:
            raise ValueError(f"generate.py failed: {done.stderr.decode(errors='replace').strip()[-500:]}")
        return parse_json(done.stdout.decode().splitlines()[-1], "the last line of generate.py", dict)

    def measure(self, unseen: str) -> dict[str, Any]:
        decoded = self.generate(self.plan.short, self.plan.new_tokens)
        self.plan.check(*decoded["new_tokens"])
        read = self.generate(unseen + self.plan.prompt, FEW)
        return {
            "tokens_per_s": decoded["tokens_per_s"],
            "first_token_s": read["first_token_s"],
            "achieved_sparsity": decoded["achieved_sparsity"],
            "prompt_tokens": decoded["prompt_tokens"],
            "first_token_prompt_tokens": read["prompt_tokens"],
        }
