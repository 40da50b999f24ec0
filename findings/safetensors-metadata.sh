#!/bin/sh
# safetensors 0.8.0, numpy 2.4.0.
#
# Input: one dictionary of tensors and one of six metadata entries, saved 20 times by one process.
# Expected: 20 times the same bytes, as the tensors alone give, and as one entry of metadata gives.
# Seen: with six entries the header lists them in another order nearly each time, so the files differ and so do their
# hashes, though they load equal. Whoever compares checkpoints by hash keeps to one entry (say, a JSON text).
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet safetensors==0.8.0 numpy==2.4.0
cat > metadata.py <<'EOF'
import json

import numpy as np
import safetensors
from safetensors.numpy import save

print("safetensors", safetensors.__version__)
print("expected: equal tensors and metadata are equal bytes")
tensors = {name: np.arange(4, dtype=np.float32) for name in ("down", "gate", "up")}
six = {name: "1" for name in ("bits", "group", "layout", "model", "scales", "version")}


def header(data):
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


different = {}
for case, metadata in (("no metadata", None), ("one entry", {"all": json.dumps(six)}), ("six entries", six)):
    saved = [save(tensors, metadata) for _ in range(20)]
    assert all(header(data) == header(saved[0]) for data in saved), "the headers hold the same"
    assert len({len(data) for data in saved}) == 1
    different[case] = len(set(saved))
    print(f"seen: {case}: {different[case]} different of 20")
print("seen: two of the orders:", *(list(header(data)["__metadata__"]) for data in list(dict.fromkeys(saved))[:2]))
assert different["no metadata"] == different["one entry"] == 1 < different["six entries"], "changed"
EOF
venv/bin/python metadata.py
