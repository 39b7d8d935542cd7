"""From rows to batches: what is trained on and what is held out, tokens and the loss mask, packing.

    data_files ─▶ rows ─ conversations ─▶ messages ─ chat_templates ─▶ text ─▶ examples ─ packs ─▶ batches

Label -100 marks a token that bears no loss. Everything that is cut, dropped or assumed is counted in `Notes`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import Any

import torch
from datasets import ClassLabel, Dataset
from transformers import PreTrainedTokenizerBase

from chat_templates import RefusedError, end_of_turn, plain_template, prefix_tokens, render
from conversations import RowFormat, as_text, find_layout, is_learnt, to_messages, tools_of
from data_files import EVAL_SPLITS, Notes, read, shortened

__all__ = [  # with what scripts need of the modules above
    "IGNORE",
    "Collator",
    "Notes",
    "RowFormat",
    "classification_examples",
    "encode_pieces",
    "end_of_turn",
    "find_layout",
    "first_example",
    "generation_examples",
    "label_names",
    "layouts",
    "pack",
    "packs_are_isolated",
    "plain_template",
    "prompts",
    "read",
    "render",
    "split",
    "to_messages",
]
IGNORE = -100


# --------------------------------------------------------------------------------------------------------- rows


def split(
    source: str,
    eval_source: str | None,
    *,
    config: str | None,
    eval_fraction: float,
    seed: int,
    notes: Notes,
    named: dict[str, str | None] | None = None,
    task: str = "auto",
) -> tuple[Dataset, Dataset]:
    """Return the rows to train on and the rows to evaluate on, which share none.

    The latter come from `eval_source`, else from the data set's own validation or test split, else they are held out.
    `named` and `task` are those of `find_layout`: whether two rows are one is seen from the columns that are used.
    """
    parts = read(source, config=config, notes=notes)
    if "train" not in parts:
        raise ValueError(f"data set '{source}' has no split named train; it has {sorted(parts)}")
    train = parts["train"]
    if len(train) == 0:
        raise ValueError(f"data set '{source}' is empty")
    own = None if eval_source else next((name for name in EVAL_SPLITS if name in parts and len(parts[name])), None)
    for name in sorted(set(parts) - {"train", own}):
        notes.counts[f"rows of the split {name}, which is not used"] += len(parts[name])
    if eval_source is not None:
        others = read(eval_source, config=config, notes=notes)
        test = next((others[name] for name in (*EVAL_SPLITS, "train") if name in others), None)
        if test is None or len(test) == 0:
            raise ValueError(f"data set '{eval_source}' is empty")
    elif own is not None:
        test = parts[own]
    else:
        if not 0 < eval_fraction < 1:
            raise ValueError(f"eval_fraction must be in (0, 1), got {eval_fraction}")
        if len(train) < 2:
            raise ValueError(f"data set '{source}' must have 2 rows or more to hold some out for testing, got 1")
        held_out = train.train_test_split(test_size=max(1, int(len(train) * eval_fraction)), seed=seed)
        train, test = held_out["train"], held_out["test"]
        notes.counts[f"rows held out for testing (eval_fraction={eval_fraction})"] += len(test)
    return train, without_shared(train, test, layouts(train, test, named or {}, task), notes)


def layouts(train: Dataset, test: Dataset, named: dict[str, str | None], task: str) -> tuple[RowFormat, RowFormat]:
    """Return what the columns of the training rows and of the test rows mean; they may have different names.

    Raises:
        ValueError: one of them can't be used, or only one of them is for classification.
    """
    own = find_layout(train.column_names, named, task)
    try:
        other = find_layout(test.column_names, {r: c for r, c in named.items() if c in test.column_names}, task)
    except ValueError as error:
        raise ValueError(f"the test rows can't be used: {error}") from None
    if "classification" in (own.kind, other.kind) and own.kind != other.kind:
        raise ValueError(f"the test rows must be of the kind of the training rows, {own.kind}, got {other.kind}")
    return own, other


def used(rows: Dataset, row_format: RowFormat) -> Dataset:
    """Return the columns that are used; pictures and sounds in others need not be opened."""
    return rows.select_columns(list(dict.fromkeys(row_format.columns.values())))


def without_shared(train: Dataset, test: Dataset, known: tuple[RowFormat, RowFormat], notes: Notes) -> Dataset:
    """Return the test rows that don't occur in `train`, whatever else their columns hold."""

    def key(row: dict, row_format: RowFormat) -> str:
        filled = {role: row[column] for role, column in row_format.columns.items() if row[column]}
        return json.dumps(filled, sort_keys=True, default=str) if filled.keys() - {"label"} else ""  # left out later on

    seen = {key(row, known[0]) for row in used(train, known[0])} - {""}
    keep = [i for i, row in enumerate(used(test, known[1])) if key(row, known[1]) not in seen]
    if len(keep) < len(test):
        notes.counts["test rows left out, because they are training rows too"] += len(test) - len(keep)
    if not keep:
        raise ValueError("every test row is also a training row; give another --eval_dataset")
    return test.select(keep)


