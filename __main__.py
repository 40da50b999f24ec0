"""The console script: `teal-fast COMMAND …` is `python COMMAND.py …` in a clone."""

import sys

from teal_fast import calibrate, eval, generate, quantize, serve
from teal_fast.benchmarks import tune
from teal_fast.cli import run

COMMANDS = {
    "generate": generate,
    "calibrate": calibrate,
    "quantize": quantize,
    "eval": eval,
    "serve": serve,
    "tune": tune,
}


def main() -> None:
    """Runs the command that the first argument names, with the others."""
    names = "|".join(COMMANDS)
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(f"usage: teal-fast {names} …\n")
        for name, module in COMMANDS.items():
            print(f"  {name:<10} {module.__doc__.splitlines()[0]}")
        sys.exit(0 if len(sys.argv) > 1 else 2)
    name = sys.argv[1]
    if name not in COMMANDS:
        print(f"teal-fast: error: got {name!r}, expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"teal-fast {name}", *sys.argv[2:]]
    run(COMMANDS[name].main, in_ranks=name == "generate")


if __name__ == "__main__":
    main()
