"""Generates text: dense prefill, sparse decoding, sampling, chat, streamed output, and what it cost.

    python generate.py --checkpoint demo --sparsity 0.5 --prompt "Once upon a time"

Text goes to stdout as it is decoded; timings and achieved sparsity go to stderr.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from teal_fast.cli import (
    add_model_arguments,
    open_calibration,
    open_checkpoint,
    pick_device,
    positive_int,
    probability,
    run,
    sparsity,
    temperature,
)
from teal_fast.engine.accounting import bytes_per_token
from teal_fast.engine.decode import (
    Prefill,
    Sample,
    Step,
    achieved_sparsity,
    compiled_prefill,
    decode,
    decode_step,
    fast_step,
    prefill,
)
from teal_fast.engine.measure import cache_length, profiler
from teal_fast.engine.sampling import Sampling
from teal_fast.evaluation.record import describe
from teal_fast.files.calibration import set_sparsity
from teal_fast.files.load import load_model
from teal_fast.files.store import check_writable
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.model import Transformer
from teal_fast.sparse_model import format_of
from teal_fast.weights.formats import DTYPES


@dataclass
class Session:
    """A loaded model with what decoding needs; a cache that fits every call of the session."""

    model: Transformer
    tokenizer: Tokenizer
    step: Step
    prefill: Prefill
    sampling: Sampling
    max_new_tokens: int
    seed: int

    def __post_init__(self):
        self.generator = torch.Generator(self.model.norm.weight.device).manual_seed(self.seed)

    def print_sample(self, prompt: list[int], sample: Sample) -> None:
        """Decodes after `prompt` into `sample`, printing text as it comes; what there is of both survives Ctrl-C."""
        new_tokens = min(self.max_new_tokens, self.model.max_seq_length - len(prompt))
        stream, stop = self.tokenizer.stream(), self.tokenizer.eos_ids
        try:
            for token in decode(
                self.model, self.step, prompt, new_tokens, self.sampling, self.generator, stop, sample, self.prefill
            ):
                print(stream.push(token), end="", flush=True)
        finally:
            print(stream.flush(), flush=True)


def encode_prompt(tokenizer: Tokenizer, text: str, chat: list[dict[str, str]] | None) -> list[int]:
    """Token ids of a prompt, as the next turn of `chat` (to which it is appended) when there is one."""
    if not text.strip():
        raise ValueError("the prompt is empty: give some text with --prompt")
    if chat is None:
        return tokenizer.encode(text)
    chat.append({"role": "user", "content": text})
    return tokenizer.encode_chat(chat)


def check_length(model: Transformer, prompt: list[int]) -> None:
    if len(prompt) >= model.args.max_position:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens, but this model's context is {model.args.max_position} with the "
            "answer: shorten it"
        )


def report(session: Session, samples: list[Sample], nominal: float) -> dict:
    """Prints what the samples cost to stderr and returns it as fields of a benchmark record."""
    fast = "captured" if session.model.norm.weight.is_cuda else "compiled"
    model, rates = session.model, [sample.tokens_per_s for sample in samples if sample.decode_s]
    achieved = achieved_sparsity(model, samples[-1])
    read = bytes_per_token(model, achieved.get("all", 0.0))
    rate = statistics.median(rates) if rates else 0.0
    record = {
        "benchmark": "decode",
        "sparsity": nominal,
        "achieved_sparsity": achieved.get("all"),
        "achieved_by_kind": {kind: value for kind, value in achieved.items() if kind != "all"},
        "mode": "plain" if session.step is decode_step else fast,
        "prompt_tokens": samples[-1].prompt_tokens,
        "new_tokens": [len(sample.tokens) for sample in samples],
        "first_token_s": statistics.median(sample.first_token_s for sample in samples),
        "tokens_per_s": rate,
        "tokens_per_s_spread": [min(rates, default=0.0), max(rates, default=0.0)],
        "bytes_per_token": read,
        "gb_per_s": rate * read / 1e9,
    }
    print(
        f"first token {record['first_token_s']:.2f} s · {rate:.1f} tokens/s (median of {len(samples)}) · "
        f"{record['gb_per_s']:.2f} GB/s of weights read ({read / 1e6:.0f} MB a token)",
        file=sys.stderr,
    )
    if achieved:
        kinds = " · ".join(f"{kind} {value:.1%}" for kind, value in record["achieved_by_kind"].items())
        print(f"sparsity {achieved['all']:.1%} achieved, {nominal:.0%} nominal ({kinds})", file=sys.stderr)
    return record


def interactive(session: Session, chat: bool) -> None:
    """Reads prompts until end of input; Ctrl-C ends an answer, or the session at the prompt."""
    history: list[dict[str, str]] | None = [] if chat else None
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            prompt = encode_prompt(session.tokenizer, text, history)
            if len(prompt) >= session.model.max_seq_length:
                raise ValueError(f"the conversation has {len(prompt)} tokens, the cache {session.model.max_seq_length}")
            sample = Sample(len(prompt))
            session.print_sample(prompt, sample)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            if history and history[-1]["role"] == "user":
                history.pop()
            continue
        except KeyboardInterrupt:
            history = history and history[:-1]
            continue
        if history is not None:
            history.append({"role": "assistant", "content": session.tokenizer.decode(sample.tokens)})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--prompt", default="Hello, my name is", help="text to continue (default: %(default)r)")
    parser.add_argument("--interactive", action="store_true", help="read prompts from the terminal, one after another")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the checkpoint's chat template")
    parser.add_argument("--sparsity", type=sparsity, default=0.0, help="fraction of input channels skipped, 0 to 0.95")
    parser.add_argument("--calibration", type=Path, help="calibration file (default: the checkpoint's own)")
    parser.add_argument("--num_samples", type=positive_int, default=1, help="texts to generate (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=positive_int, default=200, help="tokens a text (default: %(default)s)")
    parser.add_argument("--max_seq_length", type=positive_int, default=2048, help="cache of --interactive, in tokens")
    parser.add_argument("--temperature", type=temperature, default=0.8, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top_k", type=positive_int, default=200, help="draw among the K likeliest (default: 200)")
    parser.add_argument("--top_p", type=probability, help="draw among the likeliest that make up P")
    parser.add_argument("--min_p", type=probability, help="drop tokens less likely than P times the likeliest")
    parser.add_argument("--seed", type=int, default=1234, help="same seed, same text (default: %(default)s)")
    parser.add_argument(
        "--compile", action="store_true", help="capture the decode step as a CUDA graph (the CPU's is always compiled)"
    )
    parser.add_argument("--compile_prefill", action="store_true", help="compile the prompt's pass, for any length")
    parser.add_argument("--profile", type=Path, metavar="TRACE.json", help="write a chrome trace of the last text")
    parser.add_argument("--json", action="store_true", help="print the measurements as one JSON object, last line")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    folder, device = open_checkpoint(options.checkpoint), pick_device(options.device)
    if options.profile:
        check_writable(options.profile)
    tokenizer = Tokenizer.load(folder)
    prompt = [] if options.interactive else encode_prompt(tokenizer, options.prompt, [] if options.chat else None)
    calibration = None
    if options.sparsity > 0:
        calibration = open_calibration(folder, options.calibration, device)
    model = load_model(folder, device, DTYPES.get(options.dtype))
    if calibration is not None:
        set_sparsity(model, calibration, options.sparsity)
    if options.interactive:
        length = min(options.max_seq_length, model.args.max_position)
    else:
        check_length(model, prompt)
        length = cache_length(model, len(prompt) + options.max_new_tokens)
    model.setup_caches(1, length)
    step = fast_step(model) if options.compile or device.type == "cpu" else decode_step
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.min_p)
    first = compiled_prefill() if options.compile_prefill else prefill
    session = Session(model, tokenizer, step, first, sampling, options.max_new_tokens, options.seed)
    if options.interactive:
        interactive(session, options.chat)
        return

    samples: list[Sample] = []
    try:
        for index in range(options.num_samples):
            samples.append(Sample(len(prompt)))
            print("" if options.chat else options.prompt, end="", flush=True)
            with profiler(options.profile if index == options.num_samples - 1 else None):
                session.print_sample(prompt, samples[-1])
    except KeyboardInterrupt:
        if samples[-1].tokens:
            report(session, samples, options.sparsity)
        raise
    measured = report(session, samples, options.sparsity)
    if options.json:
        print(json.dumps(describe(folder.resolve().name, device, format_of(model)) | measured))


if __name__ == "__main__":
    run(main)
