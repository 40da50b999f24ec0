"""The CPU's bandwidth meter: what its readers read, in which order, and what a record makes of it."""

import sys
from pathlib import Path

import pytest
import torch

from teal_fast.benchmarks import bandwidth, kernels
from teal_fast.benchmarks.bandwidth import SLICE, allocate, bandwidth_meter, compile_reader, cpu_meter
from teal_fast.benchmarks.rows import Row


@pytest.fixture
def reads(monkeypatch):
    """A reader that reads nothing, at rates that the test gives in GB/s, and the list of what it was asked to read."""
    clock, calls = [0.0], []
    monkeypatch.setattr(bandwidth.time, "perf_counter", lambda: clock[0])

    def read(values, threads, ahead):
        clock[0] += values.nbytes / (read.rates.pop(0) * 1e9)
        calls.append((values, threads, ahead))

    read.rates = []
    return read, calls


def test_the_best_reader_counts_and_the_first_read_does_not(reads):
    read, _ = reads
    meter = cpu_meter(read, 2)
    for best in range(8):
        read.rates[:] = [99.0, *(10.0 + (reader == best) for reader in range(8))]
        assert meter() == pytest.approx(11e9) and read.rates == []


def test_every_reading_is_made_of_the_same_readers_in_one_order(reads):
    read, calls = reads
    meter = cpu_meter(read, 6)
    read.rates[:] = [1.0] * 18
    meter(), meter()
    first, second = ([(values.data_ptr(), *rest) for values, *rest in part] for part in (calls[:9], calls[9:]))
    assert first == second and len(set(first[1:])) == 8
    assert {(threads, ahead > 0) for _, threads, ahead in first[1:]} == {(6, False), (6, True), (1, False), (1, True)}


def test_no_bytes_are_read_again_before_many_others(reads):
    read, calls = reads
    meter = cpu_meter(read, 6)
    read.rates[:] = [1.0] * 18
    meter(), meter()
    places = [(values.data_ptr(), values.data_ptr() + values.nbytes) for values, *_ in calls]
    for number, (begin, end) in enumerate(places):
        between = 0
        for other_begin, other_end in reversed(places[:number]):
            if other_begin < end and begin < other_end:
                assert between >= 1.5 * SLICE, f"read {number}"
                break
            between += other_end - other_begin


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("ahead", [0, 2048])
def test_readers_read_everything(threads, ahead):
    words = torch.randint(-(2**63), 2**63 - 1, (threads * 8 * 8 * 100,))
    assert compile_reader()(words, threads, ahead) == words.sum().item() % 2**64


def test_torch_reads_without_a_compiler(monkeypatch, capsys):
    monkeypatch.setattr(bandwidth, "find_compiler", lambda: "no-such-compiler")
    assert compile_reader.__wrapped__()(torch.ones(10), 2, 0) == 10
    assert capsys.readouterr().err == "the C++ reader cannot be built: the read bandwidth is measured by torch.sum\n"


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_huge_pages_are_asked_for():
    def flags(address: int) -> list[str]:
        inside = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            words = line.split()
            if "-" in words[0]:
                begin, end = (int(word, 16) for word in words[0].split("-"))
                inside = begin <= address < end
            elif inside and words[0] == "VmFlags:":
                return words[1:]
        return []

    huge, small = allocate(1 << 23, huge=True), allocate(1 << 23, huge=False)
    assert huge.nbytes == small.nbytes == 1 << 23 and huge.sum() == small.sum() == 1 << 21
    assert huge.data_ptr() % bandwidth.HUGE_PAGE == 0
    assert "hg" in flags(huge.data_ptr()) and "hg" not in flags(small.data_ptr())


def test_a_cpu_reads(monkeypatch):
    monkeypatch.setattr(bandwidth, "SLICE", 1 << 22)
    meter = bandwidth_meter(torch.device("cpu"))
    assert all(1e8 < meter() < 1e14 for _ in range(3))


def test_a_share_never_refers_to_less_than_the_row_itself_read():
    row = Row({"bytes_per_token": 10}, float, rates=[1e9, 4e9, 2e9], bandwidths=[20e9, 20e9, 10e9])
    record = row.record()
    assert record["read_gb_per_s"] == 20  # of 20, 40 and 20
    assert record["bandwidth_share"] == 1  # of 10 / 20, 40 / 40 and 20 / 20
    assert Row({}, float, rates=[1e9], bandwidths=[1e9]).record()["read_gb_per_s"] == 1


def test_a_share_never_refers_to_less_than_the_op_itself_read():
    case = kernels.Case(
        "qkv", "sparse", 0.5, bytes=10, calls=1, run=int, seconds=[1e-9, 5e-10], bandwidths=[40e9, 10e9]
    )
    record = kernels.to_record(case)
    assert record["read_gb_per_s"] == 30 and record["bandwidth_share_spread"] == [0.25, 1]
