#!/bin/sh
# llguidance 1.9.1.
#
# Input: the JSON schema {"type": "string", "pattern": "^[^\"]*$"}, a string without quotation marks, and the JSON text
# of a string that is nothing but one, written with JSON's escape.
# Expected: the text is refused, since the value that it stands for does not match the pattern.
# Seen: it is accepted. The library matches patterns against the text between the quotes. It unescapes what the pattern
# asks for, so that \n and the like are right, but a character class that excludes the quotation mark or the backslash
# still lets their escaped forms through. A class that excludes another character, here x, does what it says.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet llguidance==1.9.1
cat > ask.py <<'END'
import json
import re

from llguidance import LLMatcher, LLTokenizer

tokenizer = LLTokenizer("byte")


def accepted(pattern, value):
    schema = {"type": "string", "pattern": pattern}
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(schema))
    ids = tokenizer.tokenize_str(json.dumps(value))
    return matcher.validate_tokens(ids) == len(ids)


for pattern, value in (('^[^"]*$', '"'), ("^[^x]*$", "x"), ("^[^x]*$", "y")):
    print("yes" if re.search(pattern, value) else "no", "yes" if accepted(pattern, value) else "no")
END
echo "llguidance 1.9.1"
echo "expected: the same twice in each pair (whether the value matches, whether its JSON is accepted)"
seen=$(venv/bin/python ask.py | tr '\n' ',')
echo "seen: $seen"
test "$seen" = "no yes,no no,yes yes,"
