"""Lossless decoding against dense: how often drafts stand, what they cost, what that predicts, and what it gives.

    python -m teal_fast.benchmarks.speculate --checkpoint demo --tokens 128
    python -m teal_fast.benchmarks.speculate --checkpoint demo --prompts repeat --draft ngram
    python -m teal_fast.benchmarks.speculate --checkpoint demo --check --prompts chat code prose more --tokens 512

Answers to prompts of benchmarks/asked.py. First every drafter drafts at each sparsity, 7 tokens at a time: `acceptance`
is that of each position whose predecessors stood, costs are in dense steps, `predicted` is the speed-up over dense by
the number of drafts (report/speculate.py draws both). Then each prompt is answered densely and losslessly by turns;
`ratio` is that of their times, without the prompts'. Greedy texts that differ end the benchmark.

--check measures no time, so that other work does not disturb it: how often drafts stand, and whether greedy texts are
the dense ones, of every drafter and of auto. It ends with an error where one is not, and says at which token.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from teal_fast.benchmarks.asked import QUESTIONS, read_prompts
from teal_fast.cli import add_model_arguments, open_model, parse_with_model, positive_int, run, sparsity, temperature
from teal_fast.engine.engine import Engine
from teal_fast.engine.measure import Sample
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.engine.speculation.find import find_drafts
from teal_fast.engine.speculation.lossless import AUTO, MOST_CHOSEN, NGRAM, SELF, SPARSITIES
from teal_fast.engine.speculation.marks import mark, seconds
from teal_fast.engine.speculation.statistics import Statistics
from teal_fast.evaluation.record import check_records_path, describe, put_out
from teal_fast.sparse_model import format_of

REPEATS = 20  # of a verification that is timed; the fastest counts


@dataclass(frozen=True)
class Way:
    """How answers are drafted: by whom, at which sparsity, how many tokens at a time; None: chosen while it runs."""

    draft: str
    sparsity: float | None = None
    count: int | None = MOST_CHOSEN


@dataclass(frozen=True)
class Bench:
    """An engine and what it is asked: prompts as ids, tokens of an answer, sampling."""

    engine: Engine
    prompts: list[list[int]]
    tokens: int
    sampling: Sampling

    def ask(self, prompt: Sequence[int], way: Way | None = None) -> tuple[list[int], Sample]:
        """An answer that no stop token ends, with its times; dense without a way to draft."""
        sample, more = Sample(len(prompt)), {}
        if way is not None:
            more = {"draft": way.draft, "draft_sparsity": way.sparsity, "draft_tokens": way.count, "lossless": True}
        request = Request(prompt, self.sampling, 0.0, self.tokens, stop=(), seed=1234, cache=False, **more)
        return [token.id for token in sample.watch(self.engine.stream(request))], sample

    def dense(self) -> list[list[int]]:
        """The dense answers."""
        return [self.ask(prompt)[0] for prompt in tqdm(self.prompts, desc="dense", mininterval=1)]

    def drafted(self, way: Way, dense: list[list[int]]) -> dict:
        """How often drafts stood in all answers, and of greedy ones at which token each parts from the dense one."""
        parted, done = [], []
        for prompt, expected in zip(self.prompts, dense, strict=True):
            found = self.ask(prompt, way)[0]
            parted.append(next((i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b), None))
            done.append(self.engine.lossless.statistics)
        whole = Statistics.over(done)
        record = whole.record()
        return {
            "draft": Path(way.draft).name,
            "draft_sparsity": way.sparsity,
            "draft_tokens": way.count,
            "stood": sum(whole.accepted.values()) / max(1, sum(whole.proposed.values())),
            "drafting": 1 - whole.lengths[0] / max(1, whole.cycles),
            **{name: record[name] for name in ("acceptance", "tokens_per_cycle")},
            "parted": parted if self.sampling.greedy else None,
        }


def ways(engine: Engine, drafts: Sequence[str], sparsities: Sequence[float]) -> list[Way]:
    """The drafters of these names at each sparsity that they can have; auto is all that there are."""
    names = [NGRAM, *engine.lossless.models] if AUTO in drafts else drafts
    found = [Way(NGRAM)] if NGRAM in names else []
    for name in (name for name in names if name != NGRAM):
        sparse = engine.lossless.models[name].calibration is not None
        found += [Way(name, at) for at in sparsities if (sparse if at else name != SELF)]
    return found


def verifying(engine: Engine) -> dict[int, float]:
    """Seconds that verifying so many tokens takes, in the middle of the cache's text."""
    ids, device, found = engine.held.ids, engine.model.norm.weight.device, {}
    for count in range(1, MOST_CHOSEN + 2):
        times, at = [], len(ids) // 2
        for _ in range(REPEATS):
            began = mark(device)
            engine.lossless.verifier.dense(ids[at : at + count], at, count)
            times.append(seconds(began, mark(device)))
        found[count] = min(times)
    return found


def predict(
    acceptance: Sequence[float], draft: float, verify: dict[int, float], drafting: float = 1.0
) -> dict[str, float]:
    """Speed-up over dense by the number of drafts. draft, verify: in dense steps. drafting: of cycles, with any."""
    found, stands, expected = {}, 1.0, 1.0
    for count, share in enumerate(acceptance, 1):
        stands *= share
        expected += stands
        cost = count * draft + verify[count + 1]
        found[str(count)] = (1 + drafting * (expected - 1)) / (1 + drafting * (cost - 1))
    return found


def refuse_parted(record: dict) -> None:
    """Raises ValueError where a greedy text differs from the dense one."""
    parted = [(at, number) for number, at in enumerate(record["parted"] or ()) if at is not None]
    if parted:
        at, number = min(parted)
        said = f"{len(parted)} texts by {record['draft']} differ from the dense ones, prompt {number + 1}'s"
        raise ValueError(f"{said} at token {at}: a mistake of ours")


