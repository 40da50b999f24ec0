"""What tests of the vLLM plugin share: its environment, folders to serve, the dense model's answers by transformers."""

import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from teal_fast.files.exported import open_exported

TOKENS = 24
ROUNDING = 1e-3  # of a log-probability
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",  # more wait for one another where cores are busy
    "VLLM_PLUGINS": "teal",  # the workers count
}
PROMPTS = (
    "The capital of France is",
    "Once upon a time",
    "Water boils when",
    "To make bread, you need",
    "The first president of the United States",
    "def fibonacci(n):",
    "In the middle of the night, the old house",
    "Plants turn sunlight into",
    "My favourite season is autumn because",
    "The three primary colours are",
)


def environment() -> dict[str, str]:
    """For vLLM's processes, to which our interpreter of Triton would look like a GPU's compiler."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | SETTINGS


def ask_vllm(task: dict, **variables: str) -> list:
    """What vllm_run.py answers to a task."""
    command = [sys.executable, "-m", "teal_fast.tests.integrations.vllm_run"]
    options = {"input": json.dumps(task), "capture_output": True, "text": True, "cwd": tempfile.gettempdir()}
    done = subprocess.run(command, env=environment() | variables, timeout=900, check=False, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


@dataclass
class Answer:
    """ids and log-probabilities of an answer's tokens; sure: how many of them other sums cannot change."""

    ids: list[int]
    logprobs: list[float]
    sure: int


class Reference:
    """A folder's dense model in fp32 by transformers, whose inputs plain hooks mask in calls of at most `max_m` tokens.

    Other sums let an input that lies within rounding of its threshold pass on the other side. A token of the demo model
    has 100,000 inputs, so that one does every ten tokens or so, and what follows differs by up to 0.3 in a token's
    log-probability, at any margin between tokens: the model's own noise. So an answer is sure until the first of these.
    """

    def __init__(self, folder: Path, max_m: int, close: float = 1e-6):
        """close: how far, relative to the threshold, rounding moves an input."""
        config = transformers.AutoConfig.from_pretrained(folder)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(folder, config=config, dtype=torch.float32).eval()
        self.max_m, self.close, self.closest = max_m, close, math.inf
        for name, threshold in open_exported(folder).thresholds().items():
            self.model.get_submodule(name).register_forward_pre_hook(
                lambda layer, given, threshold=threshold: (self.mask(given[0], threshold),)
            )

    def mask(self, x: Tensor, threshold: Tensor) -> Tensor:
        if x.shape[:-1].numel() > self.max_m:
            return x
        self.closest = min(self.closest, ((x.abs() - threshold).abs() / threshold).min().item())
        return x.masked_fill(x.abs() <= threshold, 0)

    def answer(self, prompt: list[int]) -> Answer:
        """TOKENS greedy tokens with transformers' cache: the prompt in one call, then token by token."""
        found, ids, cache, self.closest = (
            Answer([], [], 0),
            torch.tensor([prompt]),
            transformers.DynamicCache(),
            math.inf,
        )
        for _ in range(TOKENS):
            with torch.inference_mode():
                logits = self.model(ids, past_key_values=cache, use_cache=True).logits[0, -1]
            (best, second), (token, _) = (part.tolist() for part in logits.log_softmax(-1).topk(2))
            if self.closest > self.close and best - second > ROUNDING and found.sure == len(found.ids):
                found.sure += 1
            found.ids.append(token)
            found.logprobs.append(best)
            ids = torch.tensor([[token]])
        return found


def check_agree(found: list[dict], expected: list[Answer], least: int) -> None:
    """Sure tokens are equal and have equal log-probabilities; there must be at least so many of all answers."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["ids"][: theirs.sure] == theirs.ids[: theirs.sure]
        difference = torch.tensor(ours["logprobs"]) - torch.tensor(theirs.logprobs)
        assert (difference[: theirs.sure].abs() < ROUNDING).all(), (difference, theirs.sure)
    assert sum(answer.sure for answer in expected) >= least, [answer.sure for answer in expected]
