"""The fastest step of a device."""

import pytest
import torch

from teal_fast.engine import steps
from teal_fast.engine.cpu_step import CpuStep
from teal_fast.engine.steps import PlainStep, fast_step
from teal_fast.kernels.native import library
from teal_fast.tests.engine.random_models import DEVICE, follow, make
from teal_fast.tests.models import TINY


@pytest.mark.skipif(DEVICE == "cuda", reason="of the CPU")
def test_the_fast_step_on_the_cpu_is_the_compiled_one_or_plain(monkeypatch):
    model, cache, _ = make(TINY, torch.float32, 0)
    assert library() is None or isinstance(fast_step(model, cache), CpuStep)
    expected = follow(fast_step(model, cache), 3)
    monkeypatch.setattr(steps, "library", lambda: None)
    assert isinstance(fast_step(model, cache), PlainStep)
    torch.testing.assert_close(follow(fast_step(model, cache), 3), expected, rtol=0, atol=1e-4)
