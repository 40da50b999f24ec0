"""Chats with tools: what the template is given, what the answer is held to, how calls are found in it."""

import json
import random
from functools import cache

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel

from teal_fast.engine.engine import Engine
from teal_fast.engine.request import Request, Token
from teal_fast.engine.sampling import Sampling
from teal_fast.engine.text import TextStream
from teal_fast.files.load import load_model
from teal_fast.files.tokenizer import Tokenizer
from teal_fast.server.asked import Chat, Reasoning, Text, ToolArguments, ToolCall
from teal_fast.server.errors import ApiError
from teal_fast.server.formats import HERMES, LLAMA, MISTRAL, MISTRAL_NAMED, OWN, format_of, visible_markers
from teal_fast.server.grammar import Grammars
from teal_fast.server.tools import plan
from teal_fast.tests.files.made_tokenizers import load_real, train_byte_level

pytest.importorskip("llguidance")

# What real templates of the formats say, in short: Qwen 2.5 and 3, Llama 3.1, Mistral Nemo, Mistral Small 3.2.
TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
QWEN = (
    "{% if tools %}Tools:{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}" + TURNS + "{% if m.tool_calls %}"
    "{% for c in m.tool_calls %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "{% endif %}{% endfor %}<|assistant|>{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}"
)
QWQ = QWEN + "<think>\n"
LLAMA3 = (
    "{% if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}<|ipython|>{{ m.content }}{% elif 'tool_calls' in m %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('single tool-calls') }}{% endif %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}<|assistant|>"
)
NEMO = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for m in messages %}"
    "{% if m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}{% if c.id | length != 9 %}"
    "{{ raise_exception('ids of length 9') }}{% endif %}{{ (c.function | tojson)[:-1] }}, "
    '"id": "{{ c.id }}"}{% endfor %}]{% elif m.role == "tool" %}[TOOL_RESULTS]{{ m.content }}, {{ m.tool_call_id }}'
    "{% else %}[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}"
)
SMALL = NEMO.replace("[TOOL_CALLS][", "[TOOL_CALLS]name[ARGS][")
TEMPLATES = {"qwen": QWEN, "qwq": QWQ, "llama": LLAMA3, "nemo": NEMO, "small": SMALL, "own": TURNS + "{% endfor %}|"}

WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "maximum": 9}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
NOW = {"name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": NOW}]
ASKED = [{"role": "user", "content": "How is the weather in Rome?"}]
CALLED = [
    {"role": "system", "content": "Be brief."},
    *ASKED,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "toolu_01A",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
            },
            {"id": "call_2", "type": "function", "function": {"name": "now", "arguments": {}}},
        ],
    },
    {"role": "tool", "tool_call_id": "toolu_01A", "content": "sunny"},
    {"role": "tool", "tool_call_id": "call_2", "content": "12:00"},
]


@pytest.fixture(scope="module")
def demo_tokenizer(demo) -> Tokenizer:
    return Tokenizer.load(demo)


