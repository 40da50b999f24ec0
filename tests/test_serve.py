"""The command: what is refused before and while it loads, its end by a signal, the prefix cache over a restart."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest

from teal_fast.files.paths import ROOT
from teal_fast.serve import ECHO


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["--port", "65536"], 2, "expected a port from 0"),
        (["--max_queue", "0"], 2, "expected a whole number of at least 1"),
        (["--request_timeout", "0"], 2, "expected a number above 0"),
        (["--cache_bytes", "-1"], 2, "expected a number of bytes"),
        (["--sparsity", "1"], 2, "expected a fraction from 0"),
        (["--host", "192.0.2.1"], 1, "192.0.2.1:8000 can't be listened at"),
        (["--host", "no.such.host.invalid", "--port", "0"], 1, "can't be listened at"),
        (["--host", "é" * 100, "--port", "0"], 1, "can't be listened at"),
        (["--allowed_origin", "foo"], 2, "expected a site such as"),
        (["--served_model_name", "a\udcff"], 2, "not UTF-8"),
        (["--cache_dir", ROOT / "serve.py", "--port", "0"], 1, "cannot write"),
        (["--checkpoint", "absent", "--port", "0"], 1, "absent"),
    ],
)
def test_one_line_and_an_exit_code(command, arguments, code, said):
    found = command("serve", *arguments, timeout=120)
    assert found.returncode == code and said in found.stderr and "Traceback" not in found.stderr, found.stderr


def test_a_key_that_no_client_can_send(command):
    found = command("serve", env=os.environ | {"TEAL_API_KEY": "ge\udcffheim"}, timeout=120)
    assert found.returncode == 2 and "--api_key: got bytes that are not UTF-8" in found.stderr
    assert "heim" not in found.stderr


def test_a_port_that_is_taken(command):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = command("serve", "--port", taken.getsockname()[1], timeout=120)
    assert found.returncode == 1 and found.stderr.count("\n") == 1 and "in use" in found.stderr


@contextmanager
def started(folder, *arguments):
    """The command in a process of its own, once it listens, and its address; in the end the process is no more."""
    words = [sys.executable, "-m", "teal_fast.serve", "--checkpoint", folder, "--port", "0", *arguments]
    process = subprocess.Popen([*map(str, words)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        yield re.match(r"(http://\S+) ", process.stderr.readline())[1], process
    finally:
        process.kill()
        process.wait()


def wait_until_it_answers(url, process):
    while ask(f"{url}/health")[0] == 503:
        assert process.poll() is None


@contextmanager
def serve(folder, *arguments):
    """The command and its address once it answers; it must end with exit code 0."""
    with started(folder, *arguments) as (url, process):
        wait_until_it_answers(url, process)
        yield url, process
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0 and said == "ready\n", said


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_that_comes_twice_at_once_is_one(calibrated, number, code):
    """As coreutils' timeout sends it: to the process, then to its group. The first is heard before the second comes."""
    with started(calibrated) as (url, process):
        wait_until_it_answers(url, process)
        for _ in range(4):
            process.send_signal(number)
            time.sleep(0.01)
        process.communicate(timeout=30)
        assert process.returncode == code


@pytest.mark.parametrize("number, code, said", [(signal.SIGTERM, 0, ""), (signal.SIGINT, 130, "interrupted\n")])
@pytest.mark.parametrize("seconds", [0, 0.3])
def test_a_signal_while_it_loads(calibrated, number, code, said, seconds):
    with started(calibrated) as (_, process):
        time.sleep(seconds)
        process.send_signal(number)
        found = process.communicate(timeout=30)[1].removeprefix("ready\n")
        assert found == said and process.returncode == code


@pytest.mark.parametrize("number, said", [(signal.SIGTERM, ""), (signal.SIGINT, "interrupted\n")])
def test_a_second_signal_waits_for_no_answer(calibrated, number, said):
    with started(calibrated) as (url, process):
        wait_until_it_answers(url, process)
        long = json.dumps({"prompt": ["Once"] * 60, "max_tokens": 100, "ignore_eos": True, "stream": True}).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", long), timeout=60) as stream:
            assert stream.readline().startswith(b"data: ")
            process.send_signal(number)
            lines = [process.stderr.readline() for _ in range(2)]
            assert lines[0] == "ready\n" and lines[1].startswith("finishing the answers that are asked for")
            time.sleep(ECHO + 0.1)
            process.send_signal(number)
            assert process.communicate(timeout=30)[1] == said and process.returncode == 128 + number


def ask(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_prefixes_outlive_a_restart(calibrated, tmp_path):
    body = {"prompt": [(7 * i) % 40_000 + 3 for i in range(300)], "max_tokens": 4, "temperature": 0}
    found = []
    for _ in range(2):
        with serve(calibrated, "--cache_dir", tmp_path / "cache", "--max_seq_length", 512) as (url, _):
            found.append(ask(f"{url}/v1/completions", body)[1])
    first, second = (answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in found)
    assert (first, second) == (0, 299) and found[0]["choices"][0]["text"] == found[1]["choices"][0]["text"]
