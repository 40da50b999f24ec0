"""Runs EleutherAI's lm-evaluation-harness on a sparse model: its tasks and data, our forward passes.

    pip install lm-eval==0.4.13
    python -m teal_fast.integrations.lm_eval --checkpoint demo --sparsity 0.4 --tasks hellaswag --limit 100

`TealLM` is a model of the harness, for code that calls it; `--prefill` is that of eval.py. Requests are scored one by
one. Chat templates are left out. The harness is not among our requirements: it brings some fifty packages.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from teal_fast.cli import (
    add_model_arguments,
    open_model,
    parse_with_model,
    positive_int,
    run,
    sparsity,
)
from teal_fast.engine.cache import new_cache
from teal_fast.engine.engine import Engine
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.engine.text import stream_text
from teal_fast.evaluation.record import check_records_path, describe, write_records
from teal_fast.evaluation.tasks import PREFILLS, likelihoods
from teal_fast.files.calibration import set_sparsity
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.sparse_model import format_of
from teal_fast.weights.output import output_weight

HARNESS = "lm-eval==0.4.13"  # the release that tests/integrations/test_lm_eval.py was run with
try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
except ImportError as missing:
    said = f"the harness is not installed ({missing}): pip install {HARNESS}"
    if __name__ == "__main__":
        sys.exit(f"error: {said}")
    raise ImportError(said) from missing

NEW_TOKENS = 256  # of a generation whose task names no limit, as the harness's own models have it
BOOTSTRAP = 1000  # draws for the errors of perplexities; none would leave the harness without any errors
ROLLING = 2048  # longest window of a text's rolling likelihood


class TealLM(TemplateLM):
    """An engine at one sparsity as the harness's model. prefill: which tokens of a context are sparse, see eval.py."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, sparsity: float = 0.0, prefill: str = "full"):
        super().__init__()
        self.engine, self.text, self.sparsity, self.dense_tokens = engine, tokenizer, sparsity, PREFILLS[prefill]
        self.model, self.output = engine.model, output_weight(engine.model.output)
        set_sparsity(engine.model, engine.calibration, sparsity)

    @property
    def eot_token_id(self) -> int:
        if self.text.eos_id is None and not self.text.eos_ids:
            raise ValueError("the checkpoint names no token that ends a text: add eos_token to tokenizer_config.json")
        return min(self.text.eos_ids) if self.text.eos_id is None else self.text.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.text.bos_id is None else self.text.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.text.encode(string, add_bos=add_special_tokens is not False)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return list(self._score(tqdm(pairs, desc="scoring", disable=disable_tqdm)))

    def _score(self, pairs: Iterable[tuple[list[int], list[int]]]) -> Iterable[tuple[float, bool]]:
        """Log-likelihood and greediness of contexts with continuations; too long a context loses its start."""
        most = self.model.args.max_position
        for context, group in groupby(pairs, key=lambda pair: pair[0]):
            continuations = [continuation for _, continuation in group]
            kept = context[-max(1, most - max(map(len, continuations))) :]
            for ids in (kept, *continuations):
                self.model.args.check_ids(ids)
            cache = new_cache(self.model, len(kept) + max(map(len, continuations)))
            for found in likelihoods(self.model, cache, self.output, kept, continuations, self.dense_tokens):
                yield found.log_likelihood, found.greedy

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        longest = min(ROLLING, self.model.args.max_position)
        totals = []
        for request in tqdm(requests, desc="scoring", disable=disable_tqdm):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, longest - 1, 1)
            totals.append(sum(total for total, _ in self._score(map(make_disjoint_window, windows))))
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts decoded greedily after a dense prompt, as generate.py decodes, up to the first stop string."""
        texts = []
        for request in tqdm(requests, desc="generating", disable=disable_tqdm):
            context, settings = request.args
            until = settings.get("until") or []
            if settings.get("do_sample"):
                raise ValueError("only greedy generation is served: set do_sample to false")
            until = [until] if isinstance(until, str) else until
            texts.append(self._generate(context, until, settings.get("max_gen_toks", NEW_TOKENS)))
        return texts

    def _generate(self, context: str, until: list[str], new_tokens: int) -> str:
        new_tokens = min(new_tokens, self.engine.context - 1)
        prompt = self.tok_encode(context)[-(self.engine.context - new_tokens) :]
        request = Request(prompt, Sampling(temperature=0), self.sparsity, new_tokens)
        return "".join(stream_text(self.engine.stream(request), self.text, prompt, until))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--tasks", nargs="+", required=True, metavar="NAME", help="tasks of the harness")
    parser.add_argument("--sparsity", type=sparsity, default=0.0, help="nominal (default: %(default)s)")
    parser.add_argument("--calibration", type=Path, help="calibration file (default: the checkpoint's own)")
    parser.add_argument("--prefill", choices=tuple(PREFILLS), default="full", help="what of a context is sparse")
    parser.add_argument("--num_fewshot", type=int, help="examples in a context (default: the task's)")
    parser.add_argument("--limit", type=positive_int, help="first items of each task (default: all)")
    parser.add_argument("--out", type=Path, help="write the harness's results as a JSON record to this file")
    options, choice = parse_with_model(parser)
    check_records_path(options.out)

    opened = open_model(choice, calibrated=options.sparsity > 0)
    engine = Engine(opened.model, opened.calibration, opened.tokenizer.eos_ids)
    language_model = TealLM(engine, opened.tokenizer, options.sparsity, options.prefill)
    settings = {"num_fewshot": options.num_fewshot, "limit": options.limit}
    try:
        found = lm_eval.simple_evaluate(language_model, tasks=options.tasks, **settings, bootstrap_iters=BOOTSTRAP)
    except (ConnectionError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"the harness cannot run {', '.join(options.tasks)} ({type(error).__name__}: {error})"
        ) from error
    print(make_table(found))
    record = describe(opened.name, opened.device, format_of(opened.model))
    record |= {"benchmark": "lm-eval", "package": HARNESS}
    record |= {"sparsity": options.sparsity, "prefill": options.prefill, **settings, "results": found["results"]}
    print(json.dumps(record))
    if options.out:
        write_records(options.out, [record])


if __name__ == "__main__":
    run(main)