@pytest.fixture(scope="module")
def demo_grammars(demo_tokenizer) -> Grammars:
    return Grammars(demo_tokenizer, demo_tokenizer.vocab_size)


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    """Makes a small tokenizer with a template, and its grammars."""

    @cache
    def make(template, special=()):
        folder = tmp_path_factory.mktemp("tokenizer")
        train_byte_level(ByteLevel(add_prefix_space=False), ["<|end|>", *special], 500).save(
            str(folder / "tokenizer.json")
        )
        settings = {"chat_template": template, "eos_token": "<|end|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer = Tokenizer.load(folder)
        return tokenizer, Grammars(tokenizer, tokenizer.vocab_size + 8)

    return make


def test_formats_are_told_from_templates(demo_tokenizer):
    formats = [format_of(template) for template in TEMPLATES.values()]
    assert formats == [HERMES, HERMES, LLAMA, MISTRAL, MISTRAL_NAMED, OWN]
    assert format_of(QWEN + "<function=name>") == OWN  # Qwen3-Coder's XML
    assert format_of(demo_tokenizer.chat_template) == OWN


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_tools_calls_and_results(speaking, name):
    tokenizer, grammars = speaking(TEMPLATES[name])
    text = tokenizer.decode(plan(Chat(CALLED, TOOLS), tokenizer, grammars).ids)
    for part in ("The weather of a city.", '"Rome"', "sunny", "12:00", "Be brief."):
        assert text.count(part) == 1, part
    assert text.index('"Rome"') < text.index("sunny") < text.index("12:00")
    assert '"arguments": "' not in text and "toolu" not in text  # an object, not JSON in a string


@pytest.mark.parametrize("name, format", [("llama", LLAMA), ("mistral", MISTRAL), ("qwen", HERMES)])
def test_templates_of_real_models(name, format):
    tokenizer = load_real(name)
    assert format_of(tokenizer.chat_template) == format
    chat = [*CALLED, {"role": "assistant", "content": "Sunny."}, *ASKED]
    text = tokenizer.decode(plan(Chat(chat, TOOLS), tokenizer, Grammars(tokenizer, tokenizer.vocab_size)).ids)
    for part in ("The weather of a city.", f'"{format.key}": {{"city": "Rome"}}', "sunny", "12:00", "Be brief."):
        assert part in text


def test_own_words_for_a_template_that_knows_no_tools(demo_tokenizer, demo_grammars):
    made = plan(Chat(CALLED, TOOLS), demo_tokenizer, demo_grammars)
    text = demo_tokenizer.decode(made.ids)
    assert text.count("system\n") == 1 and "Be brief.\n\nYou can call tools." in text
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>' in text
    assert "user\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\n12:00\n</tool_response>" in text


def test_a_chat_without_tools_is_rendered_as_ever(demo_tokenizer, demo_grammars):
    made = plan(Chat(ASKED), demo_tokenizer, demo_grammars)
    assert made.ids == demo_tokenizer.encode_chat(ASKED) and made.constraint is None
    assert made.splitter().push("Hello <tool_call>") == [Text("Hello <tool_call>")]


def test_a_call_that_is_no_json_is_rendered_as_it_was(speaking):
    broken = {"id": "1", "type": "function", "function": {"name": "now", "arguments": '{"a": '}}
    tokenizer, grammars = speaking(QWEN)
    made = plan(Chat([*ASKED, {"role": "assistant", "tool_calls": [broken]}, *ASKED], TOOLS), tokenizer, grammars)
    assert json.dumps('{"a": ') in tokenizer.decode(made.ids)


def test_a_template_that_fails_is_the_requests_error(speaking):
    tokenizer, grammars = speaking("{{ raise_exception('no system messages') }}")
    with pytest.raises(ApiError, match="no system messages") as refused:
        plan(Chat(ASKED), tokenizer, grammars)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    "chat, status, said",
    [
        (Chat(ASKED, tool_choice="required"), 422, "no tools"),
        (Chat(ASKED, TOOLS, "named", "get_wether"), 422, "get_wether"),
        (Chat(ASKED, TOOLS, "required", schema={}), 422, "drop one"),
        (Chat(ASKED, schema={"type": "strng"}), 400, "Invalid type"),
        (Chat(ASKED, [{"type": "function", "function": {"name": ""}}]), 400, "name is ''"),
        (Chat(ASKED, [{"type": "function", "function": {"name": "x" * 257}}]), 400, "1 to 256 characters"),
    ],
    ids=["no tools", "unknown name", "schema", "bad schema", "no name", "long name"],
)
def test_what_is_refused(demo_tokenizer, demo_grammars, chat, status, said):
    with pytest.raises(ApiError, match=said) as refused:
        plan(chat, demo_tokenizer, demo_grammars)
    assert refused.value.status == status


def test_a_tool_that_cannot_be_enforced(demo_tokenizer, demo_grammars):
    odd = {"type": "object", "properties": {"a": {"type": "strng"}}}
    skipped = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}

    def made(parameters, choice, strict):
        function = {"name": "f", "parameters": parameters, "strict": strict}
        return plan(Chat(ASKED, [{"type": "function", "function": function}], choice), demo_tokenizer, demo_grammars)

    assert made(odd, "auto", False).constraint and made(skipped, "required", False).constraint
    for parameters, choice, strict in [(odd, "auto", True), (odd, "required", False), (skipped, "auto", True)]:
        with pytest.raises(ApiError, match=r"tools\[0\].function.parameters can't be enforced"):
            made(parameters, choice, strict)


