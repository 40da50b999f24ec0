"""What a rank computes for test_ranks.py, and one process alone: `rank.py OUT FOLDER…`."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from teal_fast.cli import ModelChoice, Opened, open_model, run
from teal_fast.engine.engine import Engine
from teal_fast.engine.ranks.group import Ranks
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.engine.steps import PlainStep
from teal_fast.sparse_model import Phase, SparseLinear, watch_inputs

PROMPT = "Plants make food from sunlight, water and air. This is called"
TOKENS = 64
NEAREST = "nearest"  # of a rank's own inputs


@torch.no_grad()
def compute(opened: Opened) -> dict[str, torch.Tensor]:
    """Dense logits [T, vocab] of the prompt, tokens, by how much the greedy ones were likeliest, what was skipped.

    NEAREST: how near to its threshold an input came up to a greedy token, as a share of the layer's largest.
    """
    prompt = opened.tokenizer.encode(PROMPT)
    engine = Engine(opened.model, opened.calibration, context=128, make_step=PlainStep)
    greedy, drawn = Sampling(0.0), Sampling(1.0)
    texts = {
        "dense": Request(prompt, greedy, 0.0, 8),
        "drawn": Request(prompt, drawn, 0.5, 16),  # without a seed
        "greedy": Request(prompt, greedy, 0.5, TOKENS, top_logprobs=2),
    }
    found, margins, near = {}, [], []

    def watch(name: str, layer: SparseLinear, x: torch.Tensor, phase: Phase) -> None:
        if phase.dense_tokens == 0:
            near.append(float(((x.abs() - layer.threshold).abs() / x.abs().max()).min()))

    for name, request in texts.items():
        near.clear()
        with watch_inputs(engine.model, watch):
            tokens = list(engine.stream(request))
        found[name] = torch.tensor([token.id for token in tokens])
        margins = [token.top[0][1] - token.top[1][1] for token in tokens if token.top]
    found |= {"achieved": torch.tensor(list(engine.achieved_sparsity().values())), "margins": torch.tensor(margins)}
    nearest = torch.tensor(near).view(TOKENS - 1, -1).amin(1).cummin(0).values  # the first token took no sparse step
    return found | {NEAREST: nearest, "logits": opened.model(torch.tensor([prompt]))[0].contiguous()}


def main() -> None:
    out, *folders = map(Path, sys.argv[1:])
    ranks = Ranks.join("cpu")
    for folder in folders:
        found = compute(open_model(ModelChoice(str(folder), "cpu", "fp32"), True, ranks))
        save_file(found, out / f"{folder.name}-{'alone' if ranks is None else ranks.shard.rank}.safetensors")


if __name__ == "__main__":
    run(main, in_ranks=True)
