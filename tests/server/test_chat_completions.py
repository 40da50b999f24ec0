"""Chat completions through the openai client against the demo model, and what is refused."""

import json
import threading
import urllib.error
import urllib.request

import openai
import pytest

from teal_fast.tests.server.live import serving

SAY = [{"role": "user", "content": "Say something about rain."}]


@pytest.fixture(scope="module")
def live(demo):
    with serving(demo) as live:
        yield live


@pytest.fixture(scope="module")
def client(live):
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0)


def ask(client, messages=SAY, tokens=16, **more):
    settings = {"model": "gpt-5", "temperature": 0, "max_completion_tokens": tokens}
    return client.chat.completions.create(messages=messages, **settings | more)


def test_an_answer_and_its_cost(client):
    found = ask(client, extra_body={"sparsity": 0.5})
    message, usage = found.choices[0].message, found.usage
    assert found.model == "gpt-5" and found.id.startswith("chatcmpl-")
    assert message.role == "assistant" and "rain" in message.content.lower()
    assert found.choices[0].finish_reason == "length" and usage.completion_tokens == 16
    assert usage.total_tokens == usage.prompt_tokens + 16 and 0.4 < usage.achieved_sparsity < 0.55


def test_streamed_equals_whole(client):
    whole = ask(client, n=2, temperature=0.7, seed=3, logprobs=True, top_logprobs=2)
    texts, tokens, reasons, usage = ["", ""], [[], []], {}, None
    settings = {"n": 2, "temperature": 0.7, "seed": 3, "logprobs": True, "top_logprobs": 2}
    for chunk in ask(client, stream=True, stream_options={"include_usage": True}, **settings):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices] and texts[0] != texts[1]
    assert [[t.token for t in own] for own in tokens] == [
        [t.token for t in choice.logprobs.content] for choice in whole.choices
    ]
    assert reasons == {0: "length", 1: "length"} and usage.completion_tokens == 32
    for entry in whole.choices[0].logprobs.content:
        assert bytes(entry.bytes).decode(errors="replace") == entry.token and len(entry.top_logprobs) == 2


def test_a_second_turn_reads_only_what_is_new(client):
    first = ask(client)
    history = [*SAY, {"role": "assistant", "content": first.choices[0].message.content}]
    again = ask(client, [*history, {"role": "user", "content": "More."}])
    details = again.usage.prompt_tokens_details
    assert first.usage.prompt_tokens <= details.cached_tokens < again.usage.prompt_tokens
    kept = ask(client, [*history, {"role": "user", "content": "More."}], extra_body={"cache": False})
    assert kept.usage.prompt_tokens_details.cached_tokens == 0
    assert kept.choices[0].message.content == again.choices[0].message.content


def test_a_stop_string_ends_the_answer(client):
    plain = ask(client).choices[0].message.content
    stop = plain[10:14]
    found = ask(client, stop=[stop, "never"])
    assert found.choices[0].message.content == plain[: plain.index(stop)]
    assert found.choices[0].finish_reason == "stop" and found.usage.completion_tokens < 16


def test_a_call_that_a_stop_string_cuts_is_not_said_to_be_one(client):
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    settings = {"tools": tools, "tool_choice": "required", "tokens": 40}
    assert ask(client, stop="city", **settings).choices[0].finish_reason == "stop"


def test_the_dial_turns_within_an_answer(live, client):
    seen, changed = [], None
    with ask(client, tokens=200, stream=True, extra_body={"stream_options": {"sparsity": True}}) as stream:
        for chunk in stream:
            seen += [chunk.sparsity["nominal"]] if getattr(chunk, "sparsity", None) else []
            if len(seen) == 5 and changed is None:
                changed = patch(live, chunk.id, {"sparsity": 0.5})
    assert changed == (200, {"id": chunk.id, "sparsity": 0.5})
    assert seen[0] == 0.0 and seen[-1] == 0.5 and sorted(seen) == seen
    assert patch(live, chunk.id, {"sparsity": 0.5})[0] == 409
    assert patch(live, "chatcmpl-unknown", {"sparsity": 0.5})[0] == 404
    for wrong in ({"sparsity": 0.96}, {"sparsity": "x"}, {}):
        assert patch(live, chunk.id, wrong)[0] == 400


