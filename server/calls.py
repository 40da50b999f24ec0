"""A tool call as a model writes it, read character by character: where its JSON ends, and whether it still is any.

The arguments can be passed on as they arrive, but none before it is certain that there is a call: until `name` is set,
all that was read may turn out to be text.
"""

import json
import re
from collections.abc import Container

NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
KEYS = ("arguments", "parameters")
HEADER = re.compile(r"\s*([^\s\[\]{}\"]+)(?:\[CALL_ID\]([a-zA-Z0-9]{9}))?(?:\[ARGS\])?\s*")
ESCAPE = re.compile(r"""\\(["\\/bfnrt]|u[0-9a-fA-F]{4})""")
MOST_HEADER = 300  # characters


class Json:
    """One JSON object, of which `push` takes one character at a time.

    key: the outermost object's last one, as it is written. done: whether the object is whole.
    """

    def __init__(self):
        self.open, self.wants, self.key, self.done = "", "object", "", False
        self.string = ""  # "key" or "value" within a string
        self.escape = ""  # what has been read of an escape
        self.word = ""  # what has been read of a number, true, false or null

    @property
    def in_value(self) -> bool:
        """Whether within a value of the outermost object."""
        return len(self.open) > 1 or bool(self.word) or self.string == "value"

    def push(self, char: str) -> bool:
        """Takes a character that may come next; False for one that may not, and after the object's end."""
        if self.done:
            return False
        if self.string:
            return self._in_string(char)
        if self.word:
            if char.isalnum() or char in "+-.":
                self.word += char
                return True
            if not (NUMBER.fullmatch(self.word) or self.word in ("true", "false", "null")):
                return False
            self.word, self.wants = "", "comma"
        return char in " \t\n\r" or self._between(char)

    def _in_string(self, char: str) -> bool:
        if self.string == "key" and len(self.open) == 1 and (self.escape or char != '"'):
            self.key += char
        if self.escape:
            self.escape += char
            if ESCAPE.fullmatch(self.escape):
                self.escape = ""
            return not self.escape or re.fullmatch(r"\\u[0-9a-fA-F]{0,3}", self.escape) is not None
        if char == "\\":
            self.escape = char
        elif char == '"':
            self.string, self.wants = "", "colon" if self.string == "key" else "comma"
        return char >= " "

    def _between(self, char: str) -> bool:
        wants, value = self.wants, self.wants in ("value", "first value")
        if char == '"' and (value or wants in ("key", "first key")):
            self.string = "value" if value else "key"
            self.key = self.key if value or len(self.open) > 1 else ""
        elif char == "{" and (value or wants == "object"):
            self.open, self.wants = self.open + "}", "first key"
        elif char == "[" and value:
            self.open, self.wants = self.open + "]", "first value"
        elif char in "}]" and self.open.endswith(char) and wants in ("comma", "first key", "first value"):
            self.open, self.wants = self.open[:-1], "comma"
            self.done = not self.open
        elif char == ":" and wants == "colon":
            self.wants = "value"
        elif char == "," and wants == "comma":
            self.wants = "key" if self.open.endswith("}") else "value"
        elif value and char in "-tfn0123456789":
            self.word = char
        else:
            return False
        return True


class Call:
    """`{"name": …, "arguments": {…}}`, with its keys in any order and others among them.

    names: those that may be called, None for any. name: None until it and the beginning of the arguments are known. id:
    the model's own, None where it writes none. done: whether the call is whole.
    """

    def __init__(self, names: Container[str] | None = None):
        self.names, self.name, self.id, self.done = names, None, None, False
        self._json, self._written, self._whole = Json(), "", set()  # the name as written; keys whose values are read
        self._arguments = ""  # those that have not been taken
        self._begun = False  # whether they are an object

    def push(self, char: str) -> bool:
        """Takes a character that may come next in a call; False for one that may not."""
        was_inside = self._json.in_value
        ends_word = bool(self._json.word) and len(self._json.open) == 1  # the character after a number's last
        if not self._json.push(char):
            return False
        inside = self._json.in_value
        if (inside or (was_inside and not ends_word)) and not self._in_value(char, begins=not was_inside):
            return False
        if was_inside and not inside and not self._end_value():
            return False
        return not self._json.done or self._end()

    def take(self) -> str:
        """What has come of the arguments since the last time, once there is a name."""
        if self.name is None:
            return ""
        taken, self._arguments = self._arguments, ""
        return taken

    def _in_value(self, char: str, begins: bool) -> bool:
        key = self._json.key
        if key in self._whole or (key in KEYS and self._whole.intersection(KEYS)):
            return False  # a key twice
        if key == "name":
            self._written += char
        elif key in KEYS:
            self._arguments += char
            self._begun |= begins and char == "{"
            self._settle()
        return True

    def _end_value(self) -> bool:
        key = self._json.key
        self._whole.add(key)
        if key == "name":
            name = json.loads(self._written) if self._written.startswith('"') else ""
            if not name or (self.names is not None and name not in self.names):
                return False
            self._settle()
        return True

    def _settle(self) -> None:
        if self.name is None and self._begun and "name" in self._whole:
            self.name = json.loads(self._written)

    def _end(self) -> bool:
        """Whether it is a call; arguments may be left out, null, or written as JSON within a string."""
        if self.name is None:
            text = self._arguments
            text = "{}" if text in ("", "null") else json.loads(text).strip() if text.startswith('"') else ""
            arguments = Json()
            if "name" not in self._whole or not all(map(arguments.push, text)) or not arguments.done:
                return False
            self.name, self._arguments = json.loads(self._written), text
        self.done = True
        return True


class NamedCall:
    """`name[ARGS]{…}` or `name[CALL_ID]id[ARGS]{…}`, as Call."""

    def __init__(self):
        self.name = self.id = None
        self.done = False
        self._header, self._arguments, self._json = "", "", Json()

    def push(self, char: str) -> bool:
        if self.name is None and char != "{":
            self._header += char
            return len(self._header) <= MOST_HEADER and re.fullmatch(r"\s*[^\s{}\"]*\s*", self._header) is not None
        if self.name is None:
            if (header := HEADER.fullmatch(self._header)) is None:
                return False
            self.name, self.id = header.groups()
        if not self._json.push(char):
            return False
        self._arguments += char
        self.done = self._json.done
        return True

    def take(self) -> str:
        taken, self._arguments = self._arguments, ""
        return taken
