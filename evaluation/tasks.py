"""Multiple-choice and cloze tasks scored by log-likelihood, with the definitions of EleutherAI's lm-evaluation-harness.

A task is a file NAME.jsonl of requests (scripts/prepare_tasks.py makes some), one object a line:

    {"ctx": "Question: …\\nAnswer:", "conts": [" red", " blue"], "gold": 1}
    {"ctx": ["… so Ann", "… so Eve"], "conts": [" was late.", " was late."], "gold": 0}
    {"ctx": "… and then I lost my", "cont": " keys"}

The first two are choices, between continuations or between contexts (WinoGrande's partial scoring), the last a cloze.

acc: the likeliest choice, by summed log-likelihood, is the right one; of a cloze, greedy decoding would write it.
acc_norm: the same by log-likelihood a character. loss: nats of a cloze's continuation, whose exp is its perplexity.
No few-shot examples, no chat template. Continuations are sparse as decoded tokens are; contexts as `dense_tokens` says.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from teal_fast.engine.accounting import tally_kept
from teal_fast.files.store import parse_json
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.model import Transformer
from teal_fast.sparse_model import leading_dense
from teal_fast.weights.output import output_weight

DenseTokens = Callable[[int], int]  # of a context's number of tokens, how many leading ones are computed densely
PREFILLS: dict[str, DenseTokens] = {"dense": lambda n: n, "half": lambda n: n // 2, "full": lambda n: 1}


@dataclass(frozen=True)
class Request:
    """One item: contexts and continuations, pair by pair; gold: the right one's index, None for a cloze."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int | None

    @property
    def one_context(self) -> bool:
        return len(set(self.contexts)) == 1


@dataclass(frozen=True)
class Likelihood:
    """Of a continuation: its log-likelihood in nats, and whether greedy decoding would write it."""

    log_likelihood: float
    greedy: bool


@dataclass(frozen=True)
class TaskScore:
    """Metrics by name, fp64 [items] each, over a task's items in order; and the sparsity achieved by tensor kind."""

    metrics: dict[str, Tensor]
    achieved: dict[str, float]


def read_task(folder: Path, name: str, limit: int | None = None) -> list[Request]:
    """The requests of NAME.jsonl, or `limit` of them spread evenly over the file, whose neighbours are alike."""
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.jsonl"))) or "no .jsonl files"
        raise FileNotFoundError(f"no task {name} in {folder}, it has {known}: see scripts/prepare_tasks.py")
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no requests")
    count = min(limit or len(lines), len(lines))
    kept = [i * len(lines) // count for i in range(count)]
    return [_parse(lines[i], f"{path}, line {i + 1}") for i in kept]


def _parse(line: str, place: str) -> Request:
    try:
        record = parse_json(line, place)
        contexts = record["ctx"]
        continuations = [record["cont"]] if "cont" in record else record["conts"]
        gold = None if "cont" in record else record["gold"]
        contexts = [contexts] * len(continuations) if isinstance(contexts, str) else contexts
        texts = all(isinstance(text, str) and text for text in (*contexts, *continuations))
        if not (texts and len(contexts) == len(continuations) and (gold is None or gold in range(len(contexts)))):
            raise ValueError("texts or gold")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{place}: expected "ctx" with "conts" and "gold", or with "cont"') from error
    return Request(tuple(contexts), tuple(continuations), gold)


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a context and of what follows it, cut as the harness cuts: spaces at the context's end go along."""
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    head, whole = tokenizer.encode(stripped), tokenizer.encode(stripped + continuation)
    if not head or len(whole) <= len(head):
        raise ValueError(f"no tokens are left to score in {continuation!r} after {context!r}")
    return head, whole[len(head) :]


@torch.no_grad()
def likelihoods(
    model: Transformer, output: Tensor, context: list[int], continuations: list[list[int]], dense_tokens: DenseTokens
) -> Iterator[Likelihood]:
    """Scores continuations of one context, which is computed once into the model's cache; the cache must be set up.

    `output`: the output layer's weight, fp32 [vocab, dim].
    """

    def log_probabilities(hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), output).log_softmax(-1)

    device = output.device
    with leading_dense(model, dense_tokens(len(context))):
        first = log_probabilities(model.hidden(torch.tensor([context], device=device))[0, -1:])
    for ids in continuations:
        target = torch.tensor(ids, device=device)
        rows = first
        if len(ids) > 1:  # the last token's own states predict nothing that is scored
            positions = torch.arange(len(context), len(context) + len(ids) - 1, device=device)
            with leading_dense(model, 0):
                rows = torch.cat((first, log_probabilities(model.hidden(target[None, :-1], positions)[0])))
        total = rows.gather(1, target[:, None]).sum().item()
        if not math.isfinite(total):
            raise ValueError("a log-likelihood is NaN or inf: is the checkpoint sound, is fp16 its type?")
        yield Likelihood(total, bool((rows.argmax(-1) == target).all()))


def judge(request: Request, scored: list[Likelihood]) -> dict[str, float]:
    """The metrics of one item, by name."""
    if request.gold is None:
        return {"acc": float(scored[0].greedy), "loss": -scored[0].log_likelihood}
    totals = [likelihood.log_likelihood for likelihood in scored]
    lengths = [len(continuation.removeprefix(" ")) for continuation in request.continuations]
    normed = [total / max(length, 1) for total, length in zip(totals, lengths, strict=True)]
    metrics = {"acc": float(totals.index(max(totals)) == request.gold)}
    if request.one_context:  # else it is the contexts that are chosen between, over one continuation
        metrics["acc_norm"] = float(normed.index(max(normed)) == request.gold)
    return metrics


def score_task(
    model: Transformer, tokenizer: Tokenizer, requests: list[Request], dense_tokens: DenseTokens, progress: tqdm
) -> TaskScore:
    """Scores all requests at the thresholds now set."""
    encoded = [
        [encode_pair(tokenizer, *pair) for pair in zip(request.contexts, request.continuations, strict=True)]
        for request in requests
    ]
    longest = max(len(context) + len(continuation) for pairs in encoded for context, continuation in pairs)
    model.setup_caches(1, longest)
    output = output_weight(model.output)
    results = []
    with tally_kept(model) as tally:
        for request, pairs in zip(requests, encoded, strict=True):
            scored: list[Likelihood] = []
            for context, group in groupby(pairs, key=lambda pair: pair[0]):
                continuations = [continuation for _, continuation in group]
                scored += likelihoods(model, output, context, continuations, dense_tokens)
            results.append(judge(request, scored))
            progress.update()
    metrics = {name: torch.tensor([r[name] for r in results], dtype=torch.float64) for name in results[0]}
    return TaskScore(metrics, tally.by_kind(model))


def mean_and_error(values: Tensor) -> tuple[float, float | None]:
    """The mean of values [items] and its standard error, None for a single one."""
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    return values.mean().item(), error


def summarize(score: TaskScore, dense: TaskScore | None) -> dict:
    """A record's fields: each metric with its standard error and, item by item, its change from the dense model's."""
    fields: dict = {"items": len(next(iter(score.metrics.values())))}
    for name, values in score.metrics.items():
        fields[name], fields[f"{name}_error"] = mean_and_error(values)
        if dense is not None:
            fields[f"{name}_change"], fields[f"{name}_change_error"] = mean_and_error(values - dense.metrics[name])
    if "loss" in fields:
        fields["perplexity"] = math.exp(min(fields["loss"], 700))
    achieved = dict(score.achieved)
    return fields | {"achieved_sparsity": achieved.pop("all", 0.0), "achieved_by_kind": achieved}
