#!/bin/sh
# torch 2.13.0, numpy 2.4.0, on a CPU.
#
# Input: bf16 logits. Three of them, at 10, 30 and 40, are 20.01, 20.02 and 20.04 in fp32, and all become 20 in bf16;
# the others are -5.
# Expected: the first index of topk(2) is argmax's, or at least does not depend on how many low logits follow.
# Seen: argmax names 10 always; topk(2) names 40 first of 50 logits, 10 of 64 and 30 of 128. In fp32, without ties,
# both name 40 each time. So greedy decoding that takes topk's first candidate departs from greedy decoding by argmax,
# and padding the vocabulary changes which token it takes. A stable descending sort agrees with argmax.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy==2.4.0
cat > ties.py <<'EOF'
import torch

print("torch", torch.__version__)
print("expected: topk(2) names argmax's index first, whatever the number of low logits that follow")
seen = []
for vocabulary in (50, 64, 128):
    exact = torch.full((vocabulary,), -5.0)
    exact[10], exact[30], exact[40] = 20.01, 20.02, 20.04
    tied = exact.bfloat16()
    assert tied[10] == tied[30] == tied[40]
    assert exact.argmax() == exact.topk(2).indices[0] == 40
    stable = tied.sort(descending=True, stable=True).indices[0].item()
    seen.append((tied.argmax().item(), stable, tied.topk(2).indices[0].item()))
    print(f"seen: {vocabulary} logits: argmax {seen[-1][0]}, stable sort {seen[-1][1]}, topk(2) {seen[-1][2]}")
assert seen == [(10, 10, 40), (10, 10, 10), (10, 10, 30)], "changed"
EOF
venv/bin/python ties.py
