import mmap
from pathlib import Path

import pytest
import safetensors.torch
import torch

from teal_fast.files.huge_pages import LARGE, LINE, in_huge_pages
from teal_fast.files.store import open_safetensors

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="Linux has large pages")


def memory(what: str) -> int:
    """Bytes of this process, by smaps_rollup."""
    return int(Path("/proc/self/smaps_rollup").read_text().split(f"{what}:")[1].split()[0]) * 1024


@pytest.fixture
def mapped(tmp_path):
    tensors = {
        "a": torch.randn(300, 7),
        "b": torch.randint(-128, 127, (2**24,), dtype=torch.int8),
        "c": torch.empty(0, 4).half(),
        "d": torch.randn(3, 1000, 1000).half(),
    }
    safetensors.torch.save_file(tensors, tmp_path / "file.safetensors")
    with open_safetensors(tmp_path / "file.safetensors") as file:
        yield tensors, {name: file.get_tensor(name) for name in tensors}


def test_copies_are_equal_side_by_side_and_outlive_the_file(mapped, tmp_path):
    expected, found = mapped[0], in_huge_pages(mapped[1])
    (tmp_path / "file.safetensors").unlink()
    mapped[1].clear()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    begins = [tensor.data_ptr() for tensor in found.values() if tensor.numel()]
    assert begins[0] % LARGE == 0 and not any(begin % LINE for begin in begins)
    assert begins[1] - begins[0] == 300 * 7 * 4 + -300 * 7 * 4 % LINE
    found["a"].fill_(1)  # its own memory
    assert torch.equal(found["b"], expected["b"])


@pytest.mark.skipif(not ENABLED.exists() or "[never]" in ENABLED.read_text(), reason="no large pages here")
def test_pages_are_large_and_the_files_are_given_back(mapped):
    before = memory("Rss"), memory("AnonHugePages")
    found = in_huge_pages(mapped[1])
    assert memory("AnonHugePages") - before[1] >= 2**24  # of 23 MB
    assert memory("Rss") - before[0] < sum(tensor.nbytes for tensor in found.values()) + 2 * LARGE


def test_nothing(mapped):
    assert in_huge_pages({}) == {}
