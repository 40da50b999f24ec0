"""Times serve.py as a client sees it, beside generate.py and llama-server on the same weights.

    python -m teal_fast.benchmarks.serve --checkpoint demo --device cpu --sparsity 0 0.5 --llama_server llama-server

Servers and the client are processes of their own. In a round each row has its turn, alone at work: it decodes after a
short prompt (tokens/s from the first streamed token to the last), reads a prompt that it has never seen (time to the
first token), and answers two turns of a chat of which the first is long. generate.py does of this what it can, a
process a prompt, at the highest sparsity. The first round warms up; all answers are greedy. Prints one JSON line of
records; --out writes the same.

llama-server is built from the source that llama-cpp-python brings along (docs/reproduce.md says how). It gets the
demo's weights as bf16, and as many threads; --gguf names the weights of other checkpoints.
"""

import argparse
import statistics
import subprocess
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

from teal_fast.benchmarks.peer_llama import requantized
from teal_fast.benchmarks.rows import take_turns
from teal_fast.benchmarks.served import Client, Generated, Plan, Row, Served, make_plan
from teal_fast.benchmarks.servers import Server, ours
from teal_fast.cli import ModelChoice, open_model, positive_int, run, sparsity
from teal_fast.evaluation.record import check_records_path, describe, put_out
from teal_fast.files.demo import find_gguf
from teal_fast.sparse_model import format_of

CONTEXT = 4096  # of llama-server, as ours by default
MEASURES = {  # a record's fields that have rounds, and their titles
    "tokens_per_s": "tokens/s",
    "first_token_s": "first token",
    "first_turn_s": "first turn",
    "second_turn_s": "second turn",
}


