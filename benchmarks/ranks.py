"""Times decoding by several GPUs of one host, a rank each, beside one of them alone, on random weights.

    torchrun --nproc_per_node=2 -m teal_fast.benchmarks.ranks --shapes llama-3-70b --formats int8 --sparsity 0 0.5

In each format one GPU decodes first, while the others wait, where the weights fit on it; then all of them do. Each
rank's thresholds are calibrated on random tokens. Rank 0 prints one JSON line of records; --out writes the same.
"""

import argparse
import gc
import uuid
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from teal_fast.benchmarks.bandwidth import bandwidth_meter
from teal_fast.benchmarks.decode import print_record
from teal_fast.benchmarks.decoder import make_decoders
from teal_fast.benchmarks.rows import measure, random_prompt
from teal_fast.benchmarks.shapes import COMMON, SHAPES, calibrate_on_random_tokens, random_model
from teal_fast.cli import positive_int, run, sparsity
from teal_fast.engine.ranks.group import Ranks
from teal_fast.engine.ranks.layers import connect
from teal_fast.evaluation.record import check_records_path, describe, put_out
from teal_fast.families.config import model_args
from teal_fast.model import Transformer
from teal_fast.sparse_model import format_of
from teal_fast.weights.formats import FORMATS, Format
from teal_fast.weights.output import Int8Output
from teal_fast.weights.shards import Cut


def random_part(config: dict, ranks: Ranks, format: Format | None) -> Transformer:
    """A rank's part of a model of this config.json, of random weights; embeddings are the same on all ranks."""
    cut = Cut(ranks.shard, model_args(config))
    sizes = {"num_attention_heads": cut.args.n_heads, "num_key_value_heads": cut.args.n_kv_heads}
    own = {"intermediate_size": cut.args.ffn_dim, "head_dim": cut.args.head_dim, "tie_word_embeddings": False}
    model = random_model(config | sizes | own, ranks.device, torch.bfloat16, ranks.shard.rank, format=format)
    dist.broadcast(model.tok_embeddings.weight, 0)
    tokens = slice(cut.vocabulary.start, cut.vocabulary.stop)
    if isinstance(model.output, Int8Output):
        model.output = Int8Output(model.output.weight[tokens].clone(), model.output.scale[tokens].clone())
    else:
        model.output.weight = nn.Parameter(model.output.weight[tokens].clone(), requires_grad=False)
    return connect(model, ranks)


def benchmark(model: Transformer, options: argparse.Namespace, about: dict) -> list[dict]:
    """The records of one model, whole or this rank's part."""
    prompt, device = random_prompt(model.args.vocab_size, options.prompt_tokens), model.norm.weight.device
    calibration = calibrate_on_random_tokens(model)
    decoders = make_decoders(model, calibration, prompt, options.new_tokens, options.sparsity)
    rows, common = [decoder.row() for decoder in decoders], describe(options.shapes, device, format_of(model))
    measure(rows, options.rounds, bandwidth_meter(device))
    return [common | about | row.record() for row in rows]


def fits(config: dict, format: Format | None, device: torch.device) -> bool:
    """Whether the whole model leaves the GPU a tenth of its memory."""
    with torch.device("meta"):
        values = sum(parameter.numel() for parameter in Transformer(model_args(config)).parameters())
    nbytes = values * ({"int8": 1, "int4": 0.6}[format.name] if format else 2)
    return nbytes < 0.9 * torch.cuda.get_device_properties(device).total_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=SHAPES, default="llama-3-70b", help="(default: %(default)s)")
    parser.add_argument("--formats", nargs="+", choices=("dense", *FORMATS), default=["int8"], help="(default: int8)")
    parser.add_argument("--sparsity", type=sparsity, nargs="+", default=[0.0, 0.5], help="nominal (default: 0 0.5)")
    parser.add_argument("--prompt_tokens", type=positive_int, default=5, help="(default: 5)")
    parser.add_argument("--new_tokens", type=positive_int, default=100, help="tokens a round (default: %(default)s)")
    parser.add_argument("--rounds", type=positive_int, default=3, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the JSON records to this file")
    options = parser.parse_args()
    check_records_path(options.out)
    if (ranks := Ranks.join("cuda")) is None:
        raise ValueError("one process was started: start several with torchrun --nproc_per_node=2")
    config, records = COMMON | SHAPES[options.shapes], []
    common = {"benchmark": "ranks", "run": uuid.uuid4().hex[:12]}
    for name in options.formats:
        format = Format(name, 128 if name == "int4" else 0) if name in FORMATS else None
        if fits(config, format, ranks.device) and ranks.shard.rank == 0:
            model = random_model(config, ranks.device, torch.bfloat16, format=format)
            records += benchmark(model, options, common | {"ranks": 1})
            del model
        gc.collect()  # steps and their graphs refer to one another
        torch.cuda.empty_cache()
        dist.barrier()
        records += benchmark(random_part(config, ranks, format), options, common | {"ranks": ranks.shard.ranks})
    for record in records:
        print(f"{record['ranks']} ranks", end=" ")
        print_record(record)
    put_out(records, options.out if ranks.shard.rank == 0 else None)


if __name__ == "__main__":
    run(main, in_ranks=True)
