"""The documentation site: `make docs` builds it from the pages that GitHub shows, and from the code.

The order of the pages is that of docs/README.md, the index. The command line, the shipped configurations and the API
are written here, into docs/generated, from the commands, the JSONs and the docstrings.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GENERATED = ROOT / "docs" / "generated"
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import toolkit  # noqa: E402

project = "leanstate"
author = "the leanstate contributors"
version = release = toolkit.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**"]
exclude_patterns = ["docs/conf.py"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = f"leanstate {release}"
default_role = "code"  # `so` is code in a docstring
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}

_API = {
    "toolkit": "Training loops of your own: `toolkit.initialize` and `toolkit.register`.",
    "toolkit.optim": "Optimizers and rules.",
    "toolkit.memory": "Memory during a run.",
    "toolkit.checkpoint.universal": "Checkpoints, opened.",
    "toolkit.report": "Reports.",
}
_NAMES = {"toolkit.checkpoint.universal": ["open_checkpoint"]}


def _commands(command: Any, ctx: Any) -> Iterator[str]:
    from toolkit.command import Group

    depth = ctx.command_path.count(" ") + 1
    yield f"{'#' * depth} {ctx.command_path}\n\n```text\n{command.get_help(ctx)}\n```\n"
    for name in command.list_commands(ctx) if isinstance(command, Group) else ():
        inner = command.get_command(ctx, name)
        yield from _commands(inner, inner.make_context(name, [], parent=ctx, resilient_parsing=True))


def _command_line() -> str:
    import typer

    from toolkit.cli import app

    os.environ["COLUMNS"] = "100"
    command: Any = typer.main.get_command(app)
    pages = _commands(command, command.make_context("toolkit", [], resilient_parsing=True))
    return "\n".join(pages).replace("# toolkit\n", "# Command line\n", 1)


def _configs() -> str:
    from toolkit.config import shipped_configs

    text = ["# Shipped configurations\n", "What they set and how to change it: [configs.md](../configs.md).\n"]
    for name, config in shipped_configs().items():
        body = json.dumps(json.loads(config.path.read_text(encoding="utf-8")), indent=2)
        text.append(f"## {name}\n\n{config.idea}; {config.placing}.\n\n```json\n{body}\n```\n")
    return "\n".join(text)


def _api() -> str:
    text = ["# API\n"]
    for module, words in _API.items():
        directives = []
        for name in _NAMES.get(module) or importlib.import_module(module).__all__:
            one = getattr(importlib.import_module(module), name)
            if inspect.isclass(one) or inspect.isfunction(one):
                directives.append(f".. auto{'class' if inspect.isclass(one) else 'function'}:: {module}.{name}")
        text.append(f"## {module}\n\n{words}\n\n```{{eval-rst}}\n" + "\n\n".join(directives) + "\n```\n")
    return "\n".join(text)


def _generate(app: Any) -> None:
    GENERATED.mkdir(exist_ok=True)
    for name, text in (("command-line", _command_line()), ("shipped-configs", _configs()), ("api", _api())):
        path = GENERATED / f"{name}.md"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _in_order() -> dict[str, list[str]]:
    """The pages that docs/README.md names, by its captions."""
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    found = {}
    for caption, words in re.findall(r"\*\*([^*]+)\.\*\* (.*?)(?=\n\n|\Z)", index, re.DOTALL):
        pages = dict.fromkeys(re.findall(r"\]\(([\w./-]+)\.md(?:#[\w-]+)?\)", words))
        found[caption] = [f"docs/{page}" for page in pages if page != "../README"]
    found["Reference"] += [f"docs/generated/{page}" for page in ("command-line", "shipped-configs", "api")]
    return found | {"Project": ["CONTRIBUTING", "CHANGELOG"]}


def _with_contents(app: Any, name: str, content: list[str]) -> None:
    """Behind a README, the pages that belong to it: tables of contents that GitHub has no use for."""
    named = _in_order()
    if name == root_doc:
        parts = {"": ["docs/README"], **named}
    elif name.endswith("/README") and name != "docs/README":
        folder = (ROOT / name).parent
        beside = sorted(str(page.relative_to(ROOT).with_suffix("")) for page in folder.glob("*.md"))
        known = {page for pages in named.values() for page in pages}
        parts = {"": [page for page in beside if page not in known]}
    else:
        return
    for caption, pages in parts.items():
        head = [":hidden:", *([f":caption: {caption}"] if caption else [])]
        content[0] += "\n```{toctree}\n" + "\n".join([*head, "", *(f"/{page}" for page in pages)]) + "\n```\n"


def _front_door(app: Any, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        (Path(app.outdir) / "index.html").write_text(
            '<!doctype html><meta http-equiv="refresh" content="0; url=README.html"><a href="README.html">Start</a>\n'
        )


def setup(app: Any) -> None:
    app.connect("builder-inited", _generate)
    app.connect("source-read", _with_contents)
    app.connect("build-finished", _front_door)