def median_ratio(values: list[float], others: list[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(value / other for value, other in zip(values, others, strict=True))


def to_record(about: dict, rounds: list[dict[str, Any]]) -> dict:
    """Medians and rounds of what was measured, and what it was measured on."""
    record = about | rounds[-1]
    for name in MEASURES:
        if name in record:
            values = [found[name] for found in rounds]
            record |= {name: statistics.median(values), f"{name}_rounds": values}
    rates = record["tokens_per_s_rounds"]
    record["tokens_per_s_spread"] = [min(rates), max(rates)]
    if "second_turn_s" in record:
        record["second_of_first"] = median_ratio(record["second_turn_s_rounds"], record["first_turn_s_rounds"])
    return record


def compare(record: dict, others: list[dict]) -> dict[str, dict[str, float]]:
    """The medians of the rounds' ratios of a record to others, by their name and by what was measured."""
    return {
        other["peer"] or other["mode"]: {
            name: median_ratio(record[f"{name}_rounds"], other[f"{name}_rounds"]) for name in MEASURES if name in other
        }
        for other in others
    }


def to_records(rows: list[Row], results: list[list[dict[str, Any]]]) -> list[dict]:
    """A record a row; our server's have `compared` to all peers, and to generate.py at the same sparsity."""
    records = [to_record(row.about, rounds) for row, rounds in zip(rows, results, strict=True)]
    for record in records:
        if record["mode"] == "serve.py":
            same = (r for r in records if r["mode"] == "generate.py" and r["sparsity"] == record["sparsity"])
            record["compared"] = compare(record, [*(r for r in records if r["peer"]), *same])
    return records


def print_record(record: dict) -> None:
    name = record["peer"] or f"{record['mode']} {record['sparsity']:.0%}"
    found = [f"{title} {record[key]:.4g}" for key, title in MEASURES.items() if key in record]
    found += [f"second of first {record['second_of_first']:.3f}"] if "second_of_first" in record else []
    print(f"{name:<18} {', '.join(found)}")
    for other, ratios in record.get("compared", {}).items():
        print(f"{'':<18} of {other}:", ", ".join(f"{MEASURES[key]} {value:.3f}x" for key, value in ratios.items()))


def describe_peer(program: Path) -> dict:
    """The fields of a record of llama-server, with what it calls itself."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(f"--llama_server {program} cannot be run ({error.strerror}): name the program") from error
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("version")]
    version = lines[0].removeprefix("version:").strip() if lines else "unknown"
    about = {"peer": "llama-server bf16", "peer_version": version, "format": "bf16"}
    return about | {"mode": "llama-server", "sparsity": 0.0}


def make_rows(options: argparse.Namespace, about: dict, peer: dict, plan: Plan, stack: ExitStack) -> list[Row]:
    """Rows that are ready for their first turn; their servers and the client end with the stack. peer: {} for none."""
    words = ["--device", options.device] if options.device else []
    client, server = stack.enter_context(Client()), stack.enter_context(Server(ours(options.checkpoint, *words)))
    numbered = list(enumerate(sorted(options.sparsity)))
    rows: list[Row] = []
    for place, nominal in numbered:  # each with numbers of its own, since they share a server
        fields = about | {"mode": "serve.py", "sparsity": nominal}
        rows.append(Served(fields, plan, count(1000 * place), client, server.port, {"sparsity": nominal}))
    place, nominal = numbered[-1]
    words = ["--checkpoint", options.checkpoint, *words, "--sparsity", str(nominal)]
    rows.append(Generated(about | {"mode": "generate.py", "sparsity": nominal}, plan, count(1000 * place), words))
    if peer:
        weights, threads = options.gguf or requantized(find_gguf(), "bf16"), str(about["threads"])
        command = [str(options.llama_server), "-m", str(weights), "-t", threads, "-np", "1", "-c", str(CONTEXT)]
        server = stack.enter_context(Server([*command, "--host", "127.0.0.1"]))
        rows.append(Served(about | peer, plan, count(), client, server.port))
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, metavar="FOLDER|demo", help="a converted checkpoint")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one, else cpu)")
    parser.add_argument("--sparsity", type=sparsity, nargs="+", default=[0.0, 0.5], help="(default: 0 0.5)")
    parser.add_argument("--new_tokens", type=positive_int, default=200, help="decoded (default: %(default)s)")
    parser.add_argument("--prompt_tokens", type=positive_int, default=500, help="read (default: %(default)s)")
    parser.add_argument("--turn_tokens", type=positive_int, default=3000, help="of the first turn (default: 3000)")
    parser.add_argument("--rounds", type=positive_int, default=5, help="(default: %(default)s)")
    parser.add_argument("--llama_server", type=Path, metavar="PROGRAM", help="llama.cpp's server, to be timed as well")
    parser.add_argument("--gguf", type=Path, help="file with the checkpoint's weights, for it (default: the demo's)")
    parser.add_argument("--out", type=Path, help="write the JSON records to this file")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    check_records_path(options.out)
    if options.new_tokens < 2:
        raise ValueError(f"--new_tokens {options.new_tokens}: expected at least 2, since the prompt gives the first")
    if options.llama_server and options.gguf is None and options.checkpoint != "demo":
        raise ValueError("--llama_server needs the GGUF file that the checkpoint was converted from: name it by --gguf")
    peer = describe_peer(options.llama_server) if options.llama_server else {}
    opened = open_model(ModelChoice(options.checkpoint, options.device), calibrated=max(options.sparsity) > 0)
    about = describe(opened.name, opened.device, format_of(opened.model))
    about |= {"benchmark": "serve", "new_tokens": options.new_tokens}
    plan = make_plan(opened.tokenizer, options.prompt_tokens, options.turn_tokens, options.new_tokens)
    del opened  # the servers have the model, and need the memory
    with ExitStack() as stack:
        rows = make_rows(options, about, peer, plan, stack)
        results = take_turns([row.turn for row in rows], options.rounds, lambda: 0.0, "serving")
    records = to_records(rows, [rounds for rounds, _ in results])
    for record in records:
        print_record(record)
    put_out(records, options.out)


if __name__ == "__main__":
    run(main)
