"""hf_dataopt: data-optimization methods of one dissertation as Hugging Face objects.

Importing the package loads no heavy module; a public name loads its room on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._plugin import install as _install

__version__ = "0.1.0"

# public name -> module that defines it
_PUBLIC = {
    "CCMConfig": "hf_dataopt.ccm.config",
    "CompressedContextMemory": "hf_dataopt.ccm.memory",
    "DataCollatorForCCM": "hf_dataopt.ccm.collator",
    "StreamingContextMemory": "hf_dataopt.ccm.streaming",
    "KVzipCache": "hf_dataopt.kvzip.cache",
    "KVzipConfig": "hf_dataopt.kvzip.config",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:
    from .ccm.collator import DataCollatorForCCM as DataCollatorForCCM
    from .ccm.config import CCMConfig as CCMConfig
    from .ccm.memory import CompressedContextMemory as CompressedContextMemory
    from .ccm.streaming import StreamingContextMemory as StreamingContextMemory
    from .kvzip.cache import KVzipCache as KVzipCache
    from .kvzip.config import KVzipConfig as KVzipConfig


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hf_dataopt' has no attribute {name!r}; public names are {', '.join(__all__)}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


_install()
