"""From a row to a conversation: which columns mean what, and the formats that people have.

A conversation is a list of dicts with role and content, which may have tool_calls and what else a template knows. A
message with "weight": 0 bears no loss, as in OpenAI's format.
"""

from __future__ import annotations

import datetime
import decimal
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from data_files import Notes, from_json, is_messages, shortened

TEXT_COLUMNS = (
    ("sentence",),
    ("text",),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
)
LABEL_COLUMNS = ("label", "labels")
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class RowFormat:
    """Which columns hold what.

    Args:
        kind: "messages", "instruction", "text" or "classification".
        columns: role (such as "instruction") → column name; "text2" is the second text of a pair.
    """

    kind: str
    columns: dict[str, str]


def find_layout(columns: Iterable[str], named: dict[str, str | None], task: str) -> RowFormat:
    """Decide which columns mean what, from their names and from what the user named.

    Args:
        columns: the data set's column names.
        named: role → column given by the user, or None; roles are instruction, input, output, messages, text, label.
        task: "auto", "generation" or "classification".

    Raises:
        ValueError: a named column is missing, or nothing usable is found.
    """
    columns = list(columns)
    for role, column in named.items():
        if column is not None and column not in columns:
            raise ValueError(f"--{role}_column: there is no column '{column}'; the data set has {', '.join(columns)}")
    given = {role: column for role, column in named.items() if column is not None}

    def pick(role: str, *names: str) -> dict[str, str]:
        found = given.get(role) or next((n for n in names if n in columns), None)
        return {} if found is None else {role: found}

    label = pick("label", *LABEL_COLUMNS)
    pair = (given["text"],) if "text" in given else next((p for p in TEXT_COLUMNS if set(p) <= set(columns)), None)
    if task == "classification" or (task == "auto" and label and pair and not {"messages", "output"} & given.keys()):
        if not label:
            raise ValueError(f"classification needs a label column (--label_column); there are {', '.join(columns)}")
        if pair is None:
            raise ValueError(f"classification needs a text column (--text_column); there are {', '.join(columns)}")
        return RowFormat("classification", label | dict(zip(("text", "text2"), pair, strict=False)))
    asked = {"instruction", "input", "output"} & given.keys()
    if "text" not in given:
        around = pick("system", "system", "system_prompt") | pick("tools", "tools", "functions")
        if (messages := pick("messages", "messages", "conversations")) and ("messages" in given or not asked):
            return RowFormat("messages", messages | around)
        instruction = pick("instruction", "instruction", "prompt", "question")
        output = pick("output", "output", "completion", "response", "answer")
        if instruction and output:
            if {"prompt", "completion", "label"} <= set(columns) and "output" not in given:
                raise ValueError(
                    "the columns prompt, completion and label hold preferences, which this recipe does not learn from; "
                    "to learn every completion, wanted or not, name it: --output_column completion"
                )
            around |= pick("input", "input", "context") | pick("history", "history")
            return RowFormat("instruction", instruction | output | around)
        if asked:
            what = "an output (--output_column)" if instruction else "an instruction (--instruction_column)"
            raise ValueError(f"questions and answers need {what} too; there are {', '.join(columns)}")
    if pair is not None and len(pair) == 1:
        return RowFormat("text", {"text": pair[0]})
    if {"chosen", "rejected"} <= set(columns):
        raise ValueError(
            "the columns chosen and rejected hold preferences, which this recipe does not learn from; to learn the "
            "chosen answers, name them: --output_column chosen (or --messages_column chosen, for whole conversations)"
        )
    raise ValueError(
        f"no known format among the columns {', '.join(columns)}: needed are messages, or instruction and output, or "
        "text, or label and a text (name others with --messages_column, --instruction_column, --output_column, …)"
    )


# ---------------------------------------------------------------------------------------- a row as a conversation


def as_text(value: Any, counts: Counter[str] | None = None) -> str:
    """Return a value as text: a text as it is, content in parts as their texts, anything else as JSON.

    Raises:
        ValueError: the value has no text, as an image.
    """
    if isinstance(value, str):
        return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, list) and any(isinstance(part, dict) and {"type", "text"} & part.keys() for part in value):
        return "".join(map(part_text, value))
    if isinstance(value, (list, dict)) and counts is not None:
        counts["values that are lists or objects, taken as JSON"] += 1
    return json.dumps(value, ensure_ascii=False, default=plain)


def part_text(part: Any) -> str:
    """Return the text of one part of a content."""
    kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, part)
    if kind not in (None, "text", "input_text", "output_text") or not isinstance(text, str):
        raise ValueError(f"a content must be text, or parts of the type text, got {shortened(repr(part))}")
    return text


def plain(value: Any) -> str:
    """Return what JSON has no type for as text."""
    if isinstance(value, (datetime.date, datetime.time, decimal.Decimal)):
        return str(value)
    raise ValueError(f"a content must be text, got {type(value).__name__}")


