#!/bin/sh
# transformers 5.23.0, gguf 0.19.0, torch 2.13.0.
#
# Input: a GGUF file of architecture llama whose metadata scale the rotary positions linearly by 4
# (llama.rope.scaling.type, llama.rope.scaling.factor), written by the gguf package.
# Expected: transformers reads the file's configuration with that scaling, as it reads the rotary base beside it.
# Seen: the base is read and the scaling is not, without a warning: the rotary type is "default". The loader looks for
# scaling under one other architecture's keys only. Such a model computes other logits there from the first token on
# that looks back.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 transformers==5.23.0 gguf==0.19.0
cat > ask.py <<'END'
import gguf
import numpy as np
from transformers import AutoConfig

writer = gguf.GGUFWriter("model.gguf", "llama")
writer.add_context_length(2048)
writer.add_embedding_length(64)
writer.add_block_count(1)
writer.add_feed_forward_length(128)
writer.add_head_count(4)
writer.add_head_count_kv(4)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_rope_freq_base(5000.0)
writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
writer.add_rope_scaling_factor(4.0)
writer.add_vocab_size(32)
writer.add_tensor("token_embd.weight", np.zeros((32, 64), np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
rope = AutoConfig.from_pretrained(".", gguf_file="model.gguf").rope_parameters
print(rope["rope_type"], int(rope["rope_theta"]), rope.get("factor"))
END
echo "transformers 5.23.0, gguf 0.19.0, torch 2.13.0"
echo "expected: linear 5000 4.0 (rotary type, base, factor)"
seen=$(venv/bin/python ask.py 2>/dev/null | tail -n 1)
echo "seen: $seen"
test "$seen" = "default 5000 None"
