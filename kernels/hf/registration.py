"""Registers packed folders with transformers at the moment transformers' quantizers are imported, not before.

Importing transformers takes seconds, which `import sparsegpt` must not cost; yet after it an ordinary
`AutoModelForCausalLM.from_pretrained(packed)` is to work whichever of the two was imported first. So: when
`transformers.quantizers.auto` is loaded already, register now; otherwise a finder waits for that one module name, lets
the ordinary machinery load it, registers and takes itself away (the way of PEP 302 import hooks, standard library
only)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

TARGET = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Register now if transformers' quantizers are loaded, otherwise as soon as they are; safe to call twice."""
    if TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting(MetaPathFinder):
    """Finds `TARGET` once, through the other finders, with a loader that registers after loading."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader  # the module looks as if nobody had waited for it
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register()


def _register() -> None:
    # the module registers as its last act, also when it is what imports TARGET
    importlib.import_module("sparsegpt.kernels.hf.quantizer")
