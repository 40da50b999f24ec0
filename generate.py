"""Generates text: dense prefill, sparse decoding, sampling, chat, streamed output, and what it cost.

    python generate.py --checkpoint demo --sparsity 0.5 --prompt "Once upon a time"
    python generate.py --checkpoint coder.gguf --fim "def area(r):" "    return a"

Text goes to stdout as it is decoded; timings and achieved sparsity go to stderr.
"""

import argparse
import json
import sys
from pathlib import Path

from teal_fast.cli import (
    DRAFTING,
    ModelChoice,
    add_lossless_arguments,
    add_model_arguments,
    check_lossless_arguments,
    count,
    open_model,
    parse_with_model,
    positive_int,
    probability,
    run,
    sparsity,
    temperature,
    text,
)
from teal_fast.engine.engine import Engine
from teal_fast.engine.measure import Sample, cache_length, profiler
from teal_fast.engine.prefill import compiled_prefill, prefill
from teal_fast.engine.ranks.group import Ranks
from teal_fast.engine.ranks.launch import launched
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.engine.session import Session, describe_cost, encode_prompt, summarize
from teal_fast.engine.speculation.find import find_drafts
from teal_fast.engine.steps import PlainStep, fast_step
from teal_fast.engine.text import split_stops
from teal_fast.evaluation.record import describe
from teal_fast.files.memory import OutOfMemoryError, peak_bytes
from teal_fast.files.store import check_writable
from teal_fast.sparse_model import format_of

DEFAULT_PROMPT = "Hello, my name is"


