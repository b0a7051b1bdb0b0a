"""Python files that a user names with --plugin: a rule, a codec."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from toolkit.errors import UserError


def plugin_option() -> Any:
    """`--plugin`, made anew for each user of it: the help of `toolkit train` puts its own into a part of the page."""
    return typer.Option("--plugin", help="A Python file imported first, e.g. to register a rule; repeatable.")


Plugins = Annotated[list[Path] | None, plugin_option()]
"""Of every command: what it looks at may name a rule, a codec or a model that a plug-in brings."""


def import_plugins(paths: Iterable[Path] | None) -> None:
    """Import each of `paths`, in order. Raises UserError for the first that cannot be."""
    for path in paths or ():
        import_plugin(path)


def import_plugin(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"--plugin {path}: there is no such file.")
    name = f"leanstate_plugin_{path.stem}"  # a name that shadows no other module
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--plugin {path}: not a Python file.")
    module = importlib.util.module_from_spec(spec)
    # Classes look their own module up by name (pickle, dataclasses, torch.compile).
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a script that ends by sys.exit() is no plug-in
        raise UserError(f"--plugin {path}: {type(error).__name__}: {error}") from error
