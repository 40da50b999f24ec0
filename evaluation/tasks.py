"""Multiple-choice and cloze tasks scored by log-likelihood, as EleutherAI's lm-evaluation-harness defines them.

A task is a file NAME.jsonl (scripts/prepare_tasks.py makes some) with one item per line:

    {"ctx": "Question: …\\nAnswer:", "conts": [" red", " blue"], "gold": 1}
    {"ctx": ["… so Ann", "… so Eve"], "conts": [" was late.", " was late."], "gold": 0}
    {"ctx": "… and then I lost my", "cont": " keys"}

The first two are choices: between continuations, or between contexts (WinoGrande's partial scoring). The last is a
cloze. The metrics of an item:

acc       1 if the likeliest choice, by summed log-likelihood, is the right one, or if greedy decoding writes the cloze.
acc_norm  The same by log-likelihood per character; only for choices between continuations.
loss      The negative log-likelihood of a cloze's continuation in nats; exp of its mean is the perplexity.

Continuations are sparse, as decoded tokens are; which tokens of a context are sparse is an argument. There are no
few-shot examples and no chat templates.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from teal_fast.engine.accounting import tally_kept
from teal_fast.engine.cache import new_cache
from teal_fast.evaluation.pruning import zeros_by_kind
from teal_fast.files.store import parse_json
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.model import KVCache, Transformer
from teal_fast.sparse_model import DECODE, Phase
from teal_fast.weights.output import output_weight

DenseTokens = Callable[[int], int]  # a context's number of tokens to its number of leading dense tokens
PREFILLS: dict[str, DenseTokens] = {"dense": lambda n: n, "half": lambda n: n // 2, "full": lambda n: 1}


@dataclass(frozen=True)
class TaskItem:
    """Pairs of a context and a continuation to choose between; gold: the right pair's index, None for a cloze."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int | None

    @property
    def one_context(self) -> bool:
        return len(set(self.contexts)) == 1


@dataclass(frozen=True)
class Likelihood:
    """A continuation's log-likelihood in nats, and whether greedy decoding would write it."""

    log_likelihood: float
    greedy: bool


@dataclass(frozen=True)
class TaskScore:
    """A task's metrics by name, fp64 [items] each, and the sparsity achieved by tensor kind."""

    metrics: dict[str, Tensor]
    achieved: dict[str, float]


