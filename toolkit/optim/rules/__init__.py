"""The rules of the package, one file each: every module here is imported, which registers its rule."""

import importlib
import pkgutil

RECOMMENDED = "AMCS"
"""What is suggested to users of other optimizers, and planned with where they name none."""

COMPARED = ("AdamW", RECOMMENDED, "AdamW8")
"""What tables of optimizers show unless told otherwise: DeepSpeed's AdamW, and what takes its place."""

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
