"""Completions through the real clients: texts, scores that are eval.py's, streams, refusals."""

import json
import math
import urllib.error
import urllib.request

import openai
import pytest
import torch
from tqdm import tqdm

from teal_fast.cli import ModelChoice, open_model
from teal_fast.engine.request import Request
from teal_fast.engine.sampling import Sampling
from teal_fast.evaluation.perplexity import DEFAULT_TEXT, evaluate
from teal_fast.files.calibration import set_sparsity
from teal_fast.tests.server.live import serving

PENALTIES = ({"repetition_penalty": 1.5}, {"presence_penalty": 2}, {"frequency_penalty": 2})
EOS = {"ignore_eos": False}


@pytest.fixture(scope="module")
def live(calibrated):
    with serving(calibrated, context=256) as live:
        yield live


@pytest.fixture(scope="module")
def client(live):
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0)


def complete(client, prompt, tokens=8, **more):
    extra = {"ignore_eos": True} | more.pop("extra_body", {})
    settings = {"model": "m", "temperature": 0, "max_tokens": tokens, "extra_body": extra}
    return client.completions.create(prompt=prompt, **settings | more)


def test_a_text_goes_on_as_the_engine_continues_it(live, client):
    ids = live.service.tokenizer.encode("Once upon a time")
    found = complete(client, "Once upon a time", extra_body={"sparsity": 0.5})
    request = Request(ids, Sampling(0), 0.5, 8, stop=())
    expected = [token.id for token in live.engine.stream(request)]
    assert found.choices[0].text == live.service.tokenizer.decode([*ids, *expected]).removeprefix("Once upon a time")
    assert found.choices[0].finish_reason == "length"
    assert found.usage.prompt_tokens == len(ids) and found.usage.completion_tokens == 8
    assert 0.3 < found.usage.achieved_sparsity < 0.7
    assert complete(client, ids, extra_body={"sparsity": 0.5}).choices[0].text == found.choices[0].text


def test_streamed_equals_whole(client):
    whole = complete(client, ["One", "Two, three"], n=2, temperature=1.0, seed=5, echo=True, logprobs=2)
    parts = complete(
        client,
        ["One", "Two, three"],
        n=2,
        temperature=1.0,
        seed=5,
        echo=True,
        logprobs=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts, tokens, reasons, usage = [""] * 4, [[] for _ in range(4)], {}, None
    for chunk in parts:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert reasons == {i: "length" for i in range(4)}
    assert usage.completion_tokens == whole.usage.completion_tokens == 32
    assert len({choice.text for choice in whole.choices}) == 4  # n answers differ by their seeds


@pytest.mark.parametrize("sparsity, prefill, dense", [(0.0, "dense", 128), (0.5, "full", 1)])
def test_scores_are_those_of_eval(calibrated, client, sparsity, prefill, dense):
    opened = open_model(ModelChoice(str(calibrated), "cpu"))
    text = next(DEFAULT_TEXT.glob("*.txt")).read_text()
    ids = opened.tokenizer.encode(text)
    windows = [ids[i : i + 128] for i in (0, 1000, 2000)]
    set_sparsity(opened.model, opened.calibration, sparsity)
    with torch.no_grad(), tqdm(disable=True) as progress:
        expected = evaluate(opened.model, [(window, 1) for window in windows], dense, sparsity, progress)
    losses = []
    for window in windows:
        extra = {"sparsity": sparsity, "prefill": prefill}
        found = complete(client, window, 0, echo=True, logprobs=0, extra_body=extra).choices[0]
        assert found.logprobs.token_logprobs[0] is None and len(found.logprobs.tokens) == 128
        losses += found.logprobs.token_logprobs[1:]
    assert math.exp(-sum(losses) / len(losses)) == pytest.approx(expected.perplexity, rel=1e-4)


def test_a_harness_asks_for_one_token_with_the_prompts_scores(client):
    found = complete(client, [[504, 2217, 282, 260]], 1, echo=True, logprobs=1).choices[0].logprobs
    alone = complete(client, [[504, 2217, 282, 260]], 0, echo=True, logprobs=1).choices[0].logprobs
    assert len(found.tokens) == 5 and found.token_logprobs[:4] == alone.token_logprobs
    assert found.text_offset == [sum(map(len, found.tokens[:i])) for i in range(5)]
    for token, logprob, top in list(zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True))[1:]:
        assert len(top) == 1 and max(top.values()) >= logprob - 1e-6
        assert (token in top) == (max(top.values()) == logprob)


