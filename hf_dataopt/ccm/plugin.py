"""Enters our PEFT type as soon as peft is loaded: peft has no entry points, and this package must load nothing itself."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_CONFIG = "hf_dataopt.ccm.config"


def _register() -> bool:
    """Enter the type; False where peft is not there yet, or came in while our own settings were being loaded."""
    config = sys.modules.get(_CONFIG)
    if not hasattr(sys.modules.get("peft"), "PeftModel") or (config is not None and not hasattr(config, "CCMConfig")):
        return False
    tuner = sys.modules.get("hf_dataopt.ccm.tuner")
    if tuner is None or hasattr(tuner, "register_peft_type"):  # on its way in, it registers at its own end
        from .tuner import register_peft_type

        register_peft_type()
    return True


class _AfterPeft(MetaPathFinder):
    """Finds peft and our settings as Python would, and registers our type behind their import; gone once that is done."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The ordinary spec of one of the two, with one more step after execution; None for all other modules."""
        if fullname not in ("peft", _CONFIG):
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            # registering imports our settings, and so comes here once more, inside
            if self in sys.meta_path and _register() and self in sys.meta_path:
                sys.meta_path.remove(self)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register now if peft is there, else once it comes."""
    if not _register() and not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())
