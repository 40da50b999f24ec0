"""Whether our model says what transformers' says on the very same GGUF file: perplexity in fp32, by eval.py's protocol.

    python -m teal_fast.benchmarks.agree_transformers --gguf model.gguf --text wiki.test.raw --windows 8
    python -m teal_fast.benchmarks.agree_transformers --gguf model.gguf --checkpoint checkpoints/wide

Both score the same ids, ours, in the same windows, of which each scores all but its first token. Ours is the file as it
is, or a checkpoint that was converted from it, whole windows at once and, for `--by_token` of them, token by token by
the decode step, which rounds inputs of quantized weights. Everything is dense and on the CPU. Ends with an error when
perplexities are further apart than 0.5 %. transformers needs 4 bytes a weight and minutes to load. By the step a single
window of 512 tokens can be further apart by rounding alone, four together are not (agree-transformers-cpu.json).
"""

import argparse
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from teal_fast.benchmarks.peer_transformers import load_gguf
from teal_fast.benchmarks.peers import check_installed
from teal_fast.calibration.corpus import read_ids
from teal_fast.cli import ModelChoice, open_model, positive_int, run
from teal_fast.engine.engine import Engine
from teal_fast.evaluation.perplexity import DEFAULT_TEXT, WindowProtocol, window_loss
from teal_fast.evaluation.record import check_records_path, describe, put_out
from teal_fast.sparse_model import DENSE, dtype_name, format_of
from teal_fast.weights.output import output_weight

MOST_APART = 0.005  # of perplexities


def their_loss(model: nn.Module, window: list[int]) -> Tensor:
    """Negative log-likelihoods in nats, fp32 [context - 1], as window_loss gives ours."""
    tokens = torch.tensor([window])
    return F.cross_entropy(model(tokens, use_cache=False).logits[0, :-1].float(), tokens[0, 1:], reduction="none")


def step_loss(engine: Engine, window: list[int]) -> Tensor:
    """The same of ours, token by token."""
    losses = []
    for position, (token, target) in enumerate(pairwise(window)):
        logits = engine.step(torch.tensor([[token]]), torch.tensor([position]))
        losses.append(F.cross_entropy(logits.flatten().float(), torch.tensor(target)))
    return torch.stack(losses)


def compare(ours: list[Tensor], theirs: list[Tensor]) -> dict:
    """Both perplexities and how far ours is from theirs, as a fraction of it."""
    found, expected = (torch.cat(losses).mean().exp().item() for losses in (ours, theirs))
    return {"perplexity": found, "transformers_perplexity": expected, "apart": found / expected - 1}


@torch.no_grad()
def make_record(choice: ModelChoice, gguf: Path, text: list[Path], protocol: WindowProtocol, by_token: int) -> dict:
    import transformers

    opened = open_model(choice, calibrated=False)
    model = opened.model
    ids, prefix = read_ids(text, opened.tokenizer, model.args), opened.tokenizer.prefix
    windows = [window for window, _ in protocol.cut(ids, model.args.max_position, prefix)]
    output = output_weight(model.output)
    ours = [window_loss(model, output, window, 1, DENSE) for window in tqdm(windows, "teal-fast", unit="window")]
    engine = Engine(model, None, (), protocol.context)
    stepped = [step_loss(engine, window) for window in tqdm(windows[:by_token], "token by token", unit="window")]
    about = describe(opened.name, opened.device, format_of(model)) | {"dtype": dtype_name(model)}
    peer = load_gguf(gguf, torch.float32)
    theirs = [their_loss(peer, window) for window in tqdm(windows, "transformers", unit="window")]
    return about | {
        "benchmark": "agree_transformers",
        "peer": "transformers",
        "peer_version": transformers.__version__,
        "text": [path.name for path in text],
        "protocol": protocol.describe(len(windows)),
        **compare(ours, theirs),
        "largest_apart": max((our - their).abs().max().item() for our, their in zip(ours, theirs, strict=True)),
        "by_token": compare(stepped, theirs[:by_token]) | {"windows": by_token, "mode": engine.step.mode}
        if by_token
        else None,
    }


def check(record: dict) -> None:
    """Raises ValueError where the programs are further apart than rounding puts them."""
    for found in (record, record["by_token"]):
        if found and not abs(found["apart"]) <= MOST_APART:
            raise ValueError(f"perplexities are {found['apart']:+.3%} apart, expected at most {MOST_APART:.1%}")


def print_record(record: dict) -> None:
    print(f"{record['model']}, {record['format']}: {record['protocol']}")
    for name, found in (("whole windows", record), ("token by token", record["by_token"])):
        if found:
            ours, theirs = found["perplexity"], found["transformers_perplexity"]
            print(f"{name}: perplexity {ours:.4f}, transformers' {theirs:.4f}: {found['apart']:+.4%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True, help="the file")
    parser.add_argument("--checkpoint", help="ours, which was made from it (default: the file as it is)")
    parser.add_argument("--text", type=Path, nargs="+", default=[DEFAULT_TEXT], help="files or folders of text")
    parser.add_argument("--context", type=positive_int, default=512, help="tokens a window (default: %(default)s)")
    parser.add_argument("--windows", type=positive_int, help="windows to score, spread over the text (default: all)")
    parser.add_argument("--by_token", type=int, default=1, help="windows that the step scores (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the JSON record to this file")
    options = parser.parse_args()
    check_records_path(options.out)
    check_installed([("transformers", "")])
    choice = ModelChoice(options.checkpoint or str(options.gguf), "cpu", "fp32")
    protocol = WindowProtocol(options.context, limit=options.windows)
    record = make_record(choice, options.gguf, options.text, protocol, options.by_token)
    print_record(record)
    put_out([record], options.out)
    check(record)


if __name__ == "__main__":
    run(main)
