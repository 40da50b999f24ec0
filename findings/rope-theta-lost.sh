#!/bin/sh
# transformers 5.23.0.
#
# Input: a Llama configuration whose rotary base stands in `rope_parameters`, as this release itself saves it, to which
# scaling is added under the former name `rope_scaling`, as guides for longer contexts still say.
# Expected: the scaling comes on top of the base that the configuration states, or the two blocks are called a conflict.
# Seen: `rope_scaling` takes the place of all of `rope_parameters`. The base of 1,000,000 falls back to 10,000 without a
# warning, so that every position beyond the first few is rotated otherwise than the model was trained. A base that
# stands outside of both blocks is kept.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet transformers==5.23.0
cat > ask.py <<'END'
from transformers import LlamaConfig

scaling = {"rope_type": "linear", "factor": 2.0}
base = {"rope_type": "default", "rope_theta": 1e6}
inside = LlamaConfig.from_dict({"rope_parameters": base, "rope_scaling": dict(scaling)})
outside = LlamaConfig.from_dict({"rope_theta": 1e6, "rope_scaling": dict(scaling)})
print(int(inside.rope_parameters["rope_theta"]), int(outside.rope_parameters["rope_theta"]))
END
echo "transformers 5.23.0"
echo "expected: a base of 1000000 whether it stands in rope_parameters or beside rope_scaling"
seen=$(venv/bin/python ask.py 2>/dev/null)
echo "seen: in rope_parameters and beside rope_scaling: $seen"
test "$seen" = "10000 1000000"
