"""Lossless decoding against dense: how often drafts stand, what they cost, what that predicts, and what it gives.

    python -m teal_fast.benchmarks.speculate --checkpoint demo --tokens 128
    python -m teal_fast.benchmarks.speculate --checkpoint demo --prompts repeat --draft ngram

Greedy answers to ten prompts of a chat, or to one that asks to repeat a text with a word changed. First every drafter
drafts at each sparsity, 7 tokens at a time: `acceptance` is that of each position whose predecessors stood, costs are
in dense steps, `predicted` is the speed-up over dense by the number of drafts. Then each prompt is answered densely and
losslessly by turns; `ratio` is that of their times, without the prompts'. Texts that differ end the benchmark.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from teal_fast.cli import add_model_arguments, open_model, parse_with_model, positive_int, run
from teal_fast.engine.engine import Engine
from teal_fast.engine.measure import Sample
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.engine.speculation.find import find_drafts
from teal_fast.engine.speculation.lossless import AUTO, MOST_CHOSEN, NGRAM, SELF, SPARSITIES
from teal_fast.engine.speculation.statistics import Statistics
from teal_fast.evaluation.record import check_records_path, describe, put_out
from teal_fast.sparse_model import format_of

PROMPTS = {
    "chat": (
        "Explain in three sentences why the sky is blue.",
        "Write a short story about a lighthouse keeper and a storm.",
        "Write a Python function that reverses the words of a sentence.",
        "What are the main causes of inflation?",
        "Give me a recipe for vegetable soup with five ingredients.",
        "Summarize the history of the Roman Empire in a paragraph.",
        "How do I write a polite email to ask for a day off?",
        "List ten animals that live in the ocean.",
        "Explain how a bicycle stays upright.",
        "What should I see in Paris in two days?",
    ),
    "repeat": (
        'Repeat this text word for word, but write "river" for "lake": The old mill stands by the lake. Every '
        "morning the miller opens the heavy doors, looks over the water and waits for the farmers, who bring their "
        "grain in wooden carts. When the wind is strong the wheel turns quickly, and the flour is ready by noon.",
    ),
}
REPEATS = 20  # of a verification that is timed; the fastest counts


def ask(engine: Engine, prompt: Sequence[int], tokens: int, **more) -> tuple[list[int], Sample]:
    """A greedy answer that no stop token ends, with its times."""
    sample = Sample(len(prompt))
    request = Request(prompt, Sampling(0.0), 0.0, tokens, stop=(), cache=False, **more)
    return [token.id for token in sample.watch(engine.stream(request))], sample


def verifying(engine: Engine) -> dict[int, float]:
    """Seconds that verifying so many tokens takes, in the middle of the cache's text."""
    ids, found = engine.held.ids, {}
    for count in range(1, MOST_CHOSEN + 2):
        times, at = [], len(ids) // 2
        for _ in range(REPEATS):
            began = time.perf_counter()
            engine.step.dense(ids[at : at + count], at, count)
            times.append(time.perf_counter() - began)
        found[count] = min(times)
    return found


def predict(acceptance: Sequence[float], draft: float, verify: dict[int, float]) -> dict[str, float]:
    """Speed-up over dense by the number of drafts. draft, verify: in dense steps."""
    found, stands, expected = {}, 1.0, 1.0
    for count, share in enumerate(acceptance, 1):
        stands *= share
        expected += stands
        found[str(count)] = expected / (count * draft + verify[count + 1])
    return found


