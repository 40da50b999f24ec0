"""Ray Serve itself, when installed, with two replicas of a tiny model, asked by the real client."""

import os
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed: it is optional")
from ray import serve  # noqa: E402

from teal_fast.integrations.ray_serve import replicas  # noqa: E402


@pytest.fixture(scope="module")
def cluster():
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=10**8)
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"model": "demo"}, "model is not known, expected checkpoint, sparsity"),
        ({"replicas": "0"}, "replicas=0: expected a whole number"),
        ({"context": "many"}, "context=many: expected a whole number"),
        ({"sparsity": "1.5"}, "sparsity=1.5: got"),
        ({"checkpoint": "nowhere"}, "nowhere"),
    ],
)
def test_unsound_arguments_are_refused_before_anything_starts(wrong, said):
    with pytest.raises((ValueError, OSError), match=said):
        replicas(wrong)


def test_two_replicas_share_the_requests(cluster, calibrated, tmp_path):
    folder = shutil.copytree(calibrated, tmp_path / "tiny")
    wanted = {"checkpoint": str(folder), "sparsity": "0.5", "replicas": "2", "context": "256"}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"port": port})
    serve.run(replicas(wanted))
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120)

    def answer(number: int) -> str:
        return client.completions.create(model="tiny", prompt=f"{number}", max_tokens=40, temperature=0).choices[0].text

    alone = [answer(number) for number in range(4)]
    with ThreadPoolExecutor(4) as at_once:
        assert list(at_once.map(answer, range(4))) == alone
    seen = set()
    for _ in range(100):
        text = client.get("/../metrics", cast_to=str)
        seen.add(next(line for line in text.splitlines() if line.startswith("teal:generation_tokens_total")))
    assert len(seen) == 2 and all(float(line.split()[-1]) > 0 for line in seen)
