"""Where a benchmark record says it was measured."""

import json
import subprocess
from datetime import date

import pytest
import torch

from teal_fast.evaluation import record
from teal_fast.evaluation.record import describe, write_records


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


def test_commit_tells_changed_files(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.com"]
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert record.commit() is None
    (tmp_path / "file").write_text("a")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"], ["tag", "v1"]):
        subprocess.run(git + arguments, check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    clean = record.commit()
    assert len(clean) >= 7 and head.startswith(clean)  # the commit, not the tag
    (tmp_path / "file").write_text("b")
    assert record.commit() == clean + "+"
