#!/bin/sh
# pytest 9.1.1.
#
# Input: a project whose root folder is a package: __init__.py takes a name from a module beside it. A test that imports
# nothing. The same files lie in a folder "shop" and in a folder "my-shop", as a clone of a repository may be called.
# Expected: the test passes in both, since nothing imports the package; or, if pytest reads it, collecting says so.
# Seen: in "my-shop" collecting finds the test without complaint, and running it ends in an error: pytest imports the
# root's __init__.py before the first test, and as the name of that folder is no name of a package, as a module called
# "__init__" that can import nothing beside it. In "shop" the test passes. Started in tests/ it passes in both.
# --import-mode=importlib does not change that.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet pytest==9.1.1
mkdir -p shop/tests
echo 'from .prices import APPLE' > shop/__init__.py
echo 'APPLE = 3' > shop/prices.py
printf 'def test_sum():\n    assert 1 + 1 == 2\n' > shop/tests/test_sum.py
cp -r shop my-shop
venv/bin/pytest --version
echo "expected: the test passes in shop and in my-shop, or fails to be collected"
seen() { # place, expected status, part of the output, pytest's arguments
	place=$1 status=$2 part=$3
	shift 3
	result=0
	(cd "$place" && "$folder/venv/bin/pytest" -p no:cacheprovider "$@") > output 2>&1 || result=$?
	echo "seen: pytest $* in $place: status $result: $(tail -n 1 output | tr -d =)"
	if test $result -ne "$status" || ! grep -q "$part" output; then
		cat output
		echo changed
		exit 1
	fi
}
for mode in prepend importlib; do
	seen shop 0 "1 passed" --import-mode=$mode
	seen my-shop 0 "1 test collected" --import-mode=$mode --collect-only
	seen my-shop 1 "attempted relative import with no known parent package" --import-mode=$mode
	seen my-shop/tests 0 "1 passed" --import-mode=$mode
done
