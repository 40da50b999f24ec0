"""Ranks that are GPUs of one host, a process each."""

import subprocess
import sys

import pytest
import torch

from teal_fast.tests.engine.ranks.on_gpus import CASES


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_equal_the_reference(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "teal_fast.tests.engine.ranks.on_gpus", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(" ok\n") == len(CASES)