def answer(made, tokenizer, rng, begin="", most=150):
    """The events of an answer of random allowed tokens, of which those that end it are likely; None where none did."""
    constraint, splitter, stream = made.constraint(), made.splitter(), tokenizer.stream(made.ids, made.visible)
    ends = torch.tensor(sorted(tokenizer.eos_ids))
    likely = [b'"', b"}", b'"}', b"}}", b'"}}', b",", b"]", b"[", b"<", b"{", b'{"']
    likely = torch.tensor([id for id, piece in tokenizer.pieces.items() if piece in likely] + list(made.visible))
    ids, events = tokenizer.encode(begin, add_bos=False), []
    for i in range(most):
        mask = constraint.mask()
        if mask[ends].any() and (mask.count_nonzero() == len(ends) or rng.random() < 0.1):
            return events + splitter.push(stream.flush()) + splitter.flush()
        mask[ends] = False
        chosen = likely[mask[likely]] if rng.random() < 0.7 else likely[:0]
        drawn = rng.choice((chosen if len(chosen) else mask.nonzero().flatten()).tolist())
        id = ids[i] if i < len(ids) else drawn
        constraint.accept(id)
        events += splitter.push(stream.push(id))
    return None


def calls_of(events):
    calls = {event.index: [event.name, ""] for event in events if isinstance(event, ToolCall)}
    for event in events:
        if isinstance(event, ToolArguments):
            calls[event.index][1] += event.text
    return [(name, json.loads(arguments)) for name, arguments in calls.values()]


SPECIAL = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<think>", "</think>")


