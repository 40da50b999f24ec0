"""The benchmark of the server: its records from given rounds, what it refuses, and one small run of everything."""

import json
import sys

import pytest

from teal_fast.benchmarks import serve
from teal_fast.benchmarks.served import Plan, Row, make_plan
from teal_fast.benchmarks.servers import Server
from teal_fast.files.tokenizer import Tokenizer

PLAN = Plan("short", "prompt", "turn", 10)


def row(mode: str, sparsity: float = 0.0, peer: str | None = None) -> Row:
    return Row({"mode": mode, "sparsity": sparsity, "peer": peer}, PLAN)


def rounds(rates: list[float], first: float = 1.0, turns: tuple[float, float] | None = (2.0, 0.1)) -> list[dict]:
    found = {"first_token_s": first, "prompt_tokens": 5}
    found |= {} if turns is None else {"first_turn_s": turns[0], "second_turn_s": turns[1]}
    return [found | {"tokens_per_s": rate} for rate in rates]


def test_ratios_are_medians_of_the_rounds_to_peers_and_to_generate_at_the_same_sparsity():
    rows = [
        row("serve.py"),
        row("serve.py", 0.5),
        row("generate.py", 0.5),
        row("llama-server", 0.0, "llama-server bf16"),
    ]
    results = [
        rounds([10, 20, 30]),
        rounds([40, 30, 100]),
        rounds([80, 40, 100], 2.0, None),
        rounds([10, 20, 30], turns=(1.0, 0.2)),
    ]
    dense, sparse, generated, peer = serve.to_records(rows, results)
    assert (sparse["tokens_per_s"], sparse["tokens_per_s_spread"]) == (40, [30, 100])
    assert sparse["tokens_per_s_rounds"] == [40, 30, 100] and sparse["prompt_tokens"] == 5
    assert sparse["second_of_first"] == 0.05 and peer["second_of_first"] == 0.2
    assert sparse["compared"] == {
        "llama-server bf16": {
            "tokens_per_s": pytest.approx(100 / 30),  # of 4, 1.5 and 3.33; of the medians it is 2
            "first_token_s": 1,
            "first_turn_s": 2,
            "second_turn_s": 0.5,
        },
        "generate.py": {"tokens_per_s": 0.75, "first_token_s": 0.5},
    }
    assert list(dense["compared"]) == ["llama-server bf16"]
    assert "compared" not in peer and "compared" not in generated and "first_turn_s" not in generated


def test_prompts_have_the_lengths_asked_for(demo):
    tokenizer = Tokenizer.load(demo)
    plan = make_plan(tokenizer, 500, 3000, 7)
    assert [len(tokenizer.encode(text)) for text in (plan.short, plan.prompt, plan.turn)] == [32, 500, 3000]


def test_an_answer_that_ends_early_is_no_measurement():
    PLAN.check(10)
    with pytest.raises(ValueError, match="after 7 of 10 tokens: lower --new_tokens"):
        PLAN.check(7)


def test_a_server_that_does_not_start_says_why():
    with pytest.raises(ValueError, match="does not serve: no such model"):
        Server([sys.executable, "-c", "import sys; print('loading'); sys.exit('no such model')"])


@pytest.mark.parametrize(
    "words, said",
    [
        (["--new_tokens", 1], "at least 2"),
        (["--llama_server", "nowhere"], "--gguf"),
        (["--llama_server", "nowhere", "--gguf", "weights.gguf"], "nowhere cannot be run"),
    ],
)
def test_bad_arguments_are_one_line(words, said, run_main):
    code, _, errors = run_main(serve.main, "--checkpoint", "elsewhere", *words)
    assert code == 1 and said in errors.splitlines()[-1]


def test_a_small_run_measures_everything(calibrated, tmp_path, run_main):
    out = tmp_path / "serve.json"
    words = ["--new_tokens", 12, "--prompt_tokens", 40, "--turn_tokens", 60, "--rounds", 1, "--out", out]
    code, printed, errors = run_main(serve.main, "--checkpoint", calibrated, "--device", "cpu", *words)
    assert code == 0, errors
    records = json.loads(out.read_text())
    assert [(r["mode"], r["sparsity"]) for r in records] == [("serve.py", 0), ("serve.py", 0.5), ("generate.py", 0.5)]
    assert "of generate.py: tokens/s" in printed
    for record in records:
        assert record["benchmark"] == "serve" and record["tokens_per_s"] > 0 and record["prompt_tokens"] == 32
        assert record["first_token_prompt_tokens"] == records[0]["first_token_prompt_tokens"]
    first, second = records[1]["turns_prompt_tokens"]
    assert first < second < first + 80 and records[1]["cached_tokens"] > 50
    assert records[1]["achieved_sparsity"] == pytest.approx(0.5, abs=0.2)