def read_task(folder: Path, name: str, limit: int | None = None) -> list[TaskItem]:
    """Reads the items of NAME.jsonl, or `limit` of them spread evenly over the file, because neighbours are alike.

    Raises FileNotFoundError, or ValueError on a line that is no item.
    """
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.jsonl"))) or "no .jsonl files"
        raise FileNotFoundError(f"no task {name} in {folder}, it has {known}: see scripts/prepare_tasks.py")
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no items")
    count = min(limit or len(lines), len(lines))
    kept = [i * len(lines) // count for i in range(count)]
    return [_parse(lines[i], f"{path}, line {i + 1}") for i in kept]


def _parse(line: str, place: str) -> TaskItem:
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
    return TaskItem(tuple(contexts), tuple(continuations), gold)


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of its continuation, split as the harness splits them.

    Spaces at the context's end belong to the continuation. Raises ValueError when either has no tokens.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    head, whole = tokenizer.encode(stripped), tokenizer.encode(stripped + continuation)
    if not head or len(whole) <= len(head):
        raise ValueError(f"no tokens are left to score in {continuation!r} after {context!r}")
    return head, whole[len(head) :]


@torch.no_grad()
def likelihoods(
    model: Transformer,
    cache: KVCache,
    output: Tensor,
    context: list[int],
    continuations: list[list[int]],
    dense_tokens: DenseTokens,
) -> Iterator[Likelihood]:
    """Scores continuations (token ids) of one context, which is computed once into the cache.

    The cache must have room for context and continuation. output: the output layer's weight, fp32 [vocab, dim]. Raises
    ValueError when a log-likelihood is not finite.
    """

    def log_probabilities(hidden: Tensor) -> Tensor:
        return model.wide_logits(hidden, output).log_softmax(-1)

    device = output.device
    phase = Phase(dense_tokens(len(context)))
    first = log_probabilities(model.hidden(torch.tensor([context], device=device), None, cache, phase)[0, -1:])
    for ids in continuations:
        target = torch.tensor(ids, device=device)
        rows = first
        if len(ids) > 1:  # the last token's own states predict nothing that is scored
            positions = torch.arange(len(context), len(context) + len(ids) - 1, device=device)
            rows = torch.cat((first, log_probabilities(model.hidden(target[None, :-1], positions, cache, DECODE)[0])))
        total = rows.gather(1, target[:, None]).sum().item()
        if not math.isfinite(total):
            raise ValueError("a log-likelihood is NaN or inf: is the checkpoint sound, is fp16 its type?")
        yield Likelihood(total, bool((rows.argmax(-1) == target).all()))


def judge(item: TaskItem, scored: list[Likelihood]) -> dict[str, float]:
    """The metrics of one item by name. scored: one Likelihood for each pair."""
    if item.gold is None:
        return {"acc": float(scored[0].greedy), "loss": -scored[0].log_likelihood}
    totals = [likelihood.log_likelihood for likelihood in scored]
    lengths = [len(continuation.removeprefix(" ")) for continuation in item.continuations]
    normed = [total / max(length, 1) for total, length in zip(totals, lengths, strict=True)]
    metrics = {"acc": float(totals.index(max(totals)) == item.gold)}
    if item.one_context:  # otherwise the choice is between contexts, and lengths are equal
        metrics["acc_norm"] = float(normed.index(max(normed)) == item.gold)
    return metrics


def score_task(
    model: Transformer, tokenizer: Tokenizer, items: list[TaskItem], dense_tokens: DenseTokens, progress: tqdm
) -> TaskScore:
    """Scores all items at the thresholds that are set."""
    encoded = [
        [encode_pair(tokenizer, *pair) for pair in zip(item.contexts, item.continuations, strict=True)]
        for item in items
    ]
    longest = max(len(context) + len(continuation) for pairs in encoded for context, continuation in pairs)
    for context, continuation in (pair for pairs in encoded for pair in pairs):
        model.args.check_ids(context + continuation)
    cache = new_cache(model, longest)
    output = output_weight(model.output)
    results = []
    with tally_kept(model) as tally:
        for item, pairs in zip(items, encoded, strict=True):
            scored: list[Likelihood] = []
            for context, group in groupby(pairs, key=lambda pair: pair[0]):
                continuations = [continuation for _, continuation in group]
                scored += likelihoods(model, cache, output, context, continuations, dense_tokens)
            results.append(judge(item, scored))
            progress.update()
    metrics = {name: torch.tensor([r[name] for r in results], dtype=torch.float64) for name in results[0]}
    return TaskScore(metrics, tally.by_kind(model))


def mean_and_error(values: Tensor) -> tuple[float, float | None]:
    """The mean of values [items] and its standard error, None for a single item."""
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    return values.mean().item(), error


def summarize(score: TaskScore, dense: TaskScore | None) -> dict:
    """A record's fields: each metric with its standard error.

    With the dense model's score also the change from it; its error is that of paired differences, item by item.
    """
    fields: dict = {"items": len(next(iter(score.metrics.values())))}
    for name, values in score.metrics.items():
        fields[name], fields[f"{name}_error"] = mean_and_error(values)
        if dense is not None:
            fields[f"{name}_change"], fields[f"{name}_change_error"] = mean_and_error(values - dense.metrics[name])
    if "loss" in fields:
        fields["perplexity"] = math.exp(min(fields["loss"], 700))
    achieved = dict(score.achieved)
    return fields | {"achieved_sparsity": achieved.pop("all", 0.0), "achieved_by_kind": achieved}


def evaluate_tasks(
    models: Iterable[tuple[float, Transformer]],
    count: int,
    tokenizer: Tokenizer,
    tasks: dict[str, list[TaskItem]],
    prefill: str,
    pruned: bool = False,
) -> list[dict]:
    """The fields of a record for each task and each of `count` models with its nominal sparsity, task by task.

    A task's changes refer to the model at sparsity 0, if it came before. prefill: a key of PREFILLS; pruned: achieved
    sparsities are the shares of zero weights.
    """
    protocol = f"zero-shot, prefill {prefill}, continuations sparse"
    dense: dict[str, TaskScore] = {}
    records: dict[str, list[dict]] = {name: [] for name in tasks}
    with tqdm(total=sum(map(len, tasks.values())) * count, desc="evaluating", unit="item") as progress:
        for nominal, model in models:
            for name, items in tasks.items():
                score = score_task(model, tokenizer, items, PREFILLS[prefill], progress)
                if pruned:
                    score = replace(score, achieved=zeros_by_kind(model))
                if not nominal:
                    dense[name] = score
                fields = {"task": name, "protocol": protocol, "sparsity": nominal}
                records[name].append(fields | summarize(score, dense.get(name)))
    return [record for own in records.values() for record in own]
