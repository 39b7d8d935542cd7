"""From a conversation to text, as the tokenizer's chat template writes it; each piece bears loss or does not."""

from __future__ import annotations

import json
import re
from itertools import takewhile
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from conversations import is_learnt
from data_files import Notes

PLAIN_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ '### Response:\\n' + m['content'] + (eos_token or '') }}"
    "{% elif m['role'] == 'system' %}{{ m['content'] + '\\n\\n' }}"
    "{% else %}{{ ('' if loop.first else '\\n\\n') + '### Instruction:\\n' + m['content'] + '\\n\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)


class RefusedError(Exception):
    """The chat template can't write a conversation, or not so that its answers can be learnt."""


def prefix_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer puts before a text by itself: the bos token, or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template for a tokenizer that has none; saved with the model, so that its user prompts alike."""
    return ("{{ bos_token }}" if prefix_tokens(tokenizer) else "") + PLAIN_TEMPLATE


def written(
    messages: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    tools: list[dict] | None,
    *,
    prompt: bool = False,
) -> str:
    """Return messages as the chat template writes them, with or without what asks for the next answer.

    Raises:
        ValueError: the template is none.
        RefusedError: it can't write these messages.
    """
    shown = [{name: value for name, value in message.items() if name != "weight"} for message in messages]
    try:
        return tokenizer.apply_chat_template(shown, tools=tools, tokenize=False, add_generation_prompt=prompt)
    except TemplateSyntaxError as error:
        raise ValueError(
            f"the tokenizer's chat template can't be parsed: line {error.lineno}: {error.message}"
        ) from None
    except Exception as error:  # a template is a program of others: whatever it raises, it can't write this
        raise RefusedError(str(error).split("\n")[0] or type(error).__name__) from None


def render(
    messages: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    tools: list[dict] | None = None,
    notes: Notes | None = None,
) -> list[list[tuple[str, bool]]]:
    """Cut a conversation into pieces of text, each with whether the model is to write it.

    A piece is tokenized by itself, so the tokens before an answer are those the model sees when it is prompted. A
    template may write an answer otherwise once others follow (drop its thoughts): it is then learnt in a text of its
    own, which ends with it. The last text ends with the last answer.

    Raises:
        ValueError: the template can't be parsed.
        RefusedError: it can't write this conversation, or not so that its answers can be learnt.
    """
    counts = (Notes() if notes is None else notes).counts
    places = [i for i, message in enumerate(messages) if is_learnt(message)]
    try:
        answers = [answer(messages[: i + 1], tokenizer, tools) for i in places]
    except RefusedError:
        if not any("tool_calls" in message for message in messages):
            raise
        messages = [with_arguments_as_text(message) for message in messages]  # as some templates want them
        answers = [answer(messages[: i + 1], tokenizer, tools) for i in places]
    texts: list[list[tuple[str, bool]]] = []
    left = set(range(len(answers)))
    while left:
        last = max(left)
        start, whole = answers[last]
        pieces: list[tuple[str, bool]] = []
        done = 0
        for number, (begin, text) in enumerate(answers[:last]):
            if whole.startswith(text) and done <= begin and len(text) <= start:
                pieces += [(whole[done:begin], False), (text[begin:], number in left)]
                done = len(text)
                left.discard(number)
        texts.insert(0, [*pieces, (whole[done:start], False), (whole[start:], True)])
        left.discard(last)
    if len(texts) > 1:
        counts["answers that the chat template changes later on, learnt in examples of their own"] += len(texts) - 1
    if places[-1] < len(messages) - 1:
        counts["messages after the last answer left out"] += len(messages) - 1 - places[-1]
    shown = dict.fromkeys(range(places[-1]), answers[-1][1]) | dict(zip(places, (t for _, t in answers), strict=True))
    for i, text in shown.items():
        if messages[i]["content"].strip() not in text:
            counts[f"contents of the role {messages[i]['role']} that the chat template does not write as they are"] += 1
        for name in messages[i].keys() - {"role", "content", "tool_calls", "tool_call_id", "weight"}:
            if str(messages[i][name]) not in text:
                counts[f"values of '{name}' in messages, which the chat template does not write"] += 1
    if tools and not all(str(tool["function"].get("name")) in answers[-1][1] for tool in tools):
        counts["rows whose tools the chat template does not write"] += 1
    return texts


def answer(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, tools: list[dict] | None
) -> tuple[int, str]:
    """Return where the last message's answer begins, and the text that it ends.

    Raises:
        RefusedError: the template leaves the answer out, or changes what comes before it.
    """
    *before, last = messages
    whole = written(messages, tokenizer, tools)
    needed = last["content"].split("</think>")[-1].strip()  # a template may write thoughts elsewhere, or none
    if before:
        prompt = written(before, tokenizer, tools, prompt=True)
        starts = [len(prompt)] if whole.startswith(prompt) else []
        base = whole if starts and needed in whole[starts[0] :] else written(before, tokenizer, tools)
        if whole.startswith(base):  # what asks for an answer may open a thought, which this answer does not have
            starts += [len(base + common_start(whole[len(base) :], prompt[len(base) :])), len(base)]
    else:
        starts = [header_of_first(whole, tokenizer)]
    if not starts:
        raise RefusedError("the template rewrites the prompt once it has the answer")
    start = next((start for start in starts if needed in whole[start:]), None)
    if start is None:
        raise RefusedError("the template does not write the answer as it is")
    if not all(call["function"]["name"] in whole[start:] for call in last.get("tool_calls", ())):
        raise RefusedError("the template does not write tool calls")
    return start, whole


def common_start(text: str, other: str) -> str:
    """Return what two texts begin with, up to a mark such as "<think>" that only one of them has whole."""
    shared = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, other, strict=False)))
    return re.sub(r"[<\[][^<>\[\]]*$", "", shared)


def with_arguments_as_text(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose calls have their arguments as JSON in a text, which is how OpenAI writes them."""
    if "tool_calls" not in message:
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    texts = [
        f["arguments"] if isinstance(f["arguments"], str) else json.dumps(f["arguments"], ensure_ascii=False)
        for f in functions
    ]
    calls = [
        call | {"function": function | {"arguments": text}}
        for call, function, text in zip(message["tool_calls"], functions, texts, strict=True)
    ]
    return message | {"tool_calls": calls}


def header_of_first(whole: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the length of what comes before the answer in a text that an answer opens."""
    question = [{"role": "user", "content": "a"}]
    try:
        asked = written(question, tokenizer, None, prompt=True).removeprefix(written(question, tokenizer, None))
    except RefusedError:
        return 0
    headers = (asked, asked.lstrip(), asked.strip())
    return next((whole.find(header) + len(header) for header in headers if header and header in whole), 0)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer: eos, and what the chat template writes after one."""
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    try:
        text = written([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], tokenizer, None)
    except RefusedError:
        return ends
    after = tokenizer(text[text.rfind("b") + 1 :], add_special_tokens=False)["input_ids"][:1]
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    return sorted({*ends, *(t for t in after if t in special)})