def parse_arguments() -> tuple[argparse.Namespace, ModelChoice]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--prompt", help=f"text to continue (default: {DEFAULT_PROMPT!r})")
    parser.add_argument("--interactive", action="store_true", help="read prompts from the terminal, one after another")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the checkpoint's chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message of a chat")
    parser.add_argument(
        "--fim", nargs=2, metavar=("PREFIX", "SUFFIX"), help="fill in what stands between two pieces of code"
    )
    parser.add_argument("--sparsity", type=sparsity, default=0.0, help="fraction of input channels skipped, 0 to 0.95")
    add_lossless_arguments(parser)
    parser.add_argument("--calibration", type=Path, help="calibration file (default: the checkpoint's own)")
    parser.add_argument(
        "--num_samples", type=positive_int, default=1, help="texts, made at once (default: %(default)s)"
    )
    parser.add_argument("--max_new_tokens", type=positive_int, default=200, help="tokens a text (default: %(default)s)")
    parser.add_argument("--max_seq_length", type=positive_int, default=2048, help="context of --interactive, in tokens")
    parser.add_argument("--temperature", type=temperature, default=0.8, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top_k", type=count, default=200, help="draw among the K likeliest (default: 200; 0: off)")
    parser.add_argument("--top_p", type=probability, help="draw among the likeliest that make up P (1: off)")
    parser.add_argument(
        "--min_p", type=probability, help="drop what is less likely than P times the likeliest (0: off)"
    )
    parser.add_argument("--stop", type=text, action="append", default=[], help="also end at this text or token")
    parser.add_argument("--seed", type=int, default=1234, help="of the first text, the next ones count up from it")
    parser.add_argument("--compile", action="store_true", help="the default, accepted as gpt-fast's flag")
    parser.add_argument("--eager", action="store_true", help="decode by plain PyTorch, without CUDA graph and C++")
    parser.add_argument("--compile_prefill", action="store_true", help="compile the prompt's pass, for any length")
    parser.add_argument("--profile", type=Path, metavar="TRACE.json", help="write a chrome trace of the last call")
    parser.add_argument("--json", action="store_true", help="print the measurements as one JSON object, last line")
    options, choice = parse_with_model(parser)
    check_lossless_arguments(parser, options)
    if options.system is not None and not options.chat:
        parser.error("--system is the system message of a chat: use it with --chat")
    if options.fim and (options.prompt is not None or options.chat or options.interactive):
        parser.error("--fim has a prompt of its own: drop --prompt, --chat and --interactive")
    if options.interactive and (options.json or options.profile or options.num_samples > 1):
        parser.error("--json, --profile and --num_samples are for single prompts: drop --interactive")
    if launched() > 1 and (options.interactive or options.lossless or options.compile_prefill):
        single = "--interactive, --lossless and --compile_prefill"
        parser.error(f"{single} are for one process: drop them, or start it without torchrun")
    if options.prompt is None:
        options.prompt = DEFAULT_PROMPT
    return options, choice


def generate(session: Session, shown: str, ids: list[int], texts: int, profile: Path | None) -> list[Sample]:
    """Prints so many texts after a prompt, of which `shown` is; of interrupted ones what they cost so far."""
    samples: list[Sample] = []
    try:
        if texts > 1 and session.batches(ids, texts):
            samples += [Sample(len(ids), batch=texts) for _ in range(texts)]
            with profiler(profile):
                session.answer_together(ids, samples, shown)
        for index in range(len(samples), texts):
            samples.append(Sample(len(ids)))
            print(shown, end="", flush=True)
            with session.counted(samples[-1]), profiler(profile if index == texts - 1 else None):
                session.answer(ids, samples[-1])
    except KeyboardInterrupt:
        if any(sample.tokens for sample in samples):
            print(describe_cost(summarize(session.engine, samples)), file=sys.stderr)
        raise
    return samples


def interactive(session: Session) -> None:
    """Reads prompts until end of input; Ctrl-C ends an answer, or the session at the prompt."""
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            sample = session.turn(text)
        except (ValueError, OutOfMemoryError) as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        if sample.tokens:
            print(describe_cost(summarize(session.engine, [sample])), file=sys.stderr)


def lossless_request(options: argparse.Namespace) -> dict:
    """The fields of requests that --lossless and its flags mean; a folder's model drafts under the name it is given."""
    if not options.lossless:
        return {}
    return {"lossless": True} | {name: getattr(options, name) for name in DRAFTING} | {"draft": options.draft or "auto"}


def needs_calibration(options: argparse.Namespace) -> bool | None:
    """Whether the model's thresholds are needed; None where they only serve if there are some."""
    if options.lossless:
        return {None: None, "auto": None, "self": True}.get(options.draft, False)
    return options.sparsity > 0


def main() -> None:
    options, choice = parse_arguments()
    if options.profile:
        check_writable(options.profile)
    if not (options.interactive or options.prompt.strip()):
        raise ValueError("the prompt is empty: give some text with --prompt")
    if options.interactive:
        print(f"loading {options.checkpoint} …", file=sys.stderr, flush=True)
    drafting = lossless_request(options)
    ranks = Ranks.join(choice.device)
    opened = open_model(choice, needs_calibration(options), ranks)
    chat = ([] if options.system is None else [{"role": "system", "content": options.system}]) if options.chat else None
    model, tokenizer = opened.model, opened.tokenizer
    if options.interactive:
        context = min(options.max_seq_length, model.args.max_position)
    else:
        ids = tokenizer.encode_fill_in(*options.fim) if options.fim else encode_prompt(tokenizer, options.prompt, chat)
        if len(ids) >= model.args.max_position:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, but this model's context is {model.args.max_position} with the "
                "answer: shorten it"
            )
        context = cache_length(model, len(ids) + options.max_new_tokens)
    drafts = list(find_drafts(opened.folder, model, tokenizer, drafting["draft"])) if drafting else []
    step = PlainStep if options.eager else fast_step
    read_prompt = compiled_prefill() if options.compile_prefill else prefill
    stop_ids, stop_strings = split_stops(tokenizer, options.stop)
    engine = Engine(model, opened.calibration, tokenizer.eos_ids | stop_ids, context, step, read_prompt, drafts=drafts)
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.min_p)
    limits = (options.sparsity, options.max_new_tokens, options.seed)
    session = Session(engine, tokenizer, sampling, *limits, chat, stop_strings, drafting)
    engine.check(Request([0], max_new_tokens=1, **drafting))  # before anything is printed
    if options.interactive:
        return interactive(session)
    shown = "" if options.chat or options.fim else options.prompt
    profile = None if ranks is not None and ranks.shard.rank else options.profile
    samples = generate(session, shown, ids, options.num_samples, profile)
    measured = summarize(session.engine, samples)
    print(describe_cost(measured), file=sys.stderr)
    if options.json:
        besides = {"stop": [*stop_strings], "peak_bytes": peak_bytes()}
        print(json.dumps(describe(opened.name, opened.device, format_of(model)) | measured | besides))


if __name__ == "__main__":
    run(main, in_ranks=True)
