"""/openapi.json: the description of this API in OpenAPI 3.1, written by hand."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from teal_fast.server import schemas
from teal_fast.server.schemas import COUNT, TEXT, WORD, Schema, fields, items, ref, text
from teal_fast.server.texts import our_version

REASONS = {
    400: "What is asked for is wrong; code context_length_exceeded: the prompt is too long",
    401: "The API key is missing or wrong",
    403: "A page of this origin may not ask",
    404: "The model, the request or the address is not known",
    405: "The address takes another method",
    409: "The request has ended",
    413: "The body is too large",
    422: "Fields exclude each other",
    429: "Too many requests wait: Retry-After says when to try again",
    503: "The model is loading, or the request took too long",
}
OBJECT = {"type": "object"}
ERRORS = {
    "Error": fields("error", error=fields("message", "type", message=WORD, type=WORD, param=TEXT, code=TEXT)),
    "AnthropicError": fields(
        "type", "error", type=text("error"), error=fields("message", "type", message=WORD, type=WORD)
    ),
}


def describe(vocab_size: int) -> dict[str, Any]:
    refused = {
        f"{error}{status}": {"description": said, "content": {"application/json": {"schema": ref(error)}}}
        for error in ERRORS
        for status, said in REASONS.items()
    }
    token = {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}
    keys = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "teal-fast", "version": our_version(), "license": {"name": "MIT", "identifier": "MIT"}},
        "security": [{"bearer": []}, {"header": []}, {}],
        "paths": answers() | facts(),
        "components": {
            "schemas": {"Message": schemas.MESSAGE, "Token": token, **ERRORS},
            "responses": refused,
            "securitySchemes": keys,
        },
    }


def answers() -> dict[str, Any]:
    """Endpoints that take a body."""
    tokens = fields("tokens", "count", "max_model_len", tokens=items({}), count=COUNT, max_model_len=COUNT)
    detokenized = fields("prompt", "content", prompt=WORD, content=WORD)
    return {
        "/v1/chat/completions": post("Answers a chat", schemas.CHAT, OBJECT, streams=True),
        "/v1/completions": post("Continues or scores texts", schemas.COMPLETION, OBJECT, streams=True),
        "/v1/responses": post("Answers a chat, as OpenAI's newer API", schemas.RESPONSE, OBJECT, streams=True),
        "/v1/responses/input_tokens": post(
            "Counts a chat's tokens", schemas.COUNT_INPUT, fields("input_tokens", input_tokens=COUNT)
        ),
        "/v1/messages": post("Answers a chat, as Anthropic's API", schemas.MESSAGES, OBJECT, True, "AnthropicError"),
        "/v1/messages/count_tokens": post(
            "Counts a chat's tokens",
            schemas.COUNT_TOKENS,
            fields("input_tokens", input_tokens=COUNT),
            error="AnthropicError",
        ),
        "/v1/requests/{id}": {
            **path_parameter("id"),
            "patch": operation("Changes the sparsity of a running answer", schemas.CHANGE, schemas.CHANGE),
        },
        "/tokenize": post("Tokens of a text or a chat: one of prompt, messages and content", schemas.TOKENIZE, tokens),
        "/detokenize": post("Text of tokens", schemas.DETOKENIZE, detokenized),
        "/apply-template": post("The text of a chat", schemas.TEMPLATE, fields("prompt", prompt=WORD)),
    }


def facts() -> dict[str, Any]:
    """Endpoints that tell what is."""
    model = fields("id", "max_model_len", id=WORD, max_model_len=COUNT)
    return {
        "/v1/models": get("The model's names", fields("data", data=items(model))),
        "/v1/models/{name}": {**path_parameter("name"), **get("One name of the model", model)},
        "/props": get("What is served, and how", fields("n_ctx", n_ctx=COUNT, sparsity={"type": "number"})),
        "/version": get("The server's version", fields("version", version=WORD)),
        "/health": get("Whether the model is loaded", fields("status", status=WORD)),
        "/metrics": get("Figures for Prometheus", None),
        "/openapi.json": get("This description", OBJECT),
    }


def path_parameter(name: str) -> dict[str, Any]:
    return {"parameters": [{"name": name, "in": "path", "required": True, "schema": WORD}]}


def post(summary: str, body: Schema, answer: Schema, streams: bool = False, error: str = "Error") -> dict[str, Any]:
    return {"post": operation(summary, body, answer, streams, error)}


def get(summary: str, answer: Schema | None) -> dict[str, Any]:
    return {"get": operation(summary, None, answer)}


def operation(
    summary: str, body: Schema | None, answer: Schema | None, streams: bool = False, error: str = "Error"
) -> dict[str, Any]:
    content = {"application/json": {"schema": answer}} if answer else {"text/plain": {"schema": WORD}}
    content |= {"text/event-stream": {"schema": WORD}} if streams else {}
    responses = {"200": {"description": "What was asked for", "content": content}}
    responses |= {str(status): {"$ref": f"#/components/responses/{error}{status}"} for status in REASONS}
    described: dict[str, Any] = {"summary": summary, "responses": responses}
    if body is not None:
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return described


async def openapi(request: Request) -> Response:
    return JSONResponse(describe(request.app.state.service.vocab_size))
