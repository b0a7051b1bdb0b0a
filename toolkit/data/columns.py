"""What of a row is trained on: one column of text, or a conversation in one column or several."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from toolkit.data.documents import Document, document
from toolkit.errors import nearest, some
from toolkit.sentences import json_kind

LISTS = ("messages", "conversations", "conversation")
"""Columns that hold lists of messages, as data sets call them; the first that there is, is taken."""
PROMPTS, CONTEXTS, ANSWERS = ("prompt", "instruction"), ("input", "context"), ("completion", "output", "response")
"""Columns of data sets with one question and one answer a row."""
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}
"""ShareGPT's names; others stay as they are."""
ASSISTANT = "assistant"


@dataclass(frozen=True)
class Text:
    """One column, whose value is the document."""

    name: str = "text"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    required = names

    def document(self, row: Mapping[str, Any], where: str) -> Document:
        text = row[self.name]
        if text is not None and not isinstance(text, str):
            return Document("", where, f"{where}: {self.name!r} holds {json_kind(text)}, not text.")
        return document(text or "", where)


@dataclass(frozen=True)
class Messages:
    """A conversation: a list of messages, and the tools that it may call. The document is its JSON."""

    name: str
    tools: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, "tools") if self.tools else (self.name,)

    @property
    def required(self) -> tuple[str, ...]:
        return (self.name,)

    def document(self, row: Mapping[str, Any], where: str) -> Document:
        given, tools = row[self.name], row.get("tools") if self.tools else None
        try:
            if isinstance(tools, str):
                tools = json.loads(tools)
            messages = [_message(message) for message in _listed(given)]
        except ValueError as error:
            return Document("", where, f"{where}: {self.name!r} holds {error}.")
        return _conversation(messages, tools, where)


@dataclass(frozen=True)
class Pair:
    """A conversation of one question, with what there is beside it, and one answer; each text or messages."""

    prompt: str
    answer: str
    context: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.prompt, self.answer) if self.context is None else (self.prompt, self.answer, self.context)

    @property
    def required(self) -> tuple[str, ...]:
        return (self.prompt, self.answer)

    def document(self, row: Mapping[str, Any], where: str) -> Document:
        prompt, answer = row[self.prompt], row[self.answer]
        context = row.get(self.context) if self.context is not None else None
        try:
            if isinstance(prompt, str) and isinstance(context, str) and context:
                prompt = f"{prompt}\n\n{context}"
            messages = [
                _message({"role": role, "content": part} if isinstance(part, str) else part)
                for role, given in (("user", prompt), (ASSISTANT, answer))
                for part in ([given] if isinstance(given, str) else _listed(given))
            ]
        except ValueError as error:
            return Document("", where, f"{where}: {self.prompt!r} or {self.answer!r} holds {error}.")
        return _conversation(messages, None, where)


Column = Text | Messages | Pair


def choose(named: str, fields: Mapping[str, bool]) -> Column:
    """What `named` (--text-column) is among `fields`, the columns, each with whether it holds lists of objects.

    A conversation is found by the usual names where there is no column "text", or under any name that is given.
    """
    if named in fields:
        return Messages(named, "tools" in fields) if fields[named] else Text(named)
    if named == Text().name:
        if lists := [name for name in LISTS if fields.get(name)]:
            return Messages(lists[0], "tools" in fields)
        prompt, answer, context = (_first(names, fields) for names in (PROMPTS, ANSWERS, CONTEXTS))
        if prompt is not None and answer is not None:
            return Pair(prompt, answer, context if context != prompt else None)
    return Text(named)


def no_column(where: str, column: str, columns: Collection[str]) -> str:
    """The sentence for a column that is not among `columns`."""
    return f"{where} has no column {column!r}: it has {quoted(columns)}.{nearest(column, list(columns))}"


def quoted(words: Iterable[str]) -> str:
    shown = [repr(word) for word in words]
    return some(shown, 12)


def _first(names: Iterable[str], fields: Collection[str]) -> str | None:
    return next((name for name in names if name in fields), None)


def _listed(given: Any) -> list[Any]:
    """Raises ValueError, which says what it is, unless `given` is a list; None is an empty one."""
    if given is None:
        return []
    if not isinstance(given, list):
        raise ValueError(f"{json_kind(given)}, not a list of messages")
    return given


def _message(given: Any) -> dict[str, Any]:
    """A message as chat templates take it. Raises ValueError, which says what is wrong."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{json_kind(given)} where a message should be")
    message = {key: value for key, value in given.items() if value is not None}
    if "role" not in message and "from" in message:
        message |= {"role": message.pop("from"), "content": message.pop("value", None)}
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise ValueError("a message without 'role' (or 'from')")
    if not isinstance(content, str | list) and not (content is None and "tool_calls" in message):
        raise ValueError(f"a message of {role!r} whose 'content' (or 'value') is {json_kind(content)}, not text")
    return message | {"role": ROLES.get(role, role)}


def _conversation(messages: list[dict[str, Any]], tools: Any, where: str) -> Document:
    # Raw characters, so that half of a surrogate pair is found as in a text.
    facts = {"messages": messages} | ({"tools": tools} if tools else {})
    return document(json.dumps(facts, ensure_ascii=False) if messages else "", where)
