"""hf_dataopt: data-optimization methods of one dissertation as Hugging Face objects.

Importing the package loads no heavy module; a public name loads its room on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .ccm.plugin import install as _install

__version__ = "0.1.0"

# public name -> module that defines it
_PUBLIC = {
    "CCMConfig": "hf_dataopt.ccm.config",
    "CoMixupConfig": "hf_dataopt.mixup.co_mixup_config",
    "CompressedContextMemory": "hf_dataopt.ccm.memory",
    "DataCollatorForCCM": "hf_dataopt.ccm.collator",
    "DataCollatorForCoMixup": "hf_dataopt.mixup.collators",
    "DataCollatorForPuzzleMix": "hf_dataopt.mixup.collators",
    "DatasetCondenser": "hf_dataopt.condensation.condenser",
    "FeatureExtractor": "hf_dataopt.features",
    "IDCConfig": "hf_dataopt.condensation.config",
    "KVzipCache": "hf_dataopt.kvzip.cache",
    "KVzipConfig": "hf_dataopt.kvzip.config",
    "KVzipGates": "hf_dataopt.kvzip.gates",
    "MixResult": "hf_dataopt.mixup.result",
    "MultiFormation": "hf_dataopt.condensation.multi_formation",
    "PuzzleMixConfig": "hf_dataopt.mixup.config",
    "RelationCleaner": "hf_dataopt.relation.cleaner",
    "RelationConfig": "hf_dataopt.relation.config",
    "RelationReport": "hf_dataopt.relation.report",
    "StreamingContextMemory": "hf_dataopt.ccm.streaming",
    "co_mixup": "hf_dataopt.mixup.co_mixup",
    "plot_mixup": "hf_dataopt.mixup.plot",
    "puzzle_mix": "hf_dataopt.mixup.puzzle_mix",
    "soft_target_loss": "hf_dataopt.mixup.loss",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:
    from .ccm.collator import DataCollatorForCCM as DataCollatorForCCM
    from .ccm.config import CCMConfig as CCMConfig
    from .ccm.memory import CompressedContextMemory as CompressedContextMemory
    from .ccm.streaming import StreamingContextMemory as StreamingContextMemory
    from .condensation.condenser import DatasetCondenser as DatasetCondenser
    from .condensation.config import IDCConfig as IDCConfig
    from .condensation.multi_formation import MultiFormation as MultiFormation
    from .features import FeatureExtractor as FeatureExtractor
    from .kvzip.cache import KVzipCache as KVzipCache
    from .kvzip.config import KVzipConfig as KVzipConfig
    from .kvzip.gates import KVzipGates as KVzipGates
    from .mixup.co_mixup import co_mixup as co_mixup
    from .mixup.co_mixup_config import CoMixupConfig as CoMixupConfig
    from .mixup.collators import DataCollatorForCoMixup as DataCollatorForCoMixup
    from .mixup.collators import DataCollatorForPuzzleMix as DataCollatorForPuzzleMix
    from .mixup.config import PuzzleMixConfig as PuzzleMixConfig
    from .mixup.loss import soft_target_loss as soft_target_loss
    from .mixup.plot import plot_mixup as plot_mixup
    from .mixup.puzzle_mix import puzzle_mix as puzzle_mix
    from .mixup.result import MixResult as MixResult
    from .relation.cleaner import RelationCleaner as RelationCleaner
    from .relation.config import RelationConfig as RelationConfig
    from .relation.report import RelationReport as RelationReport


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hf_dataopt' has no attribute {name!r}; public names are {', '.join(__all__)}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


_install()
