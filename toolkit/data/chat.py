"""Conversations to tokens, by the tokenizer's chat template, and which of them an answer consists of."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from toolkit.data.columns import ASSISTANT
from toolkit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML = "chatml"
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + eos_token }}{% endgeneration %}{% else %}{{ message.content + eos_token }}"
    "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML whose turns end with the tokenizer's own end of text, which every program stops at."""
_ROLES = ("system", "developer", "user", ASSISTANT, "tool", "function")
"""Whose messages chat templates usually take."""
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Templates that name a date (Llama's) take today's otherwise: a run that is resumed tomorrow would read other tokens.
_FIXED = {"date_string": "26 Jul 2024"}

Span = tuple[int, int]


class Unusable(Exception):
    """A conversation that nothing can be learnt from; says why, in half a sentence."""


def read_template(given: str) -> str:
    """The chat template that --chat-template names.

    Raises:
        UserError: there is no such file, or it is no text.
    """
    if given == CHATML:
        return _CHATML
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"--chat-template {given}: the file is no UTF-8 text.") from None
    except OSError as error:
        raise UserError(
            f"--chat-template {given}: {error.strerror or error}; wanted is {CHATML!r} or a file that holds a Jinja "
            "template."
        ) from None


class Chat:
    """A tokenizer's chat template.

    Where it marks answers ({% generation %}), those marks hold. Else an answer begins where the template's own prompt
    for it ends and ends with the end of its turn; both are looked for in the text of the whole conversation, so that
    a template which writes earlier answers otherwise than the last one is either followed or found out.

    Args:
        what: has the conversations, for messages.

    Raises:
        UserError: the tokenizer has no template, or does not say where in a text its tokens stand.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, what: str) -> None:
        if tokenizer.chat_template is None:
            raise UserError(
                f"{what}: conversations need a chat template, and the tokenizer has none; `toolkit train` gives it one "
                f"with --chat-template, a file or {CHATML!r}."
            )
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"{what}: conversations need a tokenizer that says where in a text its tokens stand, one of Hugging "
                "Face's fast ones: save it as a tokenizer.json, or choose another --tokenizer."
            )
        self._tokenizer: Any = tokenizer

    @cached_property
    def template(self) -> str:
        return str(self._tokenizer.get_chat_template())

    @property
    def identity(self) -> tuple[object, ...]:
        """All that a text depends on, beside the conversation."""
        return self.template, sorted(self._tokenizer.special_tokens_map.items()), _FIXED

    @cached_property
    def roles(self) -> frozenset[str]:
        """Whose messages there may be: the usual ones, and those that the template names.

        Templates leave messages of others out, or write any word in the place of a role.
        """
        return frozenset(_ROLES).union(re.findall(r"""["'](\w+)["']""", self.template))

    @cached_property
    def marks_answers(self) -> bool:
        return _MARKED.search(self.template) is not None

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text after which an answer to `messages` begins."""
        return self._text(messages, None, add_generation_prompt=True)

    def encode(self, conversation: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of a conversation (`columns.Messages`), and which of them belong to answers: int64 and bool [tokens].

        Raises:
            Unusable: it has no answer, or the template does not show where its answers are.
        """
        facts = json.loads(conversation)
        messages, tools = facts["messages"], facts.get("tools")
        if not any(message["role"] == ASSISTANT for message in messages):
            raise Unusable(f"it holds no answer: no message of the role {ASSISTANT!r}")
        if unknown := sorted({message["role"] for message in messages} - self.roles):
            raise Unusable(f"the chat template knows no role {unknown[0]!r}; usual are {', '.join(_ROLES)}")
        text, answers = self._marked(messages, tools) if self.marks_answers else self._found(messages, tools)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.array(encoded["input_ids"], np.int64)
        starts, ends = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2).T
        answered = np.zeros(len(ids), np.bool_)
        for begin, end in answers:
            # Bytes of one character have the same place; a token without any stands before the next.
            inside = (starts >= begin) & (starts < end)
            across = (starts < ends) & (starts < end) & (ends > begin) & ~((starts >= begin) & (ends <= end))
            if across.any():
                token = self._tokenizer.decode(ids[across.argmax() : across.argmax() + 1])
                raise Unusable(f"the token {token!r} is part of an answer and of what is around it")
            answered |= inside
        return ids, answered

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end an answer: the special one that the template writes after it, if it does."""
        token = self._tail[0].strip()
        return (self._tokenizer.convert_tokens_to_ids(token),) if token in self._special else ()

    @cached_property
    def _special(self) -> frozenset[str]:
        return frozenset(str(token) for token in self._tokenizer.added_tokens_decoder.values())

    @cached_property
    def _tail(self) -> tuple[str, str]:
        """What the template writes after an answer: up to the end of the turn, and all of it."""
        word = "answer"
        text = self._text([{"role": "user", "content": "?"}, {"role": ASSISTANT, "content": word}], None)
        if word not in text:
            raise Unusable("the chat template leaves answers out")
        tail = text[text.rindex(word) + len(word) :]
        found = [token for token in self._special if tail.lstrip().startswith(token)]
        turn = max(found, key=len, default="")
        return tail[: tail.index(turn) + len(turn)] if turn else tail, tail

    def _text(self, messages: Sequence[Mapping[str, Any]], tools: Any, **more: Any) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, **_FIXED, **more)
            )
        except (MemoryError, OSError):
            raise
        except Exception as error:  # a template is a program of its own
            raise Unusable(f"the chat template does not take it ({_words(error)})") from error

    def _marked(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        named: dict[str, Any] = self._tokenizer.special_tokens_map | _FIXED
        chats: Any = [messages]
        try:
            made: Any = render_jinja_template(
                chats, tools=tools, chat_template=self.template, return_assistant_tokens_mask=True, **named
            )
            [text], [spans] = made
        except (MemoryError, OSError):
            raise
        except Exception as error:
            raise Unusable(f"the chat template does not take it ({_words(error)})") from error
        return text, [(begin, end) for begin, end in spans if begin < end]

    def _found(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> tuple[str, list[Span]]:
        """The text of the conversation, and the spans of its answers with the ends of their turns."""
        text = self._text(messages, tools)
        asked = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
        if asked[0] == 0:
            raise Unusable("it begins with an answer")
        starts: list[int] = []
        for number in asked:
            before = self._text(messages[:number], tools, add_generation_prompt=True)
            if not text.startswith(before):
                raise Unusable(
                    f"the chat template writes what is before answer {len(starts) + 1} otherwise once it follows"
                )
            starts.append(len(before))
        turn, tail = self._tail
        spans: list[Span] = []
        for number, begin, limit in zip(asked, starts, [*starts[1:], len(text)], strict=True):
            alone = self._text(messages[: number + 1], tools)
            if text.startswith(alone):
                # What the template writes after the end of the turn, a line break, is not the model's to say.
                end = len(alone) - (len(tail) - len(turn) if alone.endswith(tail) else 0)
            else:  # as where thoughts are left out of all answers but the last
                place = text.find(turn, begin) if turn.strip() in self._special else -1
                if place < 0:
                    raise Unusable(f"the chat template writes answer {len(spans) + 1} otherwise once others follow")
                end = place + len(turn)
            if not begin < end <= limit:
                raise Unusable(f"the chat template does not show where answer {len(spans) + 1} ends")
            spans.append((begin, end))
        return text, spans


def _words(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
