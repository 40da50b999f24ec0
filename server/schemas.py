"""Bodies of requests as JSON schemas, with the bounds that their readers check, for the API's description.

null counts as a field that is left out, and fields that are not named here are passed over.
"""

from typing import Any

from teal_fast.engine.speculation.lossless import MOST_DRAFTS
from teal_fast.server.chat_completions import MOST_MESSAGES, ROLES
from teal_fast.server.completions import MOST_PROMPTS
from teal_fast.server.settings import MAX_SPARSITY, MOST_ANSWERS, MOST_BIAS, MOST_STOPS, MOST_TOP

Schema = dict[str, Any]
LARGEST = 2**63 - 1


# --- fields


def maybe(kind: str, **bounds: Any) -> Schema:
    return {"type": [kind, "null"], **bounds}


def number(low: float, high: float) -> Schema:
    return maybe("number", minimum=low, maximum=high)


def whole(low: int, high: int = LARGEST) -> Schema:
    return maybe("integer", minimum=low, maximum=high)


def text(*among: str) -> Schema:
    return maybe("string", enum=[*among, None]) if among else maybe("string")


def items(of: Schema, most: int | None = None, least: int = 0) -> Schema:
    bounds = {"minItems": least} if least else {}
    return maybe("array", items=of, **bounds, **({"maxItems": most} if most else {}))


def either(*schemas: Schema) -> Schema:
    return {"anyOf": [*schemas]}


def fields(*needed: str, **properties: Schema) -> Schema:
    """An object; needed: the names of the fields that must be there, and not null."""
    strict = {name: solid(schema) if name in needed else schema for name, schema in properties.items()}
    return {"type": "object", "properties": strict} | ({"required": [*needed]} if needed else {})


def solid(schema: Schema) -> Schema:
    """The schema without null."""
    if "anyOf" in schema:
        return either(*map(solid, schema["anyOf"]))
    kind = schema.get("type")
    changed = {"type": kind[0]} if isinstance(kind, list) else {}
    changed |= {"enum": [word for word in schema["enum"] if word is not None]} if "enum" in schema else {}
    return schema | changed


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


FLAG, TEXT = maybe("boolean"), text()
WORD = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
TOKEN = ref("Token")  # an id below the size of the vocabulary
ANY = maybe("object")
STOP = either({"type": ["string", "null"], "minLength": 1}, items({**WORD, "minLength": 1}, MOST_STOPS))

# --- bodies

