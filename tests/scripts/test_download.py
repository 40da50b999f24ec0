"""Runs the command against a hub on this machine, with the real huggingface_hub client."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from teal_fast.scripts import download
from teal_fast.tests.hub import TOKEN, Hub

ROOT = Path(__file__).parents[2]
TEXTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json")
BINS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json")
OTHERS = (".gitattributes", "README.md", "consolidated.safetensors", "m-q8_0.gguf", "onnx/model.onnx", "original/x.pth")
BIG = 12 << 20  # over one of the client's chunks of 10 MiB: it resumes at a multiple of them


def make_repo(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 100)
    return folder


def start(tmp_path: Path, url: str, *args: str, **env: str) -> subprocess.Popen:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    ours = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "teal_fast.scripts.download", *args],
        env=clean | ours | {"PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"} | env,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore SIGINT, and so would their children: this one is to obey it wherever it runs.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def files_in(folder: Path) -> set[str]:
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if not name.startswith(".cache/")}  # the client's notes on what it has fetched


def test_fetches_what_a_conversion_reads(tmp_path):
    repo = make_repo(tmp_path / "repo", *TEXTS, *SHARDS, *BINS, *OTHERS)
    with Hub({"meta/tiny": repo}) as hub:
        code, out, err = finish(start(tmp_path, hub.url, "meta/tiny"))
    assert (code, out) == (0, "next: python -m teal_fast.scripts.convert_hf_checkpoint checkpoints/hf/meta--tiny\n"), (
        err
    )
    folder = tmp_path / "checkpoints/hf/meta--tiny"
    assert files_in(folder) == {*TEXTS, *SHARDS}
    assert all((folder / name).read_bytes() == (repo / name).read_bytes() for name in (*TEXTS, *SHARDS))
    assert all(request.token is None for request in hub.requests)


def test_sends_the_token_and_falls_back_to_bin(tmp_path):
    with Hub({"me/own": make_repo(tmp_path / "repo", *TEXTS, *BINS, *OTHERS)}, private={"me/own"}) as hub:
        code, _, err = finish(start(tmp_path, hub.url, "me/own", "--out", "a/b", HF_TOKEN=TOKEN))
    assert code == 0, err
    assert files_in(tmp_path / "a/b") == {*TEXTS, *BINS}
    assert all(request.token == TOKEN for request in hub.requests if "me/own" in request.path)


def test_fetches_one_gguf_and_nothing_else(tmp_path):
    with Hub({"meta/tiny": make_repo(tmp_path / "repo", *TEXTS, *SHARDS, *OTHERS)}) as hub:
        args = ("meta/tiny", "--out", "out dir", "--gguf", "m-q8_0.gguf", "--revision", "main")
        code, out, err = finish(start(tmp_path, hub.url, *args))
    assert (code, out) == (0, "next: python -m teal_fast.scripts.convert_gguf 'out dir/m-q8_0.gguf'\n"), err
    assert files_in(tmp_path / "out dir") == {"m-q8_0.gguf"}


def test_resumes_inside_a_file_when_the_connection_breaks(tmp_path):
    repo = make_repo(tmp_path / "repo", *TEXTS)
    (repo / "model.safetensors").write_bytes(os.urandom(BIG))
    with Hub({"meta/tiny": repo}, cut={"model.safetensors": BIG - 1}) as hub:
        code, _, err = finish(start(tmp_path, hub.url, "meta/tiny", "--out", "out"))
    assert code == 0, err
    assert (tmp_path / "out/model.safetensors").read_bytes() == (repo / "model.safetensors").read_bytes()
    gets = [request for request in hub.requests if request.method == "GET" and "model.safe" in request.path]
    assert [(request.status, request.first_byte) for request in gets] == [(200, 0), (206, 10 << 20)]


def test_ctrl_c_ends_at_once_and_the_next_run_keeps_finished_files(tmp_path):
    repo = make_repo(tmp_path / "repo", *TEXTS, *SHARDS)
    with Hub({"meta/tiny": repo}, stall={SHARDS[1]: 100}) as hub:
        process = start(tmp_path, hub.url, "meta/tiny", "--out", "out")
        deadline = time.monotonic() + 20
        while SHARDS[1] not in hub.fetched() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        code, out, err = finish(process)
        assert (code, out) == (130, "") and err.endswith("interrupted\n") and "Traceback" not in err
        assert files_in(tmp_path / "out") == {*TEXTS, SHARDS[0]}

        hub.stall.clear()
        hub.requests.clear()
        code, _, err = finish(start(tmp_path, hub.url, "meta/tiny", "--out", "out"))
    assert code == 0, err
    assert hub.fetched() == list(SHARDS[1:])


@pytest.mark.parametrize(
    "args, message",
    [
        (["no/such"], "no model no/such at "),
        (["meta/gated"], "meta/gated is gated: accept its terms at "),
        (["meta/tiny", "--revision", "v9"], "meta/tiny has no revision v9: "),
        (["meta/tiny", "--out", "repo/config.json"], "cannot write repo/config.json (File exists): "),
        (["meta/tiny"], "no connection to http://127.0.0.1:9 ("),
    ],
    ids=["unknown", "gated", "revision", "unwritable", "offline"],
)
def test_errors_are_one_line(tmp_path, request, args, message):
    repo = make_repo(tmp_path / "repo", *TEXTS, *SHARDS)
    with Hub({"meta/tiny": repo, "meta/gated": repo}, gated={"meta/gated"}) as hub:
        offline = request.node.callspec.id == "offline"
        code, out, err = finish(start(tmp_path, "http://127.0.0.1:9" if offline else hub.url, *args))
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {message}") and err.count("\n") == 1


def test_bad_usage_exits_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["download", "https://huggingface.co/meta/tiny"])
    with pytest.raises(SystemExit, match="2"):
        download.parse_args()
    assert "argument REPO_ID: Repo id must be in the form" in capsys.readouterr().err


def test_chooses_one_set_of_weights():
    one = ["model.safetensors", "pytorch_model.bin"]
    assert download.choose_files("r", ["config.json", *one, *SHARDS]) == ["config.json", "model.safetensors"]
    with pytest.raises(ValueError, match=r"r lacks config.json or weights .*: choose another repo"):
        download.choose_files("r", ["config.json", "adapter_model.safetensors", "old/model.safetensors"])
    with pytest.raises(ValueError, match=r"--gguf m-q8_0.gguf"):
        download.choose_files("r", ["config.json", "m-q8_0.gguf"])


def test_needs_room_before_it_starts(tmp_path, monkeypatch):
    files = [SimpleNamespace(rfilename="m.gguf", size=10**18)]
    monkeypatch.setattr(download, "model_info", lambda *_, **__: SimpleNamespace(siblings=files, sha="0" * 40))
    with pytest.raises(ValueError, match=r"r has no GGUF file x.gguf, it has m.gguf"):
        download.download("r", None, tmp_path, gguf="x.gguf")
    with pytest.raises(OSError, match=r"needs 1000000000.0 GB") as full:
        download.download("r", None, tmp_path, gguf="m.gguf")
    assert download.explain_error(full.value, "r", None, tmp_path).startswith(f"disk full at {tmp_path} (needs ")