# ---------------------------------------------------------------------------------------------------- examples


def encode_pieces(
    pieces: list[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase, *, answers_only: bool
) -> dict[str, list[int]]:
    """Turn pieces into input_ids and labels; label -100 on what the model is not to write."""
    ids: list[int] = []
    labels: list[int] = []
    for text, is_answer in pieces:
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += tokens
        labels += tokens if is_answer or not answers_only else [IGNORE] * len(tokens)
    labels[:1] = [IGNORE]  # nothing precedes the first token, also inside a pack
    return {"input_ids": ids, "labels": labels}


def generation_examples(
    rows: Dataset,
    row_format: RowFormat,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    answers_only: bool,
    notes: Notes,
) -> list[dict[str, list[int]]]:
    """Make examples for a language model, cut to `max_length` tokens.

    A plain text that is longer goes on in the next example; a conversation is cut, and left out when no answer is left.

    Raises:
        ValueError: a row is broken, or the chat template can't be parsed.
    """
    if row_format.kind != "text":
        end_of_turn(tokenizer)  # a template that can't be parsed is no fault of a row
    examples = []
    for number, row in enumerate(used(rows, row_format)):
        try:
            if row_format.kind == "text":
                made = text_examples(row[row_format.columns["text"]], tokenizer, max_length, notes)
            else:
                made = conversation_examples(row, row_format, tokenizer, answers_only=answers_only, notes=notes)
        except ValueError as error:
            raise ValueError(f"{notes.where(row, number)}: {error}") from None
        except RefusedError as error:
            notes.count("rows left out, because the chat template refuses them", str(error), row, number)
            continue
        for example in made:
            if len(example["input_ids"]) > max_length:
                example = {name: values[:max_length] for name, values in example.items()}
                if all(label == IGNORE for label in example["labels"]):
                    notes.counts[f"examples left out, because the answer begins after {max_length} tokens"] += 1
                    continue
                notes.counts[f"examples cut to {max_length} tokens"] += 1
            examples.append(example)
    count_unused(rows, row_format, notes)
    return examples


def text_examples(
    text: Any, tokenizer: PreTrainedTokenizerBase, max_length: int, notes: Notes
) -> Iterator[dict[str, list[int]]]:
    """Yield the examples of a text, which are as many as it has times `max_length` tokens."""
    text = as_text(text, notes.counts)
    if not text:
        notes.counts["rows without text left out"] += 1
        return
    ids = prefix_tokens(tokenizer) + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if len(ids) > max_length:
        notes.counts[f"texts longer than {max_length} tokens cut into several examples"] += 1
    for start in range(0, len(ids), max_length):
        part = ids[start : start + max_length]
        if len(part) > 1:
            yield {"input_ids": part, "labels": [IGNORE, *part[1:]]}


def conversation_examples(
    row: dict, row_format: RowFormat, tokenizer: PreTrainedTokenizerBase, *, answers_only: bool, notes: Notes
) -> list[dict[str, list[int]]]:
    """Return the examples of a conversation: one, or more if its chat template changes answers later on."""
    messages = to_messages(row, row_format, notes)
    if not messages:
        notes.counts["rows without an answer left out"] += 1
        return []
    texts = render(messages, tokenizer, tools_of(row, row_format), notes)
    return [
        encode_pieces(pieces, tokenizer, answers_only=answers_only) for pieces in texts[0 if answers_only else -1 :]
    ]


def count_unused(rows: Dataset, row_format: RowFormat, notes: Notes) -> None:
    """Count the rows that hold something in a column that is not used."""
    others = [name for name in rows.column_names if name not in row_format.columns.values()]
    if others:
        empty = (None, "", [], {}, '""', "[]", "{}")  # or as JSON, which is not read here
        tables = rows.select_columns(others).with_format("arrow").iter(1000)
        number = sum(any(v not in empty for v in row.values()) for table in tables for row in table.to_pylist())
        if number:
            notes.counts[f"rows of which {', '.join(others)} is not used"] += number


def first_example(example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, names: list[str] | None = None) -> str:
    """Return an example as the model sees it; what bears loss stands between >>> and <<<, long pieces are shortened."""
    ids, labels = example["input_ids"], example["labels"]
    if names is not None:
        text = f"{shortened(tokenizer.decode(ids), 800)}\n>>>{names[labels]}<<<"
    else:
        text = ""
        for learnt, pairs in groupby(zip(ids, labels, strict=True), lambda pair: pair[1] != IGNORE):
            piece = shortened(tokenizer.decode([token for token, _ in pairs]), 800)
            text += f">>>{piece}<<<" if learnt else piece
    encoding = sys.stdout.encoding or "utf-8"
    return f"the first example, loss on what stands in >>> <<<:\n{text}".encode(encoding, "backslashreplace").decode(
        encoding
    )


def prompts(
    rows: Dataset, row_format: RowFormat, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> list[tuple[list[int], str, int]]:
    """Return (prompt tokens, wanted answer, answer's length in tokens) of each row that fits the context whole."""
    found, ends = [], end_of_turn(tokenizer)
    for row in used(rows, row_format):
        messages = to_messages(row, row_format)
        if not messages:
            continue
        try:
            *before, answer = render(messages, tokenizer, tools_of(row, row_format))[-1]
        except RefusedError:  # counted with the examples
            continue
        last = [message for message in messages if is_learnt(message)][-1]
        ids = encode_pieces(before, tokenizer, answers_only=True)["input_ids"]
        wanted = tokenizer(answer[0], add_special_tokens=False)["input_ids"]
        if ids and "tool_calls" not in last and len(ids) + len(wanted) <= max_length:
            written = list(takewhile(lambda token: token not in ends, wanted))  # what generation gives
            found.append((ids, tokenizer.decode(written, skip_special_tokens=True), len(wanted)))
    return found


def class_of(value: Any, feature: Any) -> str | None:
    """Return the name of a class, or None where there is none.

    Raises:
        ValueError: the value is no whole number and no name.
    """
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(feature, ClassLabel):
        return feature.names[value] if 0 <= value < len(feature.names) else None  # -1 where it is not told
    if isinstance(value, float) and value.is_integer():  # as whole numbers become where some are missing
        value = int(value)
    if not isinstance(value, (int, str)):
        raise ValueError(f"whole numbers or names, got {shortened(repr(value))}")
    return str(value)


def label_names(train: Dataset, test: Dataset, column: str, test_column: str | None = None) -> list[str]:
    """Return the class names in order: whole numbers in theirs, which need not be 0, 1, …; names in the alphabet's.

    Raises:
        ValueError: fewer than two classes, a class that only the test rows have, or what is no class.
    """

    def classes(rows: Dataset, column: str) -> set[str]:
        feature = rows.features[column]
        try:
            return {class_of(value, feature) for value in rows[column]} - {None}
        except ValueError as error:
            raise ValueError(f"column '{column}' must hold {error}") from None

    if isinstance(train.features[column], ClassLabel):
        names = list(train.features[column].names)
    else:
        found = classes(train, column)
        names = sorted(found, key=int) if all(map(is_whole, found)) else sorted(found)
        if len(names) < 2:
            raise ValueError(f"column '{column}' must hold two classes or more, got {names}")
    if unknown := classes(test, test_column or column) - set(names):
        raise ValueError(f"class {sorted(unknown)[0]!r} of the test rows does not occur in the training rows")
    return names


def is_whole(name: str) -> bool:
    """Return whether the name of a class is a whole number."""
    return name.removeprefix("-").isdecimal()


def classification_examples(
    rows: Dataset,
    row_format: RowFormat,
    tokenizer: PreTrainedTokenizerBase,
    *,
    names: list[str],
    max_length: int,
    notes: Notes,
) -> list[dict[str, Any]]:
    """Make examples with the tokens of one text or a pair, and the class as the label."""
    label, feature = row_format.columns["label"], rows.features[row_format.columns["label"]]
    ids = {name: i for i, name in enumerate(names)}
    examples = []
    for number, row in enumerate(used(rows, row_format)):
        try:
            texts = [
                as_text(row[row_format.columns[r]], notes.counts) for r in ("text", "text2") if r in row_format.columns
            ]
        except ValueError as error:
            raise ValueError(f"{notes.where(row, number)}: {error}") from None
        name = class_of(row[label], feature)
        if name is None or not any(texts):
            notes.counts[f"rows without a {'label' if name is None else 'text'} left out"] += 1
            continue
        encoded = tokenizer(*texts, verbose=False)
        if len(encoded["input_ids"]) > max_length:
            encoded = tokenizer(*texts, truncation=True, max_length=max_length)
            notes.counts[f"examples cut to {max_length} tokens"] += 1
        examples.append({**encoded, "labels": ids[name]})
    count_unused(rows, row_format, notes)
    return examples


# -------------------------------------------------------------------------------------------- packs and batches


def pack(examples: list[dict[str, list[int]]], max_length: int) -> list[dict[str, list[int]]]:
    """Join short examples, in order, into rows of up to `max_length` tokens.

    `position_ids` begin again at 0 with every example; without an attention mask, transformers' decoders read that
    as the border between sequences, and no example attends to another (as long as the model keeps no cache).
    """
    packs: list[dict[str, list[int]]] = []
    for example in examples:
        length = len(example["input_ids"])
        if not packs or len(packs[-1]["input_ids"]) + length > max_length:
            packs.append({"input_ids": [], "labels": [], "position_ids": []})
        packs[-1]["input_ids"] += example["input_ids"]
        packs[-1]["labels"] += example["labels"]
        packs[-1]["position_ids"] += range(length)
    return packs


def packs_are_isolated(model: torch.nn.Module, vocab_size: int) -> bool:
    """Return whether what stands first in a pack leaves the logits of what follows as they are, bit for bit."""
    half = 8
    first, second = torch.randint(vocab_size, (2, half)), torch.randint(vocab_size, (half,))
    positions = torch.arange(half).repeat(2)[None].to(model.device)
    training = model.training
    model.eval()
    with torch.no_grad():
        one, other = (
            model(
                input_ids=torch.cat([f, second])[None].to(model.device), position_ids=positions, use_cache=False
            ).logits
            for f in first
        )
    model.train(training)
    return torch.equal(one[:, half:], other[:, half:])


@dataclass
class Collator:
    """Pad language model examples to the longest; packs get no attention mask but one more sequence of padding."""

    pad_token_id: int

    def __call__(self, examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Return input_ids, labels and attention_mask or position_ids, each (batch, longest)."""
        longest = max(len(e["input_ids"]) for e in examples)
        rows: dict[str, list[list[int]]] = {name: [] for name in ("input_ids", "labels", "attention_mask")}
        packed = "position_ids" in examples[0]
        if packed:
            rows = {name: [] for name in ("input_ids", "labels", "position_ids")}
        for e in examples:
            missing = longest - len(e["input_ids"])
            rows["input_ids"].append(e["input_ids"] + [self.pad_token_id] * missing)
            rows["labels"].append(e["labels"] + [IGNORE] * missing)
            if packed:
                rows["position_ids"].append([*e["position_ids"], *range(missing)])
            else:
                rows["attention_mask"].append([1] * len(e["input_ids"]) + [0] * missing)
        return {name: torch.tensor(values) for name, values in rows.items()}
