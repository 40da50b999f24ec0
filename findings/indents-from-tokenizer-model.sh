#!/bin/sh
# transformers 5.23.0, sentencepiece 0.2.1, mistral-common 1.13.1 for its file tokenizer.model.v1.
#
# Input: a folder that holds nothing but a sentencepiece tokenizer.model and a tokenizer_config.json that asks for
# LlamaTokenizer with "legacy": false; a text with an indent of four spaces after a line feed.
# Expected: the ids that sentencepiece gives, since the file is its own.
# Seen: transformers builds a BPE of its own from the file's pieces. It joins all four spaces to one piece and leaves the
# word after them without its space; sentencepiece joins three and gives the fourth to the word. Indented code gets
# other ids, without a warning.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet transformers==5.23.0 sentencepiece==0.2.1 protobuf==6.33.1
venv/bin/pip download --quiet --no-deps --dest package mistral-common==1.13.1
mkdir model
venv/bin/python - <<'END'
import pathlib
import zipfile

wheel = zipfile.ZipFile(next(pathlib.Path("package").glob("*.whl")))
name = next(name for name in wheel.namelist() if name.endswith("data/tokenizer.model.v1"))
pathlib.Path("model/tokenizer.model").write_bytes(wheel.read(name))
END
echo '{"tokenizer_class": "LlamaTokenizer", "legacy": false}' > model/tokenizer_config.json
cat > ask.py <<'END'
from sentencepiece import SentencePieceProcessor
from transformers import LlamaTokenizer

text = "a\n" + " " * 4 + "return x"
built = LlamaTokenizer.from_pretrained("model").encode(text, add_special_tokens=False)
own = SentencePieceProcessor(model_file="model/tokenizer.model").encode(text)
print("equal" if built == own else "different", len(built), len(own))
END
echo "transformers 5.23.0, sentencepiece 0.2.1"
echo "expected: equal ids"
seen=$(venv/bin/python ask.py 2>/dev/null)
echo "seen: $seen (transformers' number of ids, sentencepiece's)"
test "${seen%% *}" = different
