"""`import leanstate`: the package `toolkit` under the project's name; installed beside it.

`leanstate.optim` is the same module as `toolkit.optim`: no class and no rule is there twice.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

import toolkit


class _Toolkit(MetaPathFinder, Loader):
    """Finds `toolkit.x.y` where `leanstate.x.y` is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return spec_from_loader(name, self) if name.startswith("leanstate.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"toolkit.{spec.name.removeprefix('leanstate.')}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has given the module the spec of this name.
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


sys.meta_path.insert(0, _Toolkit())
sys.modules["leanstate"] = toolkit
