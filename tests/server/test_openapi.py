"""The description against the server: every address, every type and every bound that it names."""

import http.client
import json
from urllib.parse import urlsplit

import pytest

from teal_fast.server.app import ROUTES
from teal_fast.server.openapi import describe
from teal_fast.tests.server.live import serving
from teal_fast.tests.server.malformed import LONG

CHAT = [{"role": "user", "content": "Hi"}]
FUNCTION = {"name": "f", "parameters": {"type": "object"}}
BODIES = {
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 1, "logprobs": True},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 1},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 1, "include": ["message.output_text.logprobs"]},
    "/v1/responses/input_tokens": {"input": "Hi"},
    "/v1/messages": {"messages": CHAT, "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": CHAT},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1]},
    "/apply-template": {"messages": CHAT},
}


@pytest.fixture(scope="module")
def live(calibrated):
    with serving(calibrated, context=128) as live:
        yield live


def schema_of(path, method="post"):
    schema = describe(1000)["paths"][path][method]["requestBody"]["content"]["application/json"]["schema"]
    return schema["anyOf"][0] if "anyOf" in schema else schema


def listed(value):
    return value if isinstance(value, list) else [value]


def ask(live, path, body):
    connection = http.client.HTTPConnection(urlsplit(live.url).netloc, timeout=60)
    connection.request("POST", path, json.dumps(body))
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_every_address_is_described():
    described = {path.replace("{name}", "{name:path}") for path in describe(1000)["paths"]}
    assert described == {route.path for route in ROUTES if route.path not in ("/", "/page/{name}")}
    for route in ROUTES:
        operations = describe(1000)["paths"].get(route.path.replace(":path", ""), {})
        assert {method.upper() for method in operations.keys() - {"parameters"}} <= route.methods


def test_references_lead_somewhere():
    described = describe(1000)
    names = {f"#/components/{kind}/{name}" for kind, found in described["components"].items() for name in found}

    def refs(value):
        if isinstance(value, dict):
            yield from [value["$ref"]] if "$ref" in value else []
            value = list(value.values())
        for part in value if isinstance(value, list) else []:
            yield from refs(part)

    assert set(refs(described)) <= names and len(set(refs(described))) > 20


def test_it_is_served(live):
    connection = http.client.HTTPConnection(urlsplit(live.url).netloc, timeout=60)
    connection.request("GET", "/openapi.json")
    found = json.loads(connection.getresponse().read())
    assert found == json.loads(json.dumps(describe(live.service.vocab_size))) and found["openapi"] == "3.1.0"


@pytest.mark.parametrize("path", BODIES)
def test_bodies_that_are_described_are_served(live, path):
    assert ask(live, path, BODIES[path])[0] == 200
    for name in schema_of(path).get("required", ()):
        for body in ({key: BODIES[path][key] for key in BODIES[path] if key != name}, BODIES[path] | {name: None}):
            status, found = ask(live, path, body)
            assert status == 400 and (name in found["error"]["message"] or path == "/tokenize")


@pytest.mark.parametrize("path", BODIES)
def test_types_are_those_that_are_described(live, path):
    for name, schema in schema_of(path)["properties"].items():
        kinds = {kind for part in schema.get("anyOf", [schema]) for kind in listed(part.get("type", []))}
        kinds |= {"integer"} if "number" in kinds else set()
        wrong = [value for kind, value in (("string", "x"), ("integer", 7), ("object", {"x": 7})) if kind not in kinds]
        if schema.get("type") != ["boolean", "null"] and "enum" in schema:
            wrong.append("another")
        for value in wrong:
            status, found = ask(live, path, BODIES[path] | {name: value})
            assert status == 400 and name in found["error"]["message"], (name, value)


@pytest.mark.parametrize("path", BODIES)
def test_bounds_are_those_that_are_described(live, path):
    for name, schema in schema_of(path)["properties"].items():
        for bound, beyond in (("minimum", -1), ("maximum", 1)):
            if bound not in schema:
                continue
            edge = schema[bound]
            step = max(1, abs(edge) * 1e-6) if "number" in schema["type"] and abs(edge) >= 1 else 1e-6
            outside = edge + beyond * (1 if "integer" in schema["type"] else step)
            status, found = ask(live, path, BODIES[path] | {name: outside})
            assert status == 400 and name in found["error"]["message"], (name, outside)
            if name not in LONG or bound == "minimum":
                body = BODIES[path] | {"echo": True} if name == "max_tokens" and not edge else BODIES[path]
                assert ask(live, path, body | {name: edge})[0] == 200, (name, edge)
