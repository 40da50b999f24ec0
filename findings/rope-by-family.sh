#!/bin/sh
# transformers 5.23.0.
#
# Input: config.json of three families, as a reader who knows Llama's would write them.
# 1. olmo3 with rope_theta 1000000. Expected: all layers have it, as in Llama. Seen: layers with full attention do, those
#    with a window have 500000, the class's default: the first reader takes the field away from the second.
# 2. phi3 whose block rope_scaling says original_max_position_embeddings 8192. Expected: 8192, as in Llama. Seen: 4096, the
#    default of a field of the same name outside of the block, which counts for more even where the file lacks it.
# 3. phi3 with rope_scaling of type yarn. Expected: YaRN. Seen: longrope, which then wants other fields.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet transformers==5.23.0
cat > ask.py <<'END'
from transformers import Olmo3Config, Phi3Config

sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "max_position_embeddings": 131072}
ropes = Olmo3Config.from_dict(sizes | {"rope_theta": 1000000.0}).rope_parameters
factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 8192}
read = lambda kind: Phi3Config.from_dict(sizes | {"rope_scaling": {"type": kind} | factors}).rope_parameters
thetas = [int(ropes[f"{kind}_attention"]["rope_theta"]) for kind in ("full", "sliding")]
print(*thetas, read("longrope")["original_max_position_embeddings"], read("yarn")["rope_type"])
END
echo "transformers 5.23.0"
echo "expected: 1000000 1000000 8192 yarn (OLMo 3's two thetas, Phi's original length, its type of scaling)"
seen=$(venv/bin/python ask.py 2>/dev/null | tail -n 1)
echo "seen: $seen"
test "$seen" = "1000000 500000 4096 longrope"
