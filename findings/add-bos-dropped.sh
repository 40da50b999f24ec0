#!/bin/sh
# transformers 5.23.0, beside 4.57.1.
#
# Input: a folder with a tokenizer.json that adds nothing to a text, and a tokenizer_config.json that asks for
# LlamaTokenizerFast, names a BOS token and says "add_bos_token": true, as DeepSeek's folders do.
# Expected: ids begin with BOS, as the configuration says, and as they did in version 4.
# Seen: 4.57.1 adds BOS, 5.23.0 does not, without a warning, and its tokenizer calls add_bos_token false. The same word
# given to from_pretrained is heeded. In the file it is dropped wherever a tokenizer.json lies beside it.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
for release in 4.57.1 5.23.0; do
    python3 -m venv "venv-$release"
    "venv-$release/bin/pip" install --quiet "transformers==$release"
done
cat > make.py <<'END'
import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE

tokenizer = Tokenizer(BPE({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, [], unk_token="<unk>"))
tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
Path("model").mkdir()
tokenizer.save("model/tokenizer.json")
named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
config = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True} | named
Path("model/tokenizer_config.json").write_text(json.dumps(config))
END
cat > ask.py <<'END'
from transformers import AutoTokenizer

for given in ({}, {"add_bos_token": True}):
    tokenizer = AutoTokenizer.from_pretrained("model", **given)
    print(*tokenizer.convert_ids_to_tokens(tokenizer("aa").input_ids), tokenizer.add_bos_token, end=" ")
END
venv-4.57.1/bin/python make.py
echo "transformers 4.57.1 and 5.23.0"
echo "expected, in both: <s> a a True <s> a a True (as the file says, and as an argument says)"
before=$(venv-4.57.1/bin/python ask.py 2>/dev/null)
seen=$(venv-5.23.0/bin/python ask.py 2> said)
echo "seen in 4.57.1: $before"
echo "seen in 5.23.0: $seen"
test "$before" = "<s> a a True <s> a a True "
test "$seen" = "a a False <s> a a True "
! grep -qi bos said
