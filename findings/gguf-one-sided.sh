#!/bin/sh
# gguf 0.19.0, numpy 2.4.0.
#
# Input: a block of 32 weights that are 1 and -1 in turn.
# Expected: four bits hold two values of one magnitude (nearly) exactly: the format has a scale for each block.
# Seen: Q4_0 gives back 1 and -0.875, and the negated block gives -1 and 0.875. Its levels run from -8 to 7, and the
# scale puts the first of the largest weights on -8, so that one of the other sign and the same size is clipped to 7: it
# loses an eighth, where half a step would be a sixteenth. Q5_0 loses a sixteenth likewise. Q4_1, which has an offset,
# Q8_0, which is symmetric, and MXFP4 keep both within 0.001.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet gguf==0.19.0 numpy==2.4.0
cat > block.py <<'EOF'
from importlib.metadata import version

import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

print("gguf", version("gguf"))
print("expected: 1 and -1 in turn come back as 1 and -1, within 0.001")
weights = np.tile(np.array([1, -1], np.float32), 16)


def there_and_back(block, kind):
    back = dequantize(quantize(block, kind), kind)
    assert (back[::2] == back[0]).all() and (back[1::2] == back[1]).all()
    return back[:2]


for kind, lost in ((Kind.Q4_0, 1 / 8), (Kind.Q5_0, 1 / 16), (Kind.Q4_1, 0), (Kind.Q8_0, 0), (Kind.MXFP4, 0)):
    back, negated = there_and_back(weights, kind), there_and_back(-weights, kind)
    print(f"seen: {kind.name}: {back[0]:.4f} {back[1]:.4f}; negated: {negated[0]:.4f} {negated[1]:.4f}")
    if lost:
        assert back.tolist() == [1, lost - 1] and negated.tolist() == [-1, 1 - lost], "changed"
    else:
        assert abs(back - weights[:2]).max() < 0.001 > abs(negated + weights[:2]).max(), "changed"
EOF
venv/bin/python block.py
