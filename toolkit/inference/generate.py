"""Text that a trained model generates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from toolkit.data.chat import Chat, Unusable
from toolkit.errors import UserError
from toolkit.inference.opened import Opened
from toolkit.records.sizes import counted


@dataclass(frozen=True)
class Sampling:
    """How text is drawn.

    Args:
        tokens: at most.
        temperature: what logits are divided by; 0 takes the most likely token.
        top_p: only the most likely tokens that have this probability together.
        seed: of all draws, one prompt after the other.
        count: texts for each prompt.
        chat: prompts are messages of a user, in the tokenizer's chat template.
    """

    tokens: int
    temperature: float
    top_p: float
    seed: int
    count: int
    chat: bool = False


@dataclass(frozen=True)
class Text:
    """What follows a prompt; `ended`: with the end of a document, else with the last token that was asked for."""

    prompt: str
    text: str
    tokens: int
    ended: bool


def encode(opened: Opened, prompts: Sequence[str], sampling: Sampling) -> list[list[int]]:
    """The tokens of each prompt, as text is tokenized in training; the beginning of a document for an empty one.

    Raises:
        UserError: a prompt is no text, or too long for the model.
    """
    found = []
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UserError("a prompt is no UTF-8 text.") from None
        encoded: Any = opened.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        ids = list(encoded) or [opened.tokenizer.eos_token_id]
        if opened.positions is not None and len(ids) + sampling.tokens > opened.positions:
            raise UserError(
                f"a prompt of {counted(len(ids), 'token')} and --tokens {sampling.tokens} are more than the "
                f"{opened.positions} positions of the model."
            )
        found.append(ids)
    return found


@torch.no_grad()
def generate(
    opened: Opened, prompts: Sequence[str], sampling: Sampling, made: Callable[[int], None]
) -> list[list[Text]]:
    """For each prompt `count` texts; `made` is called with the number of tokens since its last call."""
    from transformers import GenerationConfig

    hf: Any = opened.model.hf
    ends = _ends(opened)
    if sampling.chat:
        given, more = _asked(opened, prompts)
        ends += [token for token in more if token not in ends]
    else:
        given = list(prompts)
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling.temperature else {}
    # In the place of the model's own settings, which transformers would fill in.
    hf.generation_config = GenerationConfig(
        max_new_tokens=sampling.tokens,
        num_return_sequences=sampling.count,
        do_sample=sampling.temperature > 0,
        use_cache=True,
        eos_token_id=ends,
        pad_token_id=ends[0],
        **drawn,
    )

    def criterion(ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        made(1)
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    encoded, found = encode(opened, given, sampling), []
    torch.manual_seed(sampling.seed)
    for prompt, ids in zip(prompts, encoded, strict=True):
        row = torch.tensor([ids], device=opened.device)
        rows: Any = hf.generate(row, attention_mask=torch.ones_like(row), stopping_criteria=[criterion])
        found.append([_text(opened, prompt, ids, row[len(ids) :], ends) for row in rows.tolist()])
    return found


def _asked(opened: Opened, messages: Sequence[str]) -> tuple[list[str], tuple[int, ...]]:
    """The prompts for answers to `messages`, and the tokens that end an answer.

    Raises:
        UserError: the tokenizer has no chat template, or it does not take them.
    """
    chat = Chat(opened.tokenizer, "--chat")
    try:
        return [chat.prompt([{"role": "user", "content": message}]) for message in messages], chat.ends
    except Unusable as error:
        raise UserError(f"--chat: {error}.") from None


def _ends(opened: Opened) -> list[int]:
    """Tokens that end a text: the tokenizer's, and those that the model's own settings name."""
    own = opened.model.hf.generation_config.eos_token_id
    named = own if isinstance(own, list) else [] if own is None else [own]
    return list(dict.fromkeys([opened.tokenizer.eos_token_id, *named]))


def _text(opened: Opened, prompt: str, ids: list[int], made: list[int], ends: list[int]) -> Text:
    end = next((place for place, token in enumerate(made) if token in ends), None)
    kept = made[:end]
    count = len(kept) + (end is not None)

    def decoded(tokens: list[int]) -> str:
        text: Any = opened.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    # With what is before it: of a text's first token, some tokenizers drop the space.
    before, whole = decoded(ids), decoded(ids + kept)
    text = whole.removeprefix(before) if whole.startswith(before) else decoded(kept)
    return Text(prompt, text, count, end is not None)
