#!/bin/sh
# transformers 5.23.0, torch 2.13.0.
#
# Input: a model saved to a folder as one file, then another of the same shape to the same folder in shards, by a smaller
# max_shard_size, as happens without one where a model outgrows the default.
# Expected: from_pretrained gives the model that was saved last, as it does where both were saved as one file.
# Seen: it gives the first, without a warning. save_pretrained removes older shards but not the older model.safetensors,
# which from_pretrained prefers to the new index beside it.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 transformers==5.23.0
cat > ask.py <<'END'
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
first, last = (LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=100)) for _ in range(2))


def saved_last(**options):
    """Which one a folder gives that has seen both."""
    first.save_pretrained("model")
    last.save_pretrained("model", **options)
    found = LlamaForCausalLM.from_pretrained("model").state_dict()
    return [
        name
        for name, model in (("first", first), ("last", last))
        if all(torch.equal(found[key], tensor) for key, tensor in model.state_dict().items())
    ]


print(*saved_last(), *saved_last(max_shard_size="100KB"), len([*Path("model").glob("*.safetensors")]))
END
echo "transformers 5.23.0, torch 2.13.0"
echo "expected: last last 4 (as one file, in shards, and four shards)"
seen=$(venv/bin/python ask.py 2> said | tail -n 1)
echo "seen: $seen"
test "$seen" = "last first 5"
! grep -qi warn said
