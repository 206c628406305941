"""hf_dataopt: data-optimization methods of one dissertation as Hugging Face objects.

Importing the package loads no heavy module; a public name loads its room on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name -> module that defines it
_PUBLIC = {
    "DatasetCondenser": "hf_dataopt.condensation.condenser",
    "IDCConfig": "hf_dataopt.condensation.config",
    "MultiFormation": "hf_dataopt.condensation.multi_formation",
    "KVzipCache": "hf_dataopt.kvzip.cache",
    "KVzipConfig": "hf_dataopt.kvzip.config",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:
    from .condensation.condenser import DatasetCondenser as DatasetCondenser
    from .condensation.config import IDCConfig as IDCConfig
    from .condensation.multi_formation import MultiFormation as MultiFormation
    from .kvzip.cache import KVzipCache as KVzipCache
    from .kvzip.config import KVzipConfig as KVzipConfig


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hf_dataopt' has no attribute {name!r}; public names are {', '.join(__all__)}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
