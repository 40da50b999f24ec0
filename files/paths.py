"""Where things lie: what ships with the package, and what commands make, in a clone and outside of one."""

from pathlib import Path

from teal_fast.kernels.native import cache_folder

ROOT = Path(__file__).resolve().parent.parent  # the package, which a clone's root is
DATA = ROOT / "data"
IN_A_CLONE = (ROOT / "pyproject.toml").is_file()


def checkpoints_folder() -> Path:
    """Where commands put checkpoints unless told otherwise: the clone's folder, outside a clone one in the current."""
    return ROOT / "checkpoints" if IN_A_CLONE else Path("checkpoints")


def demo_folder() -> Path:
    """The demo checkpoint's folder."""
    return (ROOT if IN_A_CLONE else cache_folder()) / "checkpoints" / "demo"


def command(name: str) -> str:
    """What a user types to run the command called so: the file in a clone, the console script elsewhere."""
    return f"python {name}.py" if IN_A_CLONE else f"teal-fast {name}"
