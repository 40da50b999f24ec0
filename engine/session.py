"""A text or a chat at a terminal: prompts in, streamed text out, and what each answer cost."""

import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from teal_fast.engine.accounting import bytes_per_token
from teal_fast.engine.batch import Batch, unbatched
from teal_fast.engine.engine import Engine
from teal_fast.engine.measure import Sample
from teal_fast.engine.ranks.layers import ranks_of
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.engine.speculation.statistics import Statistics, describe_drafts
from teal_fast.engine.text import TextStream
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.sparse_model import format_of

Message = dict[str, str]  # of a chat: role and content

# Fewer answers at once come slower together than one after another on CUDA (an H200, Llama-3-8B's shapes at 50 %).
FEWEST, MANY = {"bf16": 4, "fp16": 4}, 8


@dataclass
class Session:
    """Answers prompts one after another with the same settings.

    chat: the messages so far, at first the system's or none; None where each prompt is a text of its own. seed: of the
    next answer; it counts up. stop: strings that end an answer, besides the engine's stop tokens. lossless: fields of
    lossless requests.
    """

    engine: Engine
    tokenizer: Tokenizer
    sampling: Sampling
    sparsity: float
    max_new_tokens: int
    seed: int
    chat: list[Message] | None
    stop: Sequence[str] = ()
    lossless: Mapping[str, Any] = field(default_factory=dict)

    def answer(self, prompt: list[int], sample: Sample) -> str:
        """Prints the answer's text as it comes, and returns it; what there is of the sample survives Ctrl-C.

        An answer that ends because the context is full says so: it is shorter than was asked for.
        """
        request = self._next_request(prompt)
        text, stream, pieces = TextStream(self.tokenizer, prompt, self.stop), self.engine.stream(request), []
        try:
            for token in sample.watch(stream):
                pieces.append(text.push(token))
                print(pieces[-1], end="", flush=True)
                if text.stopped:
                    break
        finally:
            stream.close()
            sample.drafted = self.engine.lossless.statistics if request.lossless else None
            pieces.append(text.flush())
            print(pieces[-1], flush=True)
        self._end(sample, text, request)
        return "".join(pieces)

    def _next_request(self, prompt: list[int]) -> Request:
        new_tokens = min(self.max_new_tokens, self.engine.context - len(prompt))
        request = Request(prompt, self.sampling, self.sparsity, new_tokens, seed=self.seed, **self.lossless)
        self.seed += 1
        return request

    def _end(self, sample: Sample, text: TextStream, request: Request) -> None:
        """Notes why an answer ended."""
        sample.finish_reason = "stop" if text.stopped else sample.tokens[-1].finish_reason
        sample.cut = sample.finish_reason == "length" and request.max_new_tokens < self.max_new_tokens
        if sample.cut:
            length = f"{request.max_new_tokens} of {self.max_new_tokens} tokens"
            print(f"the context of {self.engine.context} tokens is full: cut after {length}", file=sys.stderr)

    def batches(self, prompt: list[int], count: int) -> bool:
        """Whether so many answers to a prompt are decoded together, or one after another."""
        if self.engine.model.norm.weight.is_cuda and count < FEWEST.get(format_of(self.engine.model), MANY):
            return False
        if ranks_of(self.engine.model) is not None and self.engine.step.mode != "plain":
            return False
        length = min(self.engine.context, len(prompt) + self.max_new_tokens)
        return not unbatched(self.engine.model, [Request(prompt, **self.lossless)], length)

    def answer_together(self, prompt: list[int], samples: list[Sample], shown: str) -> None:
        """Decodes so many answers together, and prints them one after another, `shown` before each.

        What there is of the samples survives Ctrl-C; what their tokens skipped is counted at the end.
        """
        requests = [self._next_request(prompt) for _ in samples]
        batch, page = self.engine.batch(requests), Page([shown] * len(samples))
        texts, before = [TextStream(self.tokenizer, prompt, self.stop) for _ in samples], time.perf_counter()
        drawn = [before] * len(samples)  # when the last token of each was drawn
        with self.counted(*samples, batch=batch):
            try:
                for number, token in batch:
                    text, now = texts[number], time.perf_counter()
                    samples[number].add(token, now - drawn[number])
                    drawn[number] = now
                    page.add(number, text.push(token))
                    if text.stopped:
                        batch.finish(number)
                    if text.stopped or token.finish_reason:
                        page.end(number, text.flush())
                        self._end(samples[number], text, requests[number])
            finally:
                batch.close()
                for number in page.open:
                    page.end(number, texts[number].flush())

    @contextmanager
    def counted(self, *samples: Sample, batch: Batch | None = None) -> Iterator[None]:
        """In the block the samples are decoded; after it, and after Ctrl-C, what their tokens skipped is counted.

        Ranks are not interrupted at one place, so that they can't count together after it.
        """
        try:
            yield
        except KeyboardInterrupt:
            if ranks_of(self.engine.model) is None:
                with suppress(ValueError):  # it may come while Python closes the stream, which is then still open
                    self._count(samples, batch)
            raise
        self._count(samples, batch)

    def _count(self, samples: Sequence[Sample], batch: Batch | None) -> None:
        achieved = self.engine.achieved_sparsity(*([] if batch is None else [batch]))
        for sample in samples:
            sample.achieved = achieved

    def turn(self, text: str) -> Sample:
        """Answers one prompt of a terminal session. A chat's oldest turns are dropped when the context is full.

        An interrupted answer does not become part of the chat.
        """
        prompt, messages = self._fit(text)
        known = self.engine.held.known(prompt, Request(prompt, sparsity=self.sparsity, **self.lossless).reuses)
        print(f"reading {len(prompt) - known} of {len(prompt)} tokens …", file=sys.stderr, flush=True)
        sample = Sample(len(prompt))
        try:
            with self.counted(sample):
                answer = self.answer(prompt, sample)
        except KeyboardInterrupt:
            return sample
        if messages is not None:
            self.chat = [*messages, _message("assistant", answer)]
        return sample

    def _fit(self, text: str) -> tuple[list[int], list[Message] | None]:
        """The prompt's ids, and the chat's messages with it: as many as leave room for an answer.

        Room is for max_new_tokens, or for half of the context where that is less.
        """
        room = self.engine.context - min(self.max_new_tokens, self.engine.context // 2)
        kept, dropped = self.chat, 0
        prompt = encode_prompt(self.tokenizer, text, kept)
        while kept is not None and len(prompt) > room and len(shorter := _without_oldest_turn(kept)) < len(kept):
            kept = shorter
            dropped += 1
            prompt = encode_prompt(self.tokenizer, text, kept)
        if len(prompt) >= self.engine.context:
            raise ValueError(f"the prompt has {len(prompt)} tokens, the context {self.engine.context}: shorten it")
        if dropped:
            turns = "turn was" if dropped == 1 else f"{dropped} turns were"
            print(f"the context is full: the oldest {turns} dropped", file=sys.stderr)
            self.chat = kept
        return prompt, None if kept is None else [*kept, _message("user", text)]


class Page:
    """Prints several texts that grow side by side, one after another: the first that is not ended as it grows."""

    def __init__(self, texts: list[str]):
        self.waiting, self.ended, self.printing = texts, [False] * len(texts), 0

    @property
    def open(self) -> list[int]:
        """The texts that are not ended."""
        return [number for number, ended in enumerate(self.ended) if not ended]

    def add(self, number: int, piece: str) -> None:
        self.waiting[number] += piece
        if number == self.printing:
            print(self.waiting[number], end="", flush=True)
            self.waiting[number] = ""

    def end(self, number: int, piece: str) -> None:
        self.add(number, piece + "\n")
        self.ended[number] = True
        while self.printing < len(self.ended) and self.ended[self.printing]:
            self.printing += 1
            if self.printing < len(self.ended):
                self.add(self.printing, "")


def encode_prompt(tokenizer: Tokenizer, text: str, chat: list[Message] | None) -> list[int]:
    """Token ids of a prompt: in a chat as its next message, by itself where there is none."""
    if not text.strip():
        raise ValueError("the prompt is empty: give some text")
    if chat is None:
        return tokenizer.encode(text)
    return tokenizer.encode_chat([*chat, _message("user", text)])


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def summarize(engine: Engine, samples: list[Sample]) -> dict:
    """What the samples cost, as fields of a benchmark record: rates are medians, sparsity and bytes of all tokens."""
    decoded = [sample for sample in samples if sample.decode_s and sample.achieved]  # not interrupted while counted
    rates = [sample.tokens_per_s for sample in decoded]
    counted = [sample for sample in decoded if sample.skipped is not None]
    reads = [sample.tokens_per_s * bytes_per_token(engine.model, sample.skipped) for sample in counted]
    batch, together = samples[-1].batch, max((sum(sample.decode_s) for sample in samples), default=0.0)
    achieved, drafted = mean_sparsity(decoded), Statistics.over(sample.drafted for sample in samples if sample.drafted)
    # Drafters read besides; not every step of a batch counts what it reads.
    known = drafted is None and len(counted) == len(decoded)
    return {
        "benchmark": "decode",
        "sparsity": engine.sparsity,
        "achieved_sparsity": achieved.get("all"),
        "achieved_by_kind": {kind: value for kind, value in achieved.items() if kind != "all"},
        "mode": engine.step.mode if drafted is None else "lossless",
        "ranks": 1 if (ranks := ranks_of(engine.model)) is None else ranks.shard.ranks,  # bytes are a rank's
        "prompt_tokens": samples[-1].prompt_tokens,
        "new_tokens": [len(sample.tokens) for sample in samples],
        "finish_reason": samples[-1].finish_reason,
        "stop_ids": sorted(engine.stop),
        "cut_by_context": sum(sample.cut for sample in samples),  # how many: not by max_new_tokens
        "first_token_s": samples[0].first_token_s,  # later samples find the prompt in the cache
        "tokens_per_s": statistics.median(rates or [0.0]),
        "tokens_per_s_spread": [min(rates, default=0.0), max(rates, default=0.0)],
        "bytes_per_token": bytes_per_token(engine.model, achieved.get("all", 0.0)) if batch == 1 else None,
        "gb_per_s": statistics.median(reads or [0.0]) / 1e9 if known else None,
        "lossless": None if drafted is None else drafted.record(),
        "beyond_grids": getattr(engine.step, "beyond_grids", None),  # of all that the engine has decoded
        "batch": batch,
        "tokens_per_s_together": sum(len(s.decode_s) for s in samples) / together if batch > 1 and together else None,
    }


def mean_sparsity(samples: list[Sample]) -> dict[str, float]:
    """Achieved sparsity over the decoded tokens of all samples, by tensor kind and "all"; nothing where there is none.

    Each token meets each layer once, so that samples count by their tokens.
    """
    steps = sum(len(sample.decode_s) for sample in samples)
    kinds = samples[0].achieved if samples else ()
    return {kind: sum(len(sample.decode_s) * sample.achieved[kind] for sample in samples) / steps for kind in kinds}


def describe_cost(record: dict) -> str:
    """What the samples cost in a line or two."""
    lines = [
        f"first token {record['first_token_s']:.2f} s · {record['tokens_per_s']:.1f} tokens/s "
        f"(median of {len(record['new_tokens'])})"
    ]
    token = "token" if record["ranks"] == 1 else f"token, on each of {record['ranks']} ranks"
    if record["lossless"] is not None:
        return f"{lines[0]}\n{describe_drafts(record['lossless'])}"
    if record["tokens_per_s_together"] is not None:
        lines[0] += f", {record['tokens_per_s_together']:.1f} together"
    if record["gb_per_s"] is not None:
        lines[0] += f" · {record['gb_per_s']:.2f} GB/s of weights read"
    if record["bytes_per_token"] is not None:
        lines[0] += f" ({record['bytes_per_token'] / 1e6:.0f} MB a {token})"
    if record["achieved_sparsity"] is not None:
        kinds = " · ".join(f"{kind} {value:.1%}" for kind, value in record["achieved_by_kind"].items())
        achieved, nominal = record["achieved_sparsity"], record["sparsity"]
        lines.append(f"sparsity {achieved:.1%} achieved, {nominal:.0%} nominal ({kinds})")
    if record["beyond_grids"]:
        share = f"{1e6 * record['beyond_grids']:.3g} of a million parts of sums"
        lines.append(f"{share} were beyond their grids: the same text again may have other bits")
    return "\n".join(lines)


def _without_oldest_turn(chat: list[Message]) -> list[Message]:
    """The chat without its first message of a user and what follows it up to the next one."""
    start = next((i for i, message in enumerate(chat) if message["role"] == "user"), len(chat))
    end = next((i for i in range(start + 1, len(chat)) if chat[i]["role"] == "user"), len(chat))
    return chat[:start] + chat[end:]