def test_every_token_has_its_place_in_the_scores(live, client):
    """lm-evaluation-harness takes a prompt's scores up to the last but one, whatever token was drawn."""
    end = live.service.tokenizer.eos_id
    for stream in (False, True):
        found = complete(
            client, [504, 2217], 1, echo=True, logprobs=1, stream=stream, logit_bias={str(end): 100}, extra_body=EOS
        )
        parts = [part for chunk in (found if stream else [found]) for part in chunk.choices]
        tokens = [token for part in parts if part.logprobs for token in part.logprobs.tokens]
        assert parts[-1].finish_reason == "stop" and len(tokens) == 3
    alone = complete(client, [504], 3, logprobs=1).choices[0].logprobs
    assert len(alone.tokens) == 3 and None not in alone.token_logprobs
    assert complete(client, [504], 3, echo=True).choices[0].logprobs is None


def test_a_refused_flag_leaves_the_engine_alone(live, client):
    with pytest.raises(openai.BadRequestError):
        complete(client, "One", 200, extra_body={"stream": "yes"})
    assert live.service.worker.running is None and live.service.worker.waiting == 0


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("logprobs", [None, 1])
def test_the_tokens_of_an_answer_to_one_token(client, echo, logprobs):
    asked = {"echo": echo, "logprobs": logprobs}
    whole = complete(client, [504], 2, **asked).choices[0]
    assert (whole.logprobs and len(whole.logprobs.tokens)) == (logprobs and 2 + echo)
    streamed = [chunk.choices[0].logprobs for chunk in complete(client, [504], 2, stream=True, **asked)]
    assert sum(len(part.tokens) for part in streamed if part) == (2 + echo if logprobs else 0)


@pytest.mark.parametrize(
    "body, status, said",
    [
        ({}, 400, "prompt is missing"),
        ({"prompt": []}, 400, "prompt is []"),
        ({"prompt": ""}, 400, "a prompt is empty"),
        ({"prompt": [1, True]}, 400, "lists of token ids"),
        ({"prompt": [10**9]}, 400, "token ids below 49152"),
        ({"prompt": "a", "max_tokens": 0}, 422, "max_tokens is 0"),
        ({"prompt": "a", "max_tokens": "b"}, 400, "max_tokens is 'b', expected a whole number"),
        ({"prompt": "a", "suffix": "b"}, 400, "suffix is 'b'"),
        ({"prompt": "a", "sparsity": 0.96}, 400, "sparsity is 0.96, expected a number from 0 to 0.95"),
        ({"prompt": "a", "lossless": True, "draft": "/etc"}, 400, "draft '/etc' is not known here"),
        ({"prompt": "a", "lossless": True, "prefill": "full"}, 400, "lossless text is the dense model's"),
        ({"prompt": "a", "prefill": "half"}, 400, "prefill is 'half', expected 'dense' or 'full'"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias"),
        ({"prompt": "a", "stop": [""]}, 400, "stop"),
        ({"prompt": [5] * 300}, 400, "prompt is too long: 300 tokens > 255 maximum"),
        ([], 400, "the body is []"),
    ],
)
def test_refusals_are_one_line(live, body, status, said):
    request = urllib.request.Request(f"{live.url}/v1/completions", json.dumps(body).encode(), method="POST")
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request)
    found = json.load(error.value)["error"]
    assert error.value.code == status and said in found["message"] and "\n" not in found["message"]
    assert found["type"] == "invalid_request_error"


def test_a_long_prompt_has_the_code_that_clients_look_for(client):
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, [5] * 300)
    assert error.value.code == "context_length_exceeded"


def test_penalties_and_biases_act(live, client):
    plain = complete(client, "One", 30).choices[0].text
    first = live.service.tokenizer.encode("One" + plain)[1]
    assert complete(client, "One", 30, logit_bias={str(first): -100}).choices[0].text[:3] != plain[:3]
    assert plain not in [complete(client, "One", 30, extra_body=more).choices[0].text for more in PENALTIES]
