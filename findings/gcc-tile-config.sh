#!/bin/sh
# GCC 12.2.0 (the machine's own; seen with Debian's 12.2.0-14), beside Clang 18.1 of ziglang 0.13.0, on x86-64.
#
# Input: a function that fills the 64 bytes which describe AMX tiles from its two arguments, a width (offset 16) and a
# number of rows (offset 48), and hands them to _tile_loadconfig. It is compiled only: no processor with AMX is needed.
# Expected: the instruction reads 64 bytes, so that both arguments are in memory before it, as Clang has it.
# Seen: from -O1 on GCC stores what lies in the first 8 bytes alone. Its header declares the operand as one pointer of 8
# bytes; stores behind it are dead to the optimizer, and the tiles are described by what the stack held. A statement that
# claims to read all memory, put before the call, keeps them. GCC 12 builds of programs that use AMX need that line.
set -eu
version=$(gcc -dumpfullversion) || { echo "needs gcc 12"; exit 1; }
case $version in 12.*) ;; *) echo "needs gcc 12, this is $version"; exit 1 ;; esac
[ "$(uname -m)" = x86_64 ] || { echo "needs x86-64"; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet ziglang==0.13.0
cat > tiles.c <<'EOF'
#include <immintrin.h>
struct config { unsigned char palette, start, none[14]; unsigned short width[16]; unsigned char rows[16]; };
void describe(int width, int rows) {
    struct config c = {0};
    c.palette = 1;
    c.width[0] = width;
    c.rows[0] = rows;
#ifdef KEEP
    __asm__ volatile("" : : "r"(&c) : "memory");
#endif
    _tile_loadconfig(&c);
}
EOF
kept() { # how many instructions of the compiled file have to do with the two arguments, which arrive in di and si
    "$@" -mamx-tile -S -o tiles.s tiles.c
    grep -c -E '%[er]?(di|dil|si|sil)\b' tiles.s || true
}
echo "gcc $version, $(venv/bin/python -m ziglang cc --version | head -1)"
echo "expected: width and rows are stored at every level"
for level in -O1 -O2 -O3; do
    gcc=$(kept gcc $level) clang=$(kept venv/bin/python -m ziglang cc $level) line=$(kept gcc $level -DKEEP)
    echo "seen: $level: of width and rows, gcc $gcc, clang $clang, gcc behind the statement $line"
    [ "$gcc" = 0 ] && [ "$clang" -gt 0 ] && [ "$line" -gt 0 ] || { cat tiles.s; echo changed; exit 1; }
done