def parsed(value: Any) -> Any:
    """Return a list that is written as JSON in a text, as in a CSV file, as a list; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return from_json(value)
        except ValueError:
            return value
    return value


def without_nulls(value: Any) -> Any:
    """Drop keys without a value: Arrow gives every dict of a column the keys of all."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def turn(message: Any, counts: Counter[str]) -> dict[str, Any]:
    """Return a message with role and content, whichever of the usual names it has for them.

    Raises:
        ValueError: it has none of them, or a role that nobody knows.
    """
    if not isinstance(message, dict):
        raise ValueError(f"a message must have a role and a content, got {shortened(repr(message))}")
    rest = {name: value for name, value in message.items() if value is not None}
    name = str(rest.pop("role", None) or rest.pop("from", "")).lower()
    content = rest.pop("content" if "content" in rest else "value", None)
    calls = parsed(rest.pop("tool_calls", None))
    if "function_call" in rest:  # OpenAI's older name
        calls = [rest.pop("function_call")]
    if not name or (content is None and not calls and ROLES.get(name) != "assistant"):
        raise ValueError(f"a message must have a role and a content, got {shortened(repr(message))}")
    if name not in ROLES:
        raise ValueError(f"the role of a message must be one of {', '.join(ROLES)}, got {shortened(repr(message))}")
    if name == "function_call" and not calls:  # ShareGPT's: the content is the call, or a list of calls, as JSON
        found = parsed(content if str(content).lstrip().startswith("[") else f"[{content}]")
        if isinstance(found, list) and all(isinstance(call, dict) and "name" in call for call in found):
            calls, content = found, None
    made = {"role": ROLES[name], "content": as_text(content, counts), **rest}
    if calls and (made["role"] != "assistant" or not isinstance(calls, list)):
        what = shortened(repr(message))
        raise ValueError(f"tool_calls must be a list, in a message of the assistant, got {what}")
    return made | ({"tool_calls": [tool_call(call) for call in calls]} if calls else {})


def tool_call(call: Any) -> dict[str, Any]:
    """Return a call as templates want it: {"type": "function", "function": {"name": …, "arguments": {…}}}."""
    call = without_nulls(call)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"a tool call must have a function with a name, got {shortened(repr(call))}")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):  # OpenAI writes them as JSON, templates write JSON themselves
        try:
            read = from_json(arguments)
            arguments = read if isinstance(read, dict) else arguments
        except ValueError:
            pass
    outer = {name: value for name, value in call.items() if name == "id"}
    return {**outer, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def to_messages(row: dict, row_format: RowFormat, notes: Notes | None = None) -> list[dict[str, Any]]:
    """Return a row as a conversation; an empty one if it holds no answer to learn.

    Args:
        row: its columns.
        row_format: what they mean.
        notes: where is counted what is assumed.

    Raises:
        ValueError: a message has no role or no content, or what should be text is not.
    """
    counts: Counter[str] = Counter()
    cells = {role: row[column] for role, column in row_format.columns.items()}
    if row_format.kind == "messages":
        messages = turns(cells["messages"], counts)
    else:
        messages = past(cells.get("history"), counts) + question_and_answer(cells, counts)
    if system := as_text(cells.get("system"), counts):
        if messages and messages[0]["role"] == "system":
            counts["system columns not used, because the conversation has a system message"] += 1
        else:
            messages.insert(0, {"role": "system", "content": system})
    for message in messages:
        if is_learnt(message) and not message["content"] and "tool_calls" not in message:
            message["weight"] = 0
            counts["empty answers, which bear no loss"] += 1
    if not any(map(is_learnt, messages)):
        return []
    if notes is not None:
        notes.counts += counts
    return messages


def question_and_answer(cells: dict[str, Any], counts: Counter[str]) -> list[dict[str, Any]]:
    """Return a prompt and its answer, each a text or (as TRL has them) messages, as messages."""
    prompt, answer = cells["instruction"], cells["output"]
    if is_messages(parsed(prompt)) and is_messages(parsed(answer)):
        prompt, answer = parsed(prompt), parsed(answer)
    prompt, answer = ([cell] if isinstance(cell, dict) and "role" in cell else cell for cell in (prompt, answer))
    context = as_text(cells.get("input"), counts)
    if is_messages(prompt):
        messages = [turn(message, counts) for message in prompt]
        for message in filter(is_learnt, messages):
            message["weight"] = 0
            counts["answers within prompts, which bear no loss"] += 1
        messages += [{"role": "user", "content": context}] if context else []
    else:
        text = "\n".join(part for part in (as_text(prompt, counts), context) if part)
        messages = [{"role": "user", "content": text}] if text else []
    if not messages:
        counts["answers without a question"] += 1
    if is_messages(answer):
        return messages + [turn(message, counts) for message in answer]
    return [*messages, {"role": "assistant", "content": as_text(answer, counts)}]


def turns(value: Any, counts: Counter[str]) -> list[dict[str, Any]]:
    """Return a column of messages as messages."""
    messages = parsed(value)
    if messages is None or messages == "":
        return []
    if not isinstance(messages, list):
        raise ValueError(f"messages must be a list of dicts with role and content, got {shortened(repr(messages))}")
    return [turn(message, counts) for message in messages]


def past(value: Any, counts: Counter[str]) -> list[dict[str, Any]]:
    """Return a history, [[question, answer], …] or messages, as messages."""
    pairs = parsed(value)
    if is_messages(pairs):
        return turns(pairs, counts)
    if pairs is None or pairs == "":
        return []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"a history must be a list of [question, answer], got {shortened(repr(value))}")
    roles = ("user", "assistant")
    return [
        {"role": r, "content": as_text(text, counts)} for pair in pairs for r, text in zip(roles, pair, strict=True)
    ]


def tools_of(row: dict, row_format: RowFormat) -> list[dict] | None:
    """Return the tools that a row offers, as templates take them.

    Raises:
        ValueError: they are no list of dicts.
    """
    tools = without_nulls(parsed(row[row_format.columns["tools"]])) if "tools" in row_format.columns else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(
        isinstance(t, dict) and isinstance(t.get("function", t), dict) for t in tools
    ):
        raise ValueError(f"tools must be a list of dicts, got {shortened(repr(tools))}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def is_learnt(message: dict[str, Any]) -> bool:
    """Return whether a message is an answer that bears loss."""
    return message["role"] == "assistant" and message.get("weight", 1) not in (0, "0", False)
