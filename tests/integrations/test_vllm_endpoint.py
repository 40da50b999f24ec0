"""vLLM's own HTTP server with the plugin, by the openai client, and its dial (make test-vllm)."""

import importlib.util
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from teal_fast.files.calibration import load_calibration
from teal_fast.files.exported import TealConfig
from teal_fast.scripts.export_hf import export
from teal_fast.tests.integrations.vllm_folders import PROMPTS, environment

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: it has an environment of its own (make test-vllm)", allow_module_level=True)

import openai
from vllm.utils.network_utils import get_open_port

STARTS = 600  # seconds, at most, on a busy machine
FLAGS = ("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "4", "--enforce-eager")


@pytest.fixture(scope="module")
def server(demo, tmp_path_factory) -> Iterator[str]:
    """The address of a server of the demo model at 50 %, called demo."""
    folder, calibration = tmp_path_factory.mktemp("served") / "demo", load_calibration(demo)
    export(demo, folder, TealConfig(0.5, calibration.model["weights"]), calibration)
    port, log = get_open_port(), folder.with_name("log")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, *FLAGS]
    command += ["--host", "127.0.0.1", "--port", port, "--served-model-name", "demo"]
    with log.open("w") as output:
        process = subprocess.Popen(
            list(map(str, command)), cwd=folder.parent, env=environment(), stdout=output, stderr=subprocess.STDOUT
        )
    try:
        address, until = f"http://127.0.0.1:{port}", time.monotonic() + STARTS
        while not is_healthy(address):
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-6000:]
            time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


def is_healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health") as answer:
            return answer.status == 200
    except urllib.error.URLError:
        return False


def call(address: str, path: str, body: dict | None = None) -> tuple[int, str]:
    """Status and text of a GET or, with a body, of a POST."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def dial(address: str, sparsity: float | None = None) -> dict:
    status, text = call(address, "/teal/sparsity", None if sparsity is None else {"sparsity": sparsity})
    assert status == 200, text
    return json.loads(text)


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none")


def complete(client: openai.OpenAI, tokens: int = 12) -> openai.types.Completion:
    return client.completions.create(model="demo", prompt=PROMPTS[0], max_tokens=tokens, temperature=0)


def test_the_folders_sparsity_is_where_the_dial_starts(server, client):
    """The counts start when the server does, after vLLM's warm-up."""
    before = {"sparsity": 0.5, "achieved_sparsity": None, "sparse_tokens": 0, "dense_tokens": 0}
    assert dial(server) == before
    complete(client)
    assert 0.44 < dial(server)["achieved_sparsity"] < 0.56


def test_the_openai_client_is_served(client):
    assert [model.id for model in client.models.list()] == ["demo"]
    whole = complete(client)
    assert whole.choices[0].text.strip().startswith("Paris") and whole.usage.completion_tokens == 12
    chat = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "temperature": 0}
    said = client.chat.completions.create(**chat).choices[0].message.content
    streamed = client.chat.completions.create(**chat, stream=True)
    assert said and "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == said


def test_the_dial_changes_what_is_skipped_between_two_requests(server, client):
    dense, counts = [], {"sparse_tokens": 11, "dense_tokens": complete(client).usage.prompt_tokens}
    for nominal in (0.0, 0.5, 0.3, 0.0):
        assert dial(server, nominal) == {
            "sparsity": nominal, "achieved_sparsity": None, "sparse_tokens": 0, "dense_tokens": 0
        }  # fmt: skip
        text, found = complete(client).choices[0].text, dial(server)
        assert found["sparsity"] == nominal and abs(found["achieved_sparsity"] - nominal) < 0.06
        assert found | counts == found  # the prompt again: the turned dial left no keys and values of it behind
        dense += [text] if nominal == 0 else []
    assert dense[0] == dense[1]


def test_prometheus_has_the_achieved_sparsity_of_this_moment(server, client):
    dial(server, 0.4)
    complete(client)
    status, text = call(server, "/metrics")
    figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("teal:"))
    assert status == 200 and float(figures["teal:sparsity_ratio"]) == 0.4
    assert float(figures["teal:achieved_sparsity_ratio"]) == dial(server)["achieved_sparsity"]


@pytest.mark.parametrize("body", [{"sparsity": 1}, {"sparsity": -0.1}, {"sparsity": "much"}, {}, {"sparsity": None}])
def test_another_sparsity_is_refused_and_nothing_changes(server, body):
    before = dial(server)
    status, text = call(server, "/teal/sparsity", body)
    assert status == 400 and "sparsity" in json.loads(text)["error"]["message"], text
    assert dial(server) == before
