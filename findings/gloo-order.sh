#!/bin/sh
# torch 2.13.0, its gloo backend, on CPUs.
#
# Input: four processes sum 4,096 bf16 numbers each with all_reduce; one of them holds 256 everywhere, the others 1.
# Expected: one sum at all places, whoever holds the 256: 260 is a bf16 number, and the exact 259 lies next to it.
# Seen: 256 at some places and 260 at others, and which ones depends on the process that holds the 256. Each place is
# added up from another process on and rounded after every addition, so that 1 after 1 is lost to a 256 that came first.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet torch==2.13.0 numpy
cat > sums.py <<'END_OF_PROGRAM'
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def work(rank, size, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    seen = []
    for large in range(size):
        x = torch.full((4096,), 256.0 if rank == large else 1.0, dtype=torch.bfloat16)
        dist.all_reduce(x)
        seen.append((x[0].item(), x[1024].item(), x[2048].item(), x[3072].item()))
    if rank == 0:
        print(seen)


if __name__ == "__main__":
    mp.spawn(work, (4, os.path.abspath("meet")), nprocs=4)
END_OF_PROGRAM
echo "torch 2.13.0"
echo "expected: the same sum at places 0, 1024, 2048 and 3072, whichever of the four processes holds the 256"
seen=$(OMP_NUM_THREADS=1 venv/bin/python sums.py 2>/dev/null | tail -n 1)
echo "seen, a process after another holding it: $seen"
case "$seen" in *256.0*) ;; *) exit 1 ;; esac
case "$seen" in *260.0*) ;; *) exit 1 ;; esac
