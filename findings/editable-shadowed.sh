#!/bin/sh
# setuptools 84.2.1, pip 26.1.
#
# Input: a project whose root folder is its package (package-dir maps "oak" to "."), installed once as a copy and once
# editable; Python started in a folder where "oak" is a folder that holds no Python code, such as one of results.
# Expected: an editable install imports what the copy imports.
# Seen: of the copy, `import oak` is the project. Editable, `import oak` is the folder of results, a namespace package
# without the project's names, and yet `import oak.leaf` is the project's: one import mixes the two. The editable
# install adds its finder behind Python's own, which has by then made a namespace package of the folder.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet pip==26.1 setuptools==84.2.1
mkdir -p project/leaf elsewhere/oak
echo 'KIND = "tree"' > project/__init__.py
echo 'KIND = "green"' > project/leaf/__init__.py
echo '{}' > elsewhere/oak/results.json
cat > project/pyproject.toml <<'EOF'
[build-system]
requires = ["setuptools==84.2.1"]
build-backend = "setuptools.build_meta"

[project]
name = "oak"
version = "1.0"

[tool.setuptools]
packages = ["oak", "oak.leaf"]
package-dir = {"oak" = "."}
EOF
cat > ask.py <<'EOF'
import oak
import oak.leaf

print(getattr(oak, "KIND", "nothing"), getattr(oak.leaf, "KIND", "nothing"))
EOF
echo "setuptools 84.2.1, pip 26.1"
echo "expected: oak.KIND and oak.leaf.KIND are 'tree green', however the project is installed"
seen() {
	result=$(cd elsewhere && ../venv/bin/python -c "$(cat ../ask.py)")
	echo "seen: $1: $result"
	test "$result" = "$2" || { echo changed; exit 1; }
}
venv/bin/pip install --quiet ./project
seen "installed as a copy" "tree green"
venv/bin/pip uninstall --quiet --yes oak
venv/bin/pip install --quiet --editable ./project
seen "editable" "nothing green"
rm -r elsewhere/oak
seen "editable, without the folder of results" "tree green"