def patch(live, id, body):
    request = urllib.request.Request(f"{live.url}/v1/requests/{id}", json.dumps(body).encode(), method="PATCH")
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_two_clients_get_their_own_answers(client):
    own = {"extra_body": {"cache": False}}  # what is computed of a prompt at once decides how it is rounded
    prompts = {n: [{"role": "user", "content": f"Count from {n}."}] for n in (1, 7)}
    alone = [ask(client, prompt, **own).choices[0].message.content for prompt in prompts.values()]
    found = {}

    def run(n: int) -> None:
        chunks = ask(client, prompts[n], stream=True, **own)
        found[n] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    threads = [threading.Thread(target=run, args=(n,)) for n in (1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[1], found[7]] == alone and alone[0] != alone[1]


REFUSED = [
    ({"messages": []}, 400, "messages"),
    ({"messages": "hi"}, 400, "messages"),
    ({"messages": [{"content": "a"}]}, 400, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content"),
    ({"messages": [{"role": "robot", "content": "a"}]}, 400, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0].type"),
    ({"messages": SAY, "temperature": -1}, 400, "temperature"),
    ({"messages": SAY, "temperature": True}, 400, "temperature"),
    ({"messages": SAY, "max_tokens": 0}, 400, "max_tokens"),
    ({"messages": SAY, "top_logprobs": 2}, 422, "top_logprobs"),
    ({"messages": SAY, "n": 0}, 400, "n"),
    ({"messages": SAY, "seed": 1.5}, 400, "seed"),
    ({"messages": SAY, "lossless": True, "sparsity": 0.5}, 400, "sparsity"),
    ({"messages": SAY, "lossless": True, "draft_tokens": 16}, 400, "draft_tokens"),
    ({"messages": SAY, "lossless": True, "draft_sparsity": "much"}, 400, "draft_sparsity"),
    ({"messages": SAY, "response_format": {"type": "json_schema"}}, 400, "response_format"),
    ({"messages": SAY, "tool_choice": "maybe"}, 400, "tool_choice"),
]


@pytest.mark.parametrize("body, status, param", REFUSED, ids=lambda value: str(value)[:60])
def test_refusals_name_the_field(client, body, status, param):
    with pytest.raises(openai.APIStatusError) as error:
        client.post("/chat/completions", cast_to=object, body={"model": "m"} | body)
    found = error.value
    assert found.status_code == status and found.param == param and "\n" not in found.body["message"]


def test_unknown_fields_are_ignored(client):
    assert ask(client, tokens=1, extra_body={"unheard_of": [1]}).choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    "fields", [{}, {"draft": "ngram", "draft_tokens": 4}, {"draft": "self", "draft_sparsity": 0.4}]
)
def test_a_lossless_answer_is_the_dense_one_and_has_no_dial(live, client, fields):
    dense = ask(client, temperature=0, extra_body={"sparsity": 0})
    found = ask(client, temperature=0, extra_body={"lossless": True} | fields)
    assert found.choices[0].message.content == dense.choices[0].message.content
    stream = ask(client, tokens=60, stream=True, extra_body={"lossless": True} | fields)
    assert patch(live, next(iter(stream)).id, {"sparsity": 0.5})[0] == 409
    stream.close()


def test_a_seed_repeats_an_answer(client):
    settings = {"temperature": 1.0, "top_p": 0.9, "extra_body": {"top_k": 50, "min_p": 0.01}}
    first, second, other = (ask(client, seed=seed, **settings).choices[0].message.content for seed in (1, 1, 2))
    assert first == second != other