SAMPLING = {
    "temperature": number(0, 100),
    "top_k": whole(-1),
    "top_p": number(0, 1),
    "min_p": number(0, 1),
    "repetition_penalty": number(0.01, 100),
    "repeat_penalty": number(0.01, 100),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "logit_bias": maybe(
        "object",
        propertyNames={"pattern": "^[0-9]{1,9}$"},
        additionalProperties={"type": "number", "minimum": -100, "maximum": 100},
        maxProperties=MOST_BIAS,
    ),
    "seed": whole(-(2**63)),
}
OURS = {
    "model": TEXT,
    "stream": FLAG,
    "sparsity": number(0, MAX_SPARSITY),
    "prefill": text("dense", "full"),
    "cache": FLAG,
    "cache_prompt": FLAG,
    "ignore_eos": FLAG,
    "lossless": FLAG,
    "draft": TEXT,
    "draft_sparsity": either(number(0, MAX_SPARSITY), text("auto")),
    "draft_tokens": either(whole(1, MOST_DRAFTS), text("auto")),
}
STREAM = maybe("object", properties={"include_usage": FLAG, "sparsity": FLAG})
FUNCTION = fields("name", name=TEXT, description=TEXT, parameters=ANY, strict=FLAG)
CALL = fields("function", id=TEXT, function=fields("name", name=TEXT, arguments={"type": ["string", "object", "null"]}))
PART = fields("type", "text", type=text("text"), text=TEXT)
CONTENT = either(TEXT, items(PART))
ASK = {
    "messages": items(ref("Message"), MOST_MESSAGES, least=1),
    "tools": items(fields("function", type=text("function"), function=FUNCTION), 1000),
    "chat_template_kwargs": maybe("object", properties={"enable_thinking": FLAG}),
}
FORMAT = {
    "type": ["object", "null"],
    "properties": {
        "type": solid(text("text", "json_object", "json_schema")),
        "json_schema": maybe("object", properties={"schema": ANY}),
    },
    "required": ["type"],
}
CHAT = fields(
    "messages",
    **ASK,
    tool_choice=either(text("auto", "none", "required"), fields("function", function=fields("name", name=TEXT))),
    parallel_tool_calls=FLAG,
    response_format=FORMAT,
    reasoning_effort=TEXT,
    reasoning_format=text("auto", "deepseek", "none"),
    max_tokens=whole(1),
    max_completion_tokens=whole(1),
    logprobs=FLAG,
    top_logprobs=whole(0, MOST_TOP),
    n=whole(1, MOST_ANSWERS),
    stop=STOP,
    stream_options=STREAM,
    **SAMPLING,
    **OURS,
)
IDS = {"type": "array", "items": TOKEN, "minItems": 1}
COMPLETION = fields(
    "prompt",
    prompt=either(WORD, IDS, {"type": "array", "items": either(WORD, IDS), "minItems": 1, "maxItems": MOST_PROMPTS}),
    max_tokens=whole(0),
    echo=FLAG,
    logprobs=whole(0, MOST_TOP),
    n=whole(1, MOST_ANSWERS),
    stop=STOP,
    stream_options=STREAM,
    **SAMPLING,
    **OURS,
)
ITEM = fields(
    "role",
    "content",
    type=text("message"),
    role=text("user", "assistant", "system", "developer"),
    content=either(TEXT, items(fields("type", "text", type=text("input_text", "output_text", "text"), text=TEXT))),
)
INPUT = {
    "input": either(WORD, {"type": "array", "items": ITEM, "minItems": 1}),
    "instructions": TEXT,
    "tools": items(fields("type", "name", type=text("function"), name=TEXT, description=TEXT, parameters=ANY)),
    "tool_choice": text("auto", "none", "required"),
    "parallel_tool_calls": FLAG,
    "reasoning": maybe("object", properties={"effort": TEXT, "summary": TEXT}),
    "text": maybe("object", properties={"format": maybe("object", properties={"type": text("text", "json_object")})}),
}
RESPONSE = fields(
    "input",
    **INPUT,
    max_output_tokens=whole(1),
    include=items(WORD),
    metadata=ANY,
    truncation=text("auto", "disabled"),
    stop=STOP,
    top_logprobs=whole(0, MOST_TOP),
    **SAMPLING,
    **OURS,
)
COUNT_INPUT = fields("input", model=TEXT, **INPUT)
TURN = fields("role", "content", role=text("user", "assistant"), content=CONTENT)
ASKED = {
    "system": CONTENT,
    "messages": items(TURN, least=1),
    "tools": items(fields("name", type=text("custom"), name=TEXT, description=TEXT, input_schema=ANY)),
    "tool_choice": maybe("object", properties={"type": text("auto", "any", "none"), "disable_parallel_tool_use": FLAG}),
    "thinking": maybe("object", properties={"type": solid(text("enabled", "disabled", "adaptive"))}, required=["type"]),
}
MESSAGES = fields(
    "max_tokens",
    "messages",
    **ASKED,
    max_tokens=whole(1),
    stop_sequences=STOP,
    **SAMPLING | {"temperature": number(0, 1)},
    **OURS,
)
NAMES = {"model": TEXT, "return_token_strs": FLAG, "with_pieces": FLAG, "parse_special": FLAG}
TOKENIZE = either(
    fields("prompt", prompt=TEXT, add_special_tokens=FLAG, **NAMES),
    fields("content", content=TEXT, add_special=FLAG, **NAMES),
    fields("messages", **ASK, **NAMES),
)
NAMED = {"reasoning_content": TEXT, "name": TEXT, "tool_call_id": TEXT}
MESSAGE = either(
    fields("role", "content", role=text(*ROLES), content=CONTENT, **NAMED),
    fields("role", "tool_calls", role=text("assistant"), content=CONTENT, tool_calls=items(CALL, least=1), **NAMED),
)
COUNT_TOKENS = fields("messages", model=TEXT, **ASKED)
CHANGE = fields("sparsity", sparsity=number(0, MAX_SPARSITY))
DETOKENIZE = fields("tokens", model=TEXT, tokens=items(TOKEN))
TEMPLATE = fields("messages", model=TEXT, **ASK)