def sweep(engine: Engine, prompts: list[list[int]], dense: list[list[int]], tokens: int) -> list[dict]:
    """Every drafter at every sparsity, at a fixed length."""
    verify_s = verifying(engine)
    verify = {count: seconds / verify_s[1] for count, seconds in verify_s.items()}
    ways = [(NGRAM, None)] + [(name, at) for name in engine.lossless.models for at in SPARSITIES if at or name != SELF]
    records = []
    for draft, sparsity in tqdm(ways, desc="sweep", mininterval=1):
        if sparsity and engine.lossless.models[draft].calibration is None:
            continue
        answers = []
        for prompt, expected in zip(prompts, dense, strict=True):
            more = {"draft": draft, "draft_sparsity": sparsity, "draft_tokens": MOST_CHOSEN}
            check(ask(engine, prompt, tokens, lossless=True, **more)[0], expected, draft)
            answers.append(engine.lossless.statistics)
        found = Statistics.over(answers).record()
        cost = 0.0 if draft == NGRAM else engine.lossless.arms[draft, sparsity].cost
        acceptance = found["acceptance"]
        predicted = predict(acceptance, cost, verify)
        shared = {"draft": draft, "draft_sparsity": sparsity, "draft_cost": cost, "acceptance": acceptance}
        records.append(shared | {"verify_cost": {str(n): c for n, c in verify.items()}, "predicted": predicted})
    return records


def check(found: list[int], expected: list[int], draft: str) -> None:
    if found != expected:
        at = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
        raise ValueError(f"lossless text by {draft} differs from the dense one at token {at}: a mistake of ours")


def compare(engine: Engine, prompts: list[list[int]], tokens: int, draft: str, rounds: int) -> list[dict]:
    """Each prompt by turns, densely and losslessly; a record of all, its rates by prompt."""
    ratios, rates, answers = [], [], []
    for prompt in tqdm(prompts, desc="compare", mininterval=1):
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds):
            expected, sample = ask(engine, prompt, tokens)
            times[False].append(sum(sample.decode_s))
            found, sample = ask(engine, prompt, tokens, lossless=True, draft=draft)
            times[True].append(sum(sample.decode_s))
            check(found, expected, draft)
            answers.append(engine.lossless.statistics)
        ratios.append(statistics.median(a / b for a, b in zip(times[False], times[True], strict=True)))
        rates.append((tokens - 1) / statistics.median(times[True]))
    found = {"draft": draft, "tokens_per_s": statistics.median(rates), "tokens_per_s_spread": [min(rates), max(rates)]}
    whole = Statistics.over(answers).record()
    return [found | {"ratio": statistics.mean(ratios), "ratios": ratios, "lossless": whole}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--draft", default=AUTO, metavar="auto|self|ngram|FOLDER", help="what is compared with dense")
    parser.add_argument("--prompts", choices=PROMPTS, default="chat", help="(default: %(default)s)")
    parser.add_argument("--tokens", type=positive_int, default=128, help="of an answer (default: %(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=3, help="turns of each prompt (default: %(default)s)")
    parser.add_argument("--no_sweep", action="store_true", help="only compare with dense")
    parser.add_argument("--out", type=Path, help="write the JSON records to this file")
    parser.set_defaults(calibration=None)
    options, choice = parse_with_model(parser)
    check_records_path(options.out)
    opened = open_model(choice, None)
    drafts = find_drafts(opened.folder, opened.model, opened.tokenizer, options.draft)
    prompts = [opened.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in PROMPTS[options.prompts]]
    engine = Engine(opened.model, opened.calibration, context=max(map(len, prompts)) + options.tokens, drafts=drafts)
    engine.check(Request([0], max_new_tokens=1, lossless=True, draft=options.draft))
    records = []
    if not options.no_sweep:
        dense = [ask(engine, prompt, options.tokens)[0] for prompt in tqdm(prompts, desc="dense", mininterval=1)]
        records += sweep(engine, prompts, dense, options.tokens)
    records += compare(engine, prompts, options.tokens, options.draft, options.rounds)
    common = describe(opened.name, opened.device, format_of(opened.model))
    common |= {"benchmark": "speculate", "mode": "lossless", "prompts": options.prompts, "new_tokens": options.tokens}
    records = [common | record for record in records]
    for record in records:
        shown = record.get("predicted") or {"measured": record.get("ratio")}
        best = max(shown, key=shown.get)
        print(f"{record['draft']} {record.get('draft_sparsity', '')}: {shown[best]:.2f}x dense ({best})")
    put_out(records, options.out)


if __name__ == "__main__":
    run(main)
