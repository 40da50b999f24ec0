"""The whole way in a minute: a tiny model through convert, calibrate, quantize, generate; the demo's golden text."""

import json

import pytest
import torch

from teal_fast import calibrate, generate, quantize
from teal_fast.engine.load import load
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.engine.text import stream_text
from teal_fast.scripts import convert_gguf
from teal_fast.tests.gguf_models import make_model, write_gguf

QUESTION = [{"role": "user", "content": "Explain how plants make food from sunlight."}]
# Greedy, in fp32, and as many tokens as no rounding tips over: sparse ones are those of twelve models that differ by
# 2e-6 of their embeddings. At 40 % an input 6e-8 from its threshold made another text of the second token.
GOLDEN = {
    0.0: "Plants make food from sunlight through a process called photosynthesis. This process involves a series of "
    "chemical reactions that convert light energy",
    0.25: "Plants make food from sunlight through a process called photosynthesis. This process",
}
TOKENS = {0.0: 23, 0.25: 13}


def test_a_file_becomes_a_sparse_quantized_text(run_main, tmp_path):
    source, folder, small = tmp_path / "model.gguf", tmp_path / "model", tmp_path / "small"
    write_gguf(source, make_model())
    assert run_main(convert_gguf.main, source, "--out", folder)[0] == 0
    assert run_main(calibrate.main, "--checkpoint", folder, "--tokens", 512, "--context", 64)[0] == 0
    assert run_main(quantize.main, "--checkpoint", folder, "--mode", "int8", "--out", small)[0] == 0
    for checkpoint, format in ((folder, "bf16"), (small, "int8")):
        code, out, err = run_main(
            generate.main,
            *("--checkpoint", checkpoint, "--sparsity", 0.5, "--prompt", "the in", "--max_new_tokens", 8, "--json"),
        )
        assert code == 0, err
        record = json.loads(out.splitlines()[-1])
        assert (record["format"], record["sparsity"]) == (format, 0.5) and record["tokens_per_s"] > 0
        assert 0.3 < record["achieved_sparsity"] < 0.7


@pytest.mark.parametrize("sparsity", GOLDEN)
def test_golden_text(demo, sparsity, set_threads):
    set_threads(1)
    engine, tokenizer = load(demo, "cpu", "fp32", context=256)
    request = Request(tokenizer.encode_chat(QUESTION), Sampling(temperature=0), sparsity, TOKENS[sparsity])
    with torch.no_grad():
        assert "".join(stream_text(engine.stream(request), tokenizer, request.prompt)) == GOLDEN[sparsity]
