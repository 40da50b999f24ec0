"""Where a benchmark record says it was measured."""

import json
import os
import subprocess
from datetime import date
from pathlib import Path

import pytest
import torch

from teal_fast.evaluation import record
from teal_fast.evaluation.record import check_records_path, describe, write_records
from teal_fast.kernels.native import INSTRUCTIONS


@pytest.mark.parametrize("name", ["bf16", "int4"])
def test_describe(name):
    found = describe("llama-3-8b", torch.device("cpu"), name)
    assert (found["model"], found["format"], found["peer"]) == ("llama-3-8b", name, None)
    assert found["date"] == date.today().isoformat()
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"].startswith("3.")
    assert len(found["device"]) > 2 and found["device"].strip() == found["device"]
    assert json.loads(json.dumps(found)) == found


def test_cpu_records_tell_instruction_set_and_settings(monkeypatch):
    for name in list(os.environ):
        if name.startswith(record.SETTINGS):
            monkeypatch.delenv(name)
    found = describe("demo", torch.device("cpu"), "bf16")
    assert found["instruction_set"] in INSTRUCTIONS and found["settings"] == {}
    settings = {"GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "1", "OMP_NUM_THREADS": "2", "TEAL_CPU": "portable"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    found = describe("demo", torch.device("cpu"), "bf16")
    assert (found["instruction_set"], found["settings"]) == ("portable", settings)


def test_gpu_records_do_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    found = describe("demo", torch.device("cuda"), "bf16")
    assert found["device"] == "GPU" and not {"instruction_set", "settings"} & found.keys()


def test_runs_are_told_apart():
    runs = {describe("demo", torch.device("cpu"), "fp32")["run"] for _ in range(3)}
    assert len(runs) == 3


def test_records_are_written_whole(tmp_path):
    write_records(tmp_path / "results" / "a.json", [{"run": "1"}])
    assert json.loads((tmp_path / "results" / "a.json").read_text()) == [{"run": "1"}]
    with pytest.raises(TypeError):
        write_records(tmp_path / "results" / "a.json", [{"run": object()}])
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "results" / "a.json").read_text()) == [{"run": "1"}]


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """A repository of one commit, which the module takes for the clone it lies in."""
    root = tmp_path / "clone"
    (root / record.RESULTS).mkdir(parents=True)
    (root / "file").write_text("a")
    (root / record.RESULTS / "a.json").write_text("[]")
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@example.com"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"], ["tag", "v1"]):
        subprocess.run(git + arguments, check=True)
    monkeypatch.setattr(record, "ROOT", root)
    return root


def test_commit_tells_changed_files(clone, monkeypatch):
    head = subprocess.run(["git", "-C", str(clone), "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    clean = record.commit()
    assert len(clean) >= 7 and head.stdout.startswith(clean)  # the commit, not the tag
    os.utime(clone / "file", (0, 0))
    (clone / "new").write_text("not tracked")
    (clone / record.RESULTS / "a.json").write_text("[1]")  # what a run rewrites does not change what it measured
    assert record.commit() == clean
    (clone / "file").write_text("b")
    assert record.commit() == clean + "+"
    subprocess.run(["git", "-C", str(clone), "add", "file"], check=True)
    assert record.commit() == clean + "+"


def test_there_is_no_commit_outside_a_clone(clone, monkeypatch):
    monkeypatch.setattr(record, "ROOT", clone / "benchmarks")  # such as an environment inside somebody's repository
    assert record.commit() is None
    (clone / "benchmarks" / ".git").mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(clone))
    assert record.commit() is None


def test_records_of_a_clone_are_of_a_commit(clone, monkeypatch):
    path, elsewhere = clone / record.RESULTS / "a.json", clone / "a.json"
    clean, changed = ([{"versions": {"commit": name}}] for name in (record.commit(), record.commit() + "+"))
    check_records_path(path)
    (clone / "file").write_text("b")
    monkeypatch.chdir(clone)
    for refused in (path, Path(record.RESULTS, "b.json"), Path("benchmarks", "..", record.RESULTS, "c", "d.json")):
        expected = f"{refused} takes records of a commit, but files differ from .*: commit or stash them first, or"
        with pytest.raises(ValueError, match=expected) as raised:
            check_records_path(refused)
        assert "\n" not in str(raised.value)
        with pytest.raises(ValueError, match=expected):
            write_records(refused, clean + changed)
    assert path.read_text() == "[]" and len(list(path.parent.iterdir())) == 1
    check_records_path(elsewhere)
    write_records(elsewhere, changed)
    write_records(path, clean)  # measured before the file changed
    assert json.loads(path.read_text()) == clean and json.loads(elsewhere.read_text()) == changed


def test_a_path_is_checked_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    check_records_path(None)
    check_records_path(tmp_path / "new" / "a.json")
    with pytest.raises(ValueError, match=r"cannot write .*a\.json"):
        check_records_path(tmp_path / "file" / "a.json")
