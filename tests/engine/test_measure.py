"""A profile's trace is written whole, or said not to be."""

import os
import resource

import pytest
import torch

from teal_fast.engine.measure import profiler


def test_a_trace_that_does_not_fit_is_an_error(tmp_path):
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match="the trace could not be written whole"), profiler(tmp_path / "trace.json"):
            torch.ones(3).sum()
            resource.setrlimit(resource.RLIMIT_FSIZE, (256, usual[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert os.listdir(tmp_path) == []
