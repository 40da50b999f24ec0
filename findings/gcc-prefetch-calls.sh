#!/bin/sh
# GCC 12.2.0 (the machine's own; seen with Debian's 12.2.0-14), beside Clang 18.1 of ziglang 0.13.0, on x86-64.
#
# Input: a function that is not to be inlined, whose loop does nothing but __builtin_prefetch, and a function that
# calls it.
# Expected: whoever asks for a prefetch gets it: at every level of optimization the caller calls, as Clang has it.
# Seen: from -O1 on GCC leaves the call out, and the caller is a lone return: a function that only prefetches counts as
# one without any effect, whose result nobody takes. At -O1 that happens to an inline function, too; from -O2 on it is
# inlined before, and the instruction stays. With the instruction in inline assembly the call stays.
set -eu
version=$(gcc -dumpfullversion) || { echo "needs gcc 12"; exit 1; }
case $version in 12.*) ;; *) echo "needs gcc 12, this is $version"; exit 1 ;; esac
[ "$(uname -m)" = x86_64 ] || { echo "needs x86-64"; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet ziglang==0.13.0
cat > lines.c <<'EOF'
#ifdef ASSEMBLY
#define FETCH(p) __asm__ volatile("prefetcht1 %0" : : "m"(*(p)))
#else
#define FETCH(p) __builtin_prefetch(p, 0, 2)
#endif
__attribute__((noinline)) static void fetch(const char* p, long lines) {
    for (long i = 0; i < lines; i++) FETCH(p + 64 * i);
}
void caller(const char* p, long lines) { fetch(p, lines); }
EOF
fetches() { # the number of prefetches that the compiled file has
    "$@" -S -o lines.s lines.c
    grep -c prefetcht1 lines.s || true
}
echo "gcc $version, $(venv/bin/python -m ziglang cc --version | head -1)"
echo "expected: prefetch instructions at every level"
for level in -O1 -O2 -O3; do
    gcc=$(fetches gcc $level) clang=$(fetches venv/bin/python -m ziglang cc $level)
    assembly=$(fetches gcc $level -DASSEMBLY)
    echo "seen: $level: gcc $gcc, clang $clang, gcc with inline assembly $assembly"
    [ "$gcc" = 0 ] && [ "$clang" -gt 0 ] && [ "$assembly" -gt 0 ] || { echo changed; exit 1; }
done
