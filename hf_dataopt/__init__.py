"""hf_dataopt: data-optimization methods of one dissertation as Hugging Face objects.

Importing the package loads no heavy module; a public name loads its room on first use.
"""

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .ccm.plugin import install as _install

__version__ = "0.2.0"

# public name -> module that defines it
_PUBLIC = {
    "CCMConfig": "hf_dataopt.ccm.config",
    "CoMixupConfig": "hf_dataopt.mixup.co_mixup_config",
    "CompressedContextMemory": "hf_dataopt.ccm.memory",
    "DataCollatorForCCM": "hf_dataopt.ccm.collator",
    "DataCollatorForCoMixup": "hf_dataopt.mixup.collators",
    "DataCollatorForMixup": "hf_dataopt.mixup.collators",
    "DataCollatorForPuzzleMix": "hf_dataopt.mixup.collators",
    "DatasetCondenser": "hf_dataopt.condensation.condenser",
    "FeatureExtractor": "hf_dataopt.features",
    "IDCConfig": "hf_dataopt.condensation.config",
    "KVzipCache": "hf_dataopt.kvzip.cache",
    "KVzipConfig": "hf_dataopt.kvzip.config",
    "KVzipGates": "hf_dataopt.kvzip.gates",
    "MixResult": "hf_dataopt.mixup.result",
    "MixupSchedule": "hf_dataopt.mixup.schedule",
    "MultiFormation": "hf_dataopt.condensation.multi_formation",
    "PuzzleMixConfig": "hf_dataopt.mixup.config",
    "RelationCleaner": "hf_dataopt.relation.cleaner",
    "RelationConfig": "hf_dataopt.relation.config",
    "RelationReport": "hf_dataopt.relation.report",
    "StreamingContextMemory": "hf_dataopt.ccm.streaming",
    "Thumbnails": "hf_dataopt.thumbnails",
    "clean_stream": "hf_dataopt.relation.stream",
    "consensus_labels": "hf_dataopt.relation.annotators",
    "co_mixup": "hf_dataopt.mixup.co_mixup",
    "load_ccm": "hf_dataopt.ccm.saved",
    "out_of_sample_probs": "hf_dataopt.relation.probe",
    "payback": "hf_dataopt.kvzip.payback",
    "plot_mixup": "hf_dataopt.mixup.plot",
    "plot_retention": "hf_dataopt.kvzip.retention",
    "puzzle_mix": "hf_dataopt.mixup.puzzle_mix",
    "soft_target_loss": "hf_dataopt.mixup.loss",
}

# modules of 0.1 that have moved; their old names go in 0.3
_MOVED = {
    "hf_dataopt.artifact_kinds": "hf_dataopt.publishing.kinds",
    "hf_dataopt.artifacts": "hf_dataopt.publishing.artifacts",
    "hf_dataopt.cards": "hf_dataopt.publishing.cards",
    "hf_dataopt.chat": "hf_dataopt.text.chat",
    "hf_dataopt.dataset_files": "hf_dataopt.publishing.dataset_files",
    "hf_dataopt.demo_model": "hf_dataopt.text.demo_model",
    "hf_dataopt.info": "hf_dataopt.publishing.info",
    "hf_dataopt.plain_text": "hf_dataopt.text.plain_text",
    "hf_dataopt.positions": "hf_dataopt.text.positions",
    "hf_dataopt.push": "hf_dataopt.shell.push",
    "hf_dataopt.safe_files": "hf_dataopt.publishing.safe_files",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:
    from .ccm.collator import DataCollatorForCCM as DataCollatorForCCM
    from .ccm.config import CCMConfig as CCMConfig
    from .ccm.memory import CompressedContextMemory as CompressedContextMemory
    from .ccm.saved import load_ccm as load_ccm
    from .ccm.streaming import StreamingContextMemory as StreamingContextMemory
    from .condensation.condenser import DatasetCondenser as DatasetCondenser
    from .condensation.config import IDCConfig as IDCConfig
    from .condensation.multi_formation import MultiFormation as MultiFormation
    from .features import FeatureExtractor as FeatureExtractor
    from .kvzip.cache import KVzipCache as KVzipCache
    from .kvzip.config import KVzipConfig as KVzipConfig
    from .kvzip.gates import KVzipGates as KVzipGates
    from .kvzip.payback import payback as payback
    from .kvzip.retention import plot_retention as plot_retention
    from .mixup.co_mixup import co_mixup as co_mixup
    from .mixup.co_mixup_config import CoMixupConfig as CoMixupConfig
    from .mixup.collators import DataCollatorForCoMixup as DataCollatorForCoMixup
    from .mixup.collators import DataCollatorForMixup as DataCollatorForMixup
    from .mixup.collators import DataCollatorForPuzzleMix as DataCollatorForPuzzleMix
    from .mixup.config import PuzzleMixConfig as PuzzleMixConfig
    from .mixup.loss import soft_target_loss as soft_target_loss
    from .mixup.plot import plot_mixup as plot_mixup
    from .mixup.puzzle_mix import puzzle_mix as puzzle_mix
    from .mixup.result import MixResult as MixResult
    from .mixup.schedule import MixupSchedule as MixupSchedule
    from .relation.annotators import consensus_labels as consensus_labels
    from .relation.cleaner import RelationCleaner as RelationCleaner
    from .relation.config import RelationConfig as RelationConfig
    from .relation.probe import out_of_sample_probs as out_of_sample_probs
    from .relation.report import RelationReport as RelationReport
    from .relation.stream import clean_stream as clean_stream
    from .thumbnails import Thumbnails as Thumbnails


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hf_dataopt' has no attribute {name!r}; public names are {', '.join(__all__)}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


class _Moved(MetaPathFinder, Loader):
    """Imports of a moved module by its old name give the module itself, with a `DeprecationWarning`."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return spec_from_loader(fullname, self) if fullname in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(_MOVED[spec.name])
        spec.loader_state = module.__spec__  # the import system is about to put the old name's in its place
        warnings.warn(f"{spec.name} has moved to {module.__name__}", DeprecationWarning, stacklevel=2)
        return module

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state


sys.meta_path.append(_Moved())
_install()