def check(bench: Bench, found: list[Way]) -> list[dict]:
    """Every way, without times."""
    dense = bench.dense()
    return [bench.drafted(way, dense) for way in tqdm(found, desc="check", mininterval=1)]


def sweep(bench: Bench, found: list[Way]) -> list[dict]:
    """Every way, with what it costs and what that predicts."""
    dense, engine = bench.dense(), bench.engine
    verify_s = verifying(engine)
    verify = {count: taken / verify_s[1] for count, taken in verify_s.items()}
    records = []
    for way in tqdm(found, desc="sweep", mininterval=1):
        record = bench.drafted(way, dense)
        refuse_parted(record)
        cost = 0.0 if way.draft == NGRAM else engine.lossless.arms[way.draft, way.sparsity].cost
        costs = {"draft_cost": cost, "verify_cost": {str(count): taken for count, taken in verify.items()}}
        records.append(record | costs | {"predicted": predict(record["acceptance"], cost, verify, record["drafting"])})
    return records


def compare(bench: Bench, draft: str, rounds: int) -> dict:
    """Each prompt by turns, densely and losslessly; a record of all, its rates by prompt."""
    ratios, rates, answers, way = [], [], [], Way(draft, count=None)
    for prompt in tqdm(bench.prompts, desc="compare", mininterval=1):
        times: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds):
            expected, sample = bench.ask(prompt)
            times[False].append(sum(sample.decode_s))
            found, sample = bench.ask(prompt, way)
            times[True].append(sum(sample.decode_s))
            if bench.sampling.greedy and found != expected:
                raise ValueError(f"lossless text by {draft} differs from the dense one: a mistake of ours, see --check")
            answers.append(bench.engine.lossless.statistics)
        ratios.append(statistics.median(a / b for a, b in zip(times[False], times[True], strict=True)))
        rates.append((bench.tokens - 1) / statistics.median(times[True]))
    found = {"draft": Path(draft).name, "tokens_per_s": statistics.median(rates)}
    found |= {"tokens_per_s_spread": [min(rates), max(rates)], "ratio": statistics.mean(ratios), "ratios": ratios}
    return found | {"lossless": Statistics.over(answers).record()}


def print_record(record: dict) -> None:
    name = record["draft"] if record.get("draft_sparsity") is None else f"{record['draft']} {record['draft_sparsity']}"
    if "ratio" in record:
        low, high = min(record["ratios"]), max(record["ratios"])
        print(f"{name}: {record['ratio']:.3f}x dense, by prompt {low:.3f} to {high:.3f}")
        return
    said = f"{name}: {record['stood']:.0%} of drafts stand, {record['tokens_per_cycle']:.2f} tokens a cycle"
    if "predicted" in record:
        best = max(record["predicted"], key=record["predicted"].get)
        said += f", {record['predicted'][best]:.2f}x dense predicted for {best} at a time"
    elif record["parted"] is not None:
        said += f", {record['parted'].count(None)} of {len(record['parted'])} texts are the dense ones"
    print(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument(
        "--draft", nargs="+", default=[AUTO], metavar="auto|self|ngram|FOLDER", help="what drafts (default: auto)"
    )
    parser.add_argument(
        "--draft_sparsity", type=sparsity, nargs="+", default=SPARSITIES, help="of the sweep (default: %(default)s)"
    )
    parser.add_argument("--prompts", choices=QUESTIONS, nargs="+", default=["chat"], help="(default: chat)")
    parser.add_argument("--tokens", type=positive_int, default=128, help="of an answer (default: %(default)s)")
    parser.add_argument("--temperature", type=temperature, default=0.0, help="of answers (default: greedy)")
    parser.add_argument("--rounds", type=positive_int, default=3, help="turns of each prompt (default: %(default)s)")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--no_sweep", action="store_true", help="only compare with dense")
    parts.add_argument("--check", action="store_true", help="no times: whether texts are right, how often drafts stand")
    parser.add_argument("--out", type=Path, help="write the JSON records to this file")
    parser.set_defaults(calibration=None)
    options, choice = parse_with_model(parser)
    check_records_path(options.out)
    opened = open_model(choice, None)
    where = (opened.folder, opened.model, opened.tokenizer)
    drafts = [found for draft in options.draft for found in find_drafts(*where, draft)]
    prompts = read_prompts(options.prompts, opened.tokenizer, opened.model.args)
    engine = Engine(opened.model, opened.calibration, context=max(map(len, prompts)) + options.tokens, drafts=drafts)
    for draft in options.draft:
        engine.check(Request([0], max_new_tokens=1, lossless=True, draft=draft))
    bench = Bench(engine, prompts, options.tokens, Sampling(options.temperature))
    found = ways(engine, options.draft, options.draft_sparsity)
    common = describe(opened.name, opened.device, format_of(opened.model))
    common |= {"benchmark": "speculate", "mode": "lossless", "prompts": " ".join(options.prompts)}
    common |= {"new_tokens": options.tokens, "temperature": options.temperature}
    if options.check:
        records = check(bench, [*found, Way(AUTO, count=None)] if AUTO in options.draft else found)
    else:
        records = [] if options.no_sweep else sweep(bench, found)
        records += [compare(bench, draft, options.rounds) for draft in options.draft]
    records = [common | record for record in records]
    for record in records:
        print_record(record)
    put_out(records, options.out)
    for record in records if options.check else ():
        refuse_parted(record)


if __name__ == "__main__":
    run(main)
