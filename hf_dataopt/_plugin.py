"""Enters our PEFT type as soon as peft is loaded: peft has no entry points, and this package must load nothing itself."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def _register() -> None:
    # modules that are on their way in, and brought peft along: both register at their own end
    for name, attribute in (("config", "CCMConfig"), ("tuner", "register_peft_type")):
        module = sys.modules.get(f"hf_dataopt.ccm.{name}")
        if module is not None and not hasattr(module, attribute):
            return
    from .ccm.tuner import register_peft_type

    register_peft_type()


class _AfterPeft(MetaPathFinder):
    """Finds `peft` as Python would, and registers our type behind its import; stays until that has happened."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The ordinary spec of `peft` with one more step after execution; None for all other modules."""
        if fullname != "peft":
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register now if peft is there, else once it comes."""
    if hasattr(sys.modules.get("peft"), "PeftModel"):
        _register()
    elif "peft" not in sys.modules and not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())
