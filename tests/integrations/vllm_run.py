"""Runs vLLM's engine in a process of its own: a task as JSON from stdin, what came of it as stdout's last line.

task: model, options (of vllm.LLM), requests: each has prompts of ids, tokens to make, whether they are made together,
and the sparsity that the dial is set to before, or null. For each it gives the ids and log-probabilities of the answers
and what the workers counted. With configs, of vllm.EngineArgs, it gives what each of these says instead.
"""

import json
import os
import sys

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process less to start; a server's has its own

from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs


def generate(engine: LLM, prompts: list[list[int]], tokens: int) -> list[dict]:
    sampling = SamplingParams(temperature=0, max_tokens=tokens, logprobs=0, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    answers = [output.outputs[0] for output in outputs]
    return [
        {
            "ids": list(answer.token_ids),
            "logprobs": [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)],
        }
        for answer in answers
    ]


def run(task: dict) -> list[dict]:
    engine = LLM(task["model"], max_model_len=256, max_num_seqs=4, enable_prefix_caching=False, **task["options"])
    results = []
    for request in task["requests"]:
        if dial := request["sparsity"] is not None:
            engine.collective_rpc("teal_sparsity", args=(request["sparsity"],))
        prompts = request["prompts"]
        batches = [prompts] if request["together"] else [[prompt] for prompt in prompts]
        answers = [answer for batch in batches for answer in generate(engine, batch, request["tokens"])]
        results.append({"answers": answers, "ranks": engine.collective_rpc("teal_sparsity") if dial else []})
    return results


def said(options: dict) -> str:
    """What comes of a config: the error's text."""
    try:
        EngineArgs(**options).create_engine_config()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


if __name__ == "__main__":
    given = json.load(sys.stdin)
    found = [said(options) for options in given["configs"]] if "configs" in given else run(given)
    print(json.dumps(found), flush=True)
