#!/bin/sh
# torch 2.13.0 for CPUs (with oneDNN 3.12), on a processor with AMX (seen on an Intel Xeon, 2 cores).
#
# Input: products of bf16 matrices, [30, 576] x [576, 3072] and others, with 1, 2, 3, 4 and 7 threads.
# Expected: as on processors with AVX-512 alone, where each of these products has the same bits with any number of
# threads; sums are divided over threads by rows and columns there.
# Seen: with AMX bits differ between numbers of threads for most products of 30 rows and more; with
# ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16, which does without AMX, for none, at a multiple of the time. PyTorch's
# torch.backends.mkldnn.deterministic changes nothing about it: each number of threads gives its own bits every time.
set -eu
grep -qw amx_bf16 /proc/cpuinfo || { echo "needs a processor with AMX"; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0
cat > threads.py <<'EOF'
import torch
torch.backends.mkldnn.deterministic = True
torch.manual_seed(0)
differ = 0
for inputs, outputs in ((576, 3072), (1536, 576), (1536, 2048), (4096, 4096)):
    weight = torch.randn(inputs, outputs).bfloat16()
    for rows in (30, 48, 64, 128, 200):
        x, found = torch.randn(rows, inputs).bfloat16(), []
        for threads in (1, 2, 3, 4, 7):
            torch.set_num_threads(threads)
            found.append(x @ weight)
        differ += not all(torch.equal(found[0], other) for other in found[1:])
print(differ)
EOF
tiles=$(venv/bin/python threads.py) without=$(ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 venv/bin/python threads.py)
echo "torch $(venv/bin/python -c 'import torch; print(torch.__version__)')"
echo "expected: 0 of 20 products differ between numbers of threads"
echo "seen: $tiles of 20 with AMX, $without of 20 without it"
[ "$tiles" -gt 10 ] && [ "$without" = 0 ] || { echo changed; exit 1; }
