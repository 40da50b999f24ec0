"""Where a benchmark record says it was measured."""

import json
import subprocess
from datetime import date
from pathlib import Path

import pytest
import torch

import record
from checkpoint import DTYPES
from record import describe


@pytest.mark.parametrize("name", DTYPES)
def test_describe(tmp_path, name):
    folder = tmp_path / "llama-3-8b"
    folder.mkdir()
    found = describe(folder, torch.device("cpu"), DTYPES[name])
    assert (found["model"], found["format"], found["peer"]) == ("llama-3-8b", name, None)
    assert found["date"] == date.today().isoformat()
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["python"].startswith("3.")
    assert len(found["device"]) > 2 and found["device"].strip() == found["device"]
    assert json.loads(json.dumps(found)) == found


def test_model_is_the_folders_name_however_it_is_spelled(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path / "demo")
    for path in (Path("."), Path("../demo"), tmp_path / "demo"):
        assert describe(path, torch.device("cpu"), torch.float32)["model"] == "demo"


def test_runs_are_told_apart(tmp_path):
    runs = {describe(tmp_path, torch.device("cpu"), torch.float32)["run"] for _ in range(3)}
    assert len(runs) == 3


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
