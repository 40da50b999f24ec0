#!/bin/sh
# transformers 5.22.0, kernels 0.17.2 (Hugging Face's), torch 2.13.0.
#
# Input: Python started in the folder of a project that has a package "kernels" of its own, as one with GPU code may;
# nothing of it is named to transformers.
# Expected: installing a further package that transformers can use leaves `from transformers import LlamaForCausalLM` as
# it was.
# Seen: it works until Hugging Face's "kernels" is installed, and then raises ImportError: transformers sees by the
# installed packages that kernels is there, and imports the project's. Where the project's folder has no __init__.py it
# works again, for such a folder yields to the installed package. (Which releases of kernels count as there depends on
# the release of transformers: 5.23.0 passes over 0.17.2 as too old, so that this pair shows nothing.)
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet transformers==5.22.0 torch==2.13.0
mkdir -p package/kernels plain/kernels
echo 'def walk(): ...' | tee package/kernels/__init__.py plain/kernels/walk.py > /dev/null
cat > ask.py <<'EOF'
try:
    from transformers import LlamaForCausalLM

    print("imported", LlamaForCausalLM.__name__)
except ImportError as error:
    print("ImportError:", str(error).split(" (")[0])
    assert error.path.endswith("/package/kernels/__init__.py"), error.path
EOF
echo "transformers 5.22.0, kernels 0.17.2, torch 2.13.0"
echo "expected: the import works in each folder, with and without kernels installed"
seen() { # place, what happened, the case in words
	result=$(cd "$1" && ../venv/bin/python -c "$(cat ../ask.py)")
	echo "seen: $3: $result"
	test "$result" = "$2" || { echo changed; exit 1; }
}
seen package "imported LlamaForCausalLM" "kernels not installed, beside a package kernels"
venv/bin/pip install --quiet kernels==0.17.2
seen package "ImportError: cannot import name 'CUDAProperties' from 'kernels'" "installed, beside a package kernels"
seen plain "imported LlamaForCausalLM" "installed, beside a folder kernels without __init__.py"
