#!/bin/sh
# anthropic 2.14.0, httpx 0.28.1 or what it brings.
#
# Input: a streamed message whose `usage` has one field more than the SDK knows. It is 0 in message_start, before
# anything is written, and 7 in message_delta, at the end.
# Expected: the accumulated message says 7, as it does for output_tokens, which both events have too.
# Seen: of message_delta's usage the stream helper copies the fields that it knows. The one of message_start stays, so
# that the final message says 0: it looks measured, and it is stale. A field that only message_delta has is lost.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet anthropic==2.14.0
cat > ask.py <<'END'
import http.server
import json
import threading

import anthropic

START = {"id": "m", "type": "message", "role": "assistant", "content": [], "model": "m", "stop_reason": None}
START |= {"stop_sequence": None, "usage": {"input_tokens": 3, "output_tokens": 0, "own": 0}}
EVENTS = [
    {"type": "message_start", "message": START},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "hello"}},
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 5, "own": 7, "late": 7}},
    {"type": "message_stop"},
]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for event in EVENTS:
            self.wfile.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = anthropic.Anthropic(base_url=f"http://127.0.0.1:{server.server_port}", api_key="any")
messages = [{"role": "user", "content": "hi"}]
with client.messages.stream(model="m", max_tokens=9, messages=messages) as stream:
    usage = stream.get_final_message().usage
print(usage.output_tokens, usage.own, getattr(usage, "late", "lost"))
END
echo "anthropic 2.14.0"
echo "expected: 5 7 7 (output_tokens, a field of both events, a field of the last)"
seen=$(venv/bin/python ask.py)
echo "seen: $seen"
test "$seen" = "5 0 lost"
