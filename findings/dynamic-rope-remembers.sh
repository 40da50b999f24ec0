#!/bin/sh
# transformers 5.23.0, torch 2.13.0.
#
# Input: a Llama with "dynamic" rotary scaling of a model for 64 positions, and a text of 100 tokens; once by a fresh
# model, once after the same model has seen a text of 200 tokens.
# Expected: the same logits. A model that is called without a cache has no memory.
# Seen: other logits. The rotary frequencies of the longest text so far stay, until a text of less than 64 tokens comes.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 transformers==5.23.0
cat > ask.py <<'END'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
config = LlamaConfig(**sizes, vocab_size=100, max_position_embeddings=64, rope_parameters=rope, initializer_range=0.2)
model = LlamaForCausalLM(config).eval()
text = torch.randint(100, (1, 200))
with torch.inference_mode():
    fresh = model(text[:, :100], use_cache=False).logits
    model(text, use_cache=False)
    again = model(text[:, :100], use_cache=False).logits
    model(text[:, :50], use_cache=False)
    reset = model(text[:, :100], use_cache=False).logits
print(torch.equal(fresh, again), torch.equal(fresh, reset))
END
echo "transformers 5.23.0, torch 2.13.0"
echo "expected: True True (as fresh: after a longer text, and after a short one)"
seen=$(venv/bin/python ask.py 2>/dev/null | tail -n 1)
echo "seen: $seen"
test "$seen" = "False True"
