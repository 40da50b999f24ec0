"""Run by torchrun, a process a GPU: the step in three stages of a model that ranks share, against its reference."""

import json
import sys
from pathlib import Path

import torch

from teal_fast.benchmarks.shapes import random_model
from teal_fast.engine.grids import measure_grids
from teal_fast.engine.ranks.group import Ranks
from teal_fast.engine.ranks.launch import meet
from teal_fast.engine.ranks.layers import connect
from teal_fast.engine.staged_step import StagedStep, addends, build_stages, rank_words
from teal_fast.files.checkpoint import METADATA
from teal_fast.files.load import PACKED, load_model, stored_as
from teal_fast.files.store import write_safetensors
from teal_fast.model import Transformer
from teal_fast.sparse_model import sparse_layers
from teal_fast.tests.engine.staged_reference import staged_reference
from teal_fast.tests.engine.test_staged_step import BIASED, EVEN, QWEN3, WIDE, call, error
from teal_fast.weights.formats import Format

CASES = {
    "bf16": (EVEN, None),
    "odd-vocabulary": (EVEN | {"vocab_size": 501}, None),
    "biased": (BIASED, None),
    "qwen3": (QWEN3, None),
    "wide": (WIDE, None),
    "int8": (WIDE, Format("int8")),
    "int4": (WIDE, Format("int4", 128)),
}


def write(model: Transformer, config: dict, format: Format | None, folder: Path) -> None:
    """The model as a checkpoint folder, without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        stored_as(name, PACKED["2"] if format else "weight"): tensor for name, tensor in model.named_parameters()
    }
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    metadata = METADATA | (format.metadata() if format else {})
    write_safetensors(folder / "model.safetensors", layout, lambda name: tensors[name].cpu(), metadata, None)


@torch.no_grad()
def check(ranks: Ranks, config: dict, format: Format | None, folder: Path) -> None:
    whole = random_model(config, ranks.device, torch.bfloat16, std=config["hidden_size"] ** -0.5, format=format)
    if ranks.shard.rank == 0:
        write(whole, config, format, folder)
    ranks.all(torch.zeros(1, device=ranks.device)).cpu()  # it is written
    model = connect(load_model(folder, ranks.device, shard=ranks.shard), ranks)
    generator = torch.Generator(ranks.device).manual_seed(0)
    for (name, layer), own in zip(sparse_layers(whole).items(), sparse_layers(model).values(), strict=True):
        dropped = torch.rand(layer.threshold.shape, device=ranks.device, generator=generator) < 0.5
        layer.threshold.masked_fill_(dropped, torch.inf)
        own.threshold.copy_(layer.threshold[ranks.shard.inputs(name, len(dropped))])
    cache, own_cache = whole.new_cache(1, 1024), model.new_cache(1, 1024)
    heads = ranks.shard.of(config["num_key_value_heads"])
    for tensor, own in zip((*cache.k, *cache.v), (*own_cache.k, *own_cache.v), strict=True):
        tensor.normal_(generator=generator)
        own.copy_(tensor[:, heads.start : heads.stop])
    step = StagedStep(model, own_cache, build_stages(model), rank_words(model))
    alone = StagedStep(whole, cache, build_stages(whole))
    grids = measure_grids(whole, addends(step.stages))
    for position in (0, 9, 700):
        expected = staged_reference(whole, cache, grids, 7, position)[0]
        found, usual = call(step, 7, position), error(call(alone, 7, position), expected)
        assert error(found, expected) < 2 * usual + 0.002, (position, error(found, expected), usual)
        assert all(torch.equal(one, found) for one in ranks.all(found)), "ranks differ"
        assert int(step.best[0]) == int(found.argmax())
        assert all(torch.equal(call(step, 7, position), found) for _ in range(100)), "replays differ"


def main() -> None:
    meet(True)
    ranks = Ranks.join("cuda")
    for name in sys.argv[2:] or CASES:
        check(ranks, *CASES[name], Path(sys.argv[1]) / name)
        print(f"{name} ok", flush=True)


if __name__ == "__main__":
    main()
