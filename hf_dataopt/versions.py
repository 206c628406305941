"""Which releases are installed, and which releases of transformers the tests run on; nothing heavy is imported here."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version

# The rows of `make compat`, oldest first: the floor of pyproject.toml, two between, the newest. Each but the last is
# installed by tests/compat.py; the last is what a fresh environment gets. This is the only list of them.
TESTED_TRANSFORMERS = ("5.17", "5.20", "5.23", "5.24")

PACKAGES = ("torch", "transformers", "peft", "datasets", "accelerate", "huggingface-hub")
NOT_INSTALLED = "not installed"


def installed() -> dict[str, str]:
    """Version of each package that decides what works, `"not installed"` for a missing one.

    A module in use tells its own version: a folder put in front on the path counts, not what was installed beside it.
    """
    return {name: _version(name) for name in PACKAGES}


def describe() -> str:
    """One line for `hf-dataopt --version` and for errors: what is installed, what was tested."""
    found = ", ".join(f"{name} {number}" for name, number in installed().items())
    return f"{found}; tested with transformers {TESTED_TRANSFORMERS[0]} to {TESTED_TRANSFORMERS[-1]}"


def _version(name: str) -> str:
    in_use = getattr(sys.modules.get(name.replace("-", "_")), "__version__", None)
    if in_use is not None:
        return str(in_use)
    try:
        return version(name)
    except PackageNotFoundError:
        return NOT_INSTALLED