@pytest.mark.parametrize("special", [(), SPECIAL], ids=["spelled", "special"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_forced_calls_fit_their_tools(speaking, name, special):
    jsonschema = pytest.importorskip("jsonschema")
    tokenizer, grammars = speaking(TEMPLATES[name], special)
    rng, whole, begin = random.Random(name), 0, "hm</think>" if name == "qwq" else ""
    for i in range(6):
        chat = Chat(ASKED, TOOLS, *[("required",), ("named", "get_weather")][i % 2], parallel_tool_calls=i % 3 == 0)
        made = plan(chat, tokenizer, grammars)
        if (events := answer(made, tokenizer, rng, begin)) is None:
            continue
        calls = calls_of(events)
        assert len(calls) >= 1 and (chat.parallel_tool_calls or len(calls) == 1)
        assert not any(isinstance(event, Text) for event in events)
        for called, arguments in calls:
            jsonschema.validate(arguments, {"get_weather": WEATHER, "now": NOW}[called]["parameters"])
            assert chat.tool_choice == "required" or called == "get_weather"
        whole += 1
    assert whole


def held(made, tokenizer, text):
    """Whether the text is allowed as a whole answer."""
    constraint = made.constraint()
    for id in tokenizer.encode(text, add_bos=False):
        if not constraint.mask()[id]:
            return False
        constraint.accept(id)
    return bool(constraint.mask()[list(tokenizer.eos_ids)].all())


WRITTEN = {
    "qwen": '<tool_call>\n{"name": "get_weather", "arguments": %s}\n</tool_call>',
    "llama": '{"name": "get_weather", "parameters": %s}',
    "nemo": '[TOOL_CALLS][{"name": "get_weather", "arguments": %s}]',
    "small": "[TOOL_CALLS]get_weather[ARGS]%s",
    "own": '<tool_call>\n{"name": "get_weather", "arguments": %s}\n</tool_call>',
}


@pytest.mark.parametrize("name", WRITTEN)
def test_with_auto_an_answer_is_free_until_it_calls(speaking, name):
    tokenizer, grammars = speaking(TEMPLATES[name], SPECIAL)
    made = plan(Chat(ASKED, TOOLS), tokenizer, grammars)
    good, bad = WRITTEN[name] % '{"city": "Rome"}', WRITTEN[name] % '{"town": "Rome"}'
    for text in ("", "It is sunny.", good, '{"name": "Bob", "age": 3}', f"<think>{bad} is a call</think>{good}"):
        assert held(made, tokenizer, text), text
    for text in (bad, f"<think>hm</think>{bad}", f"{good}{bad}"):
        assert not held(made, tokenizer, text), text
    one = plan(Chat(ASKED, TOOLS, parallel_tool_calls=False), tokenizer, grammars)
    assert held(one, tokenizer, good) and not held(one, tokenizer, f"{good}\n{good}")


@pytest.mark.parametrize("name", WRITTEN)
def test_a_forced_answer_may_think_first_where_the_model_does(speaking, name):
    tokenizer, grammars = speaking(TEMPLATES[name] + "{# <think> #}")
    good = WRITTEN[name] % '{"city": "Rome"}'
    made = plan(Chat(ASKED, TOOLS, "required"), tokenizer, grammars)
    assert held(made, tokenizer, good) and held(made, tokenizer, f"<think>\nhm\n</think>\n\n{good}")
    assert not held(made, tokenizer, "It is sunny.") and not held(made, tokenizer, "")
    plain, grammars = speaking(TEMPLATES[name].replace("<think>", ""))
    assert not held(plan(Chat(ASKED, TOOLS, "required"), plain, grammars), plain, f"<think>\nhm\n</think>\n\n{good}")


def test_a_schema_beside_tools_leaves_both_open(speaking):
    tokenizer, grammars = speaking(QWEN)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    made = plan(Chat(ASKED, TOOLS, schema=schema), tokenizer, grammars)
    for text in ('{"a": 1}', WRITTEN["qwen"] % '{"city": "Rome"}'):
        assert held(made, tokenizer, text)
    for text in ('{"a": "x"}', "It is sunny."):
        assert not held(made, tokenizer, text)
    none = plan(Chat(ASKED, TOOLS, "none", schema=schema), tokenizer, grammars)
    assert held(none, tokenizer, '{"a": 1}') and not held(none, tokenizer, WRITTEN["qwen"] % '{"city": "Rome"}')


def test_tools_are_shown_but_not_parsed_with_none(speaking):
    tokenizer, grammars = speaking(QWEN)
    made = plan(Chat(ASKED, TOOLS, "none"), tokenizer, grammars)
    text = WRITTEN["qwen"] % "{}"
    assert made.ids == plan(Chat(ASKED, TOOLS), tokenizer, grammars).ids
    assert made.constraint is None and made.splitter().push(text) == [Text(text)]


def test_thinking_that_the_prompt_begins_or_ends(speaking):
    tokenizer, grammars = speaking(QWQ)
    made = plan(Chat(ASKED, schema={}), tokenizer, grammars)
    assert made.splitter().push("hm</think>{}") == [Reasoning("hm"), Text("{}")]
    assert held(made, tokenizer, "hm\n</think>\n\n{}") and not held(made, tokenizer, "{}")
    tokenizer, grammars = speaking(QWEN)
    made = plan(Chat(ASKED, schema={}, thinking=False), tokenizer, grammars)
    assert tokenizer.decode(made.ids).endswith("<think>\n\n</think>\n\n")
    assert held(made, tokenizer, "{}") and not held(made, tokenizer, "<think>hm</think>{}")
    splitter = plan(Chat(ASKED, split_thinking=False), tokenizer, grammars).splitter()
    assert splitter.push("<think>hm</think>Hi") == [Text("<think>hm</think>Hi")]


def test_markers_that_are_special_tokens_are_seen(speaking):
    tokenizer, _ = speaking(NEMO, SPECIAL)
    visible = visible_markers(tokenizer)
    assert set(visible.values()) == {"[TOOL_CALLS]", "<think>", "</think>"}
    id = tokenizer.added_id("[TOOL_CALLS]")
    assert tokenizer.stream((), visible).push(id) == "[TOOL_CALLS]" and tokenizer.decode([id]) == ""
    assert tokenizer.stream((), visible).push(tokenizer.added_id("[ARGS]")) == ""
    assert TextStream(tokenizer, (), (), visible).push(Token(id, None, 0.0, None)) == "[TOOL_CALLS]"


def test_ids_of_mistrals_calls_fit_their_results(speaking):
    tokenizer, grammars = speaking(NEMO)
    text = tokenizer.decode(plan(Chat(CALLED, TOOLS), tokenizer, grammars).ids)
    id = text.split('"id": "')[1][:9]
    assert f"sunny, {id}" in text


def test_the_demo_model_calls_a_tool_that_it_must_call(demo, demo_tokenizer, demo_grammars):
    made = plan(Chat(ASKED, TOOLS, "required", parallel_tool_calls=False), demo_tokenizer, demo_grammars)
    engine = Engine(load_model(demo, "cpu"), stop=demo_tokenizer.eos_ids, context=512)
    request = Request(made.ids, Sampling(temperature=0), max_new_tokens=60, constraint=made.constraint)
    text, splitter, events = TextStream(demo_tokenizer, made.ids, (), made.visible), made.splitter(), []
    for token in engine.stream(request):
        events += splitter.push(text.push(token))
    events += splitter.push(text.flush()) + splitter.flush()
    assert token.finish_reason == "stop"
    [(name, arguments)] = calls_of(events)
    assert name == "get_weather" and arguments["city"] == "Rome"
