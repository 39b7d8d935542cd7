"""From files or hub data sets to batches: formats, prompts, the loss mask, packing.

    rows ─ layout (which columns mean what) ─▶ messages or text ─ tokens and labels ─▶ examples ─ packs ─▶ batches

Label -100 marks a token that bears no loss. Everything that is cut, dropped or assumed is counted in `Notes`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetNotFoundError
from transformers import PreTrainedTokenizerBase

IGNORE = -100
LOADERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
}
EVAL_SPLITS = ("validation", "dev", "test", "validation_matched")
TEXT_COLUMNS = (
    ("sentence",),
    ("text",),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
)
LABEL_COLUMNS = ("label", "labels")
PLAIN_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ '### Response:\\n' + m['content'] + (eos_token or '') }}"
    "{% elif m['role'] == 'system' %}{{ m['content'] + '\\n\\n' }}"
    "{% else %}{{ ('' if loop.first else '\\n\\n') + '### Instruction:\\n' + m['content'] + '\\n\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Layout:
    """Which columns hold what.

    Args:
        kind: "messages", "instruction", "text" or "classification".
        columns: role (such as "instruction") → column name; "text2" is the second text of a pair.
    """

    kind: str
    columns: dict[str, str]


@dataclass
class Notes:
    """What was done to the data without being asked, counted, to be said aloud."""

    counts: Counter[str] = field(default_factory=Counter)

    def lines(self) -> list[str]:
        """Return one line per kind of change."""
        return [f"{what}: {count:,}" for what, count in self.counts.items()]


# ---------------------------------------------------------------------------------------------------- reading


def read(source: str, *, config: str | None = None) -> DatasetDict:
    """Open a local file (by its ending), a folder that holds such files, or a data set of the hub.

    Raises:
        ValueError: nothing is there, the ending is unknown, or the file can't be read.
    """
    path = Path(source).expanduser()
    looks_local = path.suffix.lower() in LOADERS or source.startswith((".", "/", "~")) or path.exists()
    if not looks_local:
        if os.environ.get("HF_HUB_OFFLINE") == "1" and source.count("/") > 1:
            raise ValueError(f"--dataset must be a local file or a name on the hub, got '{source}', which is neither")
        try:
            loaded = load_dataset(source, config)
        except (DatasetNotFoundError, ConnectionError, FileNotFoundError, ValueError) as error:
            raise ValueError(
                f"data set '{source}' is no local file, and the hub did not give it: {str(error).splitlines()[0]}"
            ) from None
        return loaded
    if not path.exists():
        raise ValueError(f"data file '{source}' does not exist")
    if path.is_dir():
        splits = {f.stem: str(f) for f in sorted(path.iterdir()) if f.suffix.lower() in LOADERS}
        if "train" not in splits:
            raise ValueError(f"folder '{source}' must hold train.json (or {', '.join(LOADERS)}), got {sorted(splits)}")
        return DatasetDict({name: read(file)["train"] for name, file in splits.items()})
    suffix = path.suffix.lower()
    if suffix not in LOADERS:
        raise ValueError(f"a data file must end in one of {', '.join(LOADERS)}, got '{path.name}'")
    if path.stat().st_size == 0:
        raise ValueError(f"data set '{source}' is empty")
    options: dict[str, Any] = {"text": {"sample_by": "paragraph"}, "csv": {}}.get(LOADERS[suffix], {})
    if suffix == ".tsv":
        options = {"sep": "\t", "quoting": 3}  # GLUE's files use quotes as plain text
    try:
        return load_dataset(LOADERS[suffix], data_files=str(path), **options)
    except Exception as error:  # a loader raises whatever its parser raises: the cause is said, and the run ends
        cause = error.__cause__ or error
        raise ValueError(f"data file '{source}' can't be read as {LOADERS[suffix]}: {cause}") from None


def split(
    source: str, eval_source: str | None, *, config: str | None, eval_fraction: float, seed: int, notes: Notes
) -> tuple[Dataset, Dataset]:
    """Return the rows to train on and the rows to evaluate on, which share none.

    The latter come from `eval_source`, else from the data set's own validation or test split, else they are held out.
    """
    parts = read(source, config=config)
    if "train" not in parts:
        raise ValueError(f"data set '{source}' has no split named train; it has {sorted(parts)}")
    train = parts["train"]
    if len(train) == 0:
        raise ValueError(f"data set '{source}' is empty")
    own = next((parts[name] for name in EVAL_SPLITS if name in parts), None)
    if eval_source is not None:
        others = read(eval_source, config=config)
        test = next((others[name] for name in (*EVAL_SPLITS, "train") if name in others), None)
        if test is None or len(test) == 0:
            raise ValueError(f"data set '{eval_source}' is empty")
    elif own is not None:
        test = own
    else:
        if not 0 < eval_fraction < 1:
            raise ValueError(f"eval_fraction must be in (0, 1), got {eval_fraction}")
        if len(train) < 2:
            raise ValueError(f"data set '{source}' must have 2 rows or more to hold some out for testing, got 1")
        held_out = train.train_test_split(test_size=max(1, int(len(train) * eval_fraction)), seed=seed)
        train, test = held_out["train"], held_out["test"]
        notes.counts[f"rows held out for testing (eval_fraction={eval_fraction})"] += len(test)
    return train, without_shared(train, test, notes)


def without_shared(train: Dataset, test: Dataset, notes: Notes) -> Dataset:
    """Return the test rows that don't occur in `train`."""
    columns = sorted(set(train.column_names) & set(test.column_names))

    def key(row: dict) -> str:
        return json.dumps([row[c] for c in columns], sort_keys=True, default=str)

    seen = {key(row) for row in train}
    keep = [i for i, row in enumerate(test) if key(row) not in seen]
    if len(keep) < len(test):
        notes.counts["test rows left out, because they are training rows too"] += len(test) - len(keep)
    if not keep:
        raise ValueError("every test row is also a training row; give another --eval_dataset")
    return test.select(keep)


def find_layout(columns: Iterable[str], named: dict[str, str | None], task: str) -> Layout:
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

    def pick(role: str, *names: str) -> str | None:
        return given.get(role) or next((n for n in names if n in columns), None)

    label = pick("label", *LABEL_COLUMNS)
    pair = (given["text"],) if "text" in given else next((p for p in TEXT_COLUMNS if set(p) <= set(columns)), None)
    if task == "classification" or (task == "auto" and label and pair and not {"messages", "output"} & given.keys()):
        if label is None:
            raise ValueError(f"classification needs a label column (--label_column); there are {', '.join(columns)}")
        if pair is None:
            raise ValueError(f"classification needs a text column (--text_column); there are {', '.join(columns)}")
        roles = {"label": label, "text": pair[0]}
        return Layout("classification", roles if len(pair) == 1 else roles | {"text2": pair[1]})
    if "text" not in given:
        if (messages := pick("messages", "messages", "conversations")) is not None:
            return Layout("messages", {"messages": messages})
        instruction = pick("instruction", "instruction", "prompt", "question")
        output = pick("output", "output", "completion", "response", "answer")
        if instruction is not None and output is not None:
            roles = {"instruction": instruction, "output": output}
            context = pick("input", "input", "context")
            return Layout("instruction", roles | ({"input": context} if context else {}))
    if pair is not None and len(pair) == 1:
        return Layout("text", {"text": pair[0]})
    raise ValueError(
        f"no known format among the columns {', '.join(columns)}: needed are messages, or instruction and output, or "
        "text, or label and a text (name others with --messages_column, --instruction_column, --output_column, …)"
    )


# --------------------------------------------------------------------------------------------------- prompting


def to_messages(row: dict, layout: Layout) -> list[dict[str, str]]:
    """Tell a row as a conversation of dicts with role and content.

    Raises:
        ValueError: a message has no role or no content, or there is no answer to learn.
    """
    if layout.kind == "instruction":
        prompt = str(row[layout.columns["instruction"]] or "")
        context = row[layout.columns["input"]] if "input" in layout.columns else None
        answer = row[layout.columns["output"]]
        if answer is None or str(answer) == "":
            return []
        user = f"{prompt}\n{context}" if context else prompt
        return [{"role": "user", "content": user}, {"role": "assistant", "content": str(answer)}]
    messages = []
    for m in row[layout.columns["messages"]] or []:
        if not isinstance(m, dict) or (not {"role", "content"} <= m.keys() and not {"from", "value"} <= m.keys()):
            raise ValueError(f"a message must have a role and a content, got {m!r}")
        role, content = (m["role"], m["content"]) if "role" in m else (m["from"], m["value"])
        role = {"human": "user", "gpt": "assistant"}.get(role, role)
        messages.append({"role": role, "content": content or ""})
    return messages if any(m["role"] == "assistant" for m in messages) else []


def prefix_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer puts before a text by itself: the bos token, or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the chat template for a tokenizer that has none; saved with the model, so that its user prompts alike."""
    return ("{{ bos_token }}" if prefix_tokens(tokenizer) else "") + PLAIN_TEMPLATE


def render(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Cut a conversation into pieces of text, each with whether the model is to write it.

    A piece is tokenized by itself, so the tokens before an answer are those the model sees when it is prompted.
    """

    def text(part: list[dict[str, str]], *, prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=prompt)

    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    spans = [(text(messages[:i], prompt=True), text(messages[: i + 1])) for i in turns]
    whole = spans[-1][1]
    if not whole.startswith(spans[-1][0]):
        raise ValueError(
            "this chat template rewrites the prompt once it has the answer; the loss can't be kept to answers"
        )
    pieces: list[tuple[str, bool]] = []
    done = 0
    for before, after in spans:
        # a template may rewrite an earlier turn (drop its thoughts): that one stays part of the prompt
        if whole.startswith(after) and after.startswith(before) and len(before) >= done:
            pieces += [(whole[done : len(before)], False), (whole[len(before) : len(after)], True)]
            done = len(after)
    return pieces


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


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer: eos, and what the chat template writes after one."""
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], tokenize=False
    )
    after = tokenizer(text[text.rindex("b") + 1 :], add_special_tokens=False)["input_ids"][:1]
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    return sorted({*ends, *(t for t in after if t in special)})


# ---------------------------------------------------------------------------------------------------- examples


def generation_examples(
    rows: Dataset,
    layout: Layout,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    answers_only: bool,
    notes: Notes,
) -> list[dict[str, list[int]]]:
    """Make examples for a language model, cut to `max_length` tokens.

    A plain text that is longer goes on in the next example; a conversation is cut, and left out when no answer is left.
    """
    examples = []
    for row in rows:
        if layout.kind == "text":
            text = row[layout.columns["text"]]
            if not text:
                notes.counts["rows without text left out"] += 1
                continue
            ids = prefix_tokens(tokenizer) + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            ids += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            if len(ids) > max_length:
                notes.counts[f"texts longer than {max_length} tokens cut into several examples"] += 1
            for start in range(0, len(ids), max_length):
                part = ids[start : start + max_length]
                if len(part) > 1:
                    examples.append({"input_ids": part, "labels": [IGNORE, *part[1:]]})
            continue
        messages = to_messages(row, layout)
        if not messages:
            notes.counts["rows without an answer left out"] += 1
            continue
        example = encode_pieces(render(messages, tokenizer), tokenizer, answers_only=answers_only)
        if len(example["input_ids"]) > max_length:
            example = {name: values[:max_length] for name, values in example.items()}
            if all(label == IGNORE for label in example["labels"]):
                notes.counts[f"examples left out, because the answer begins after {max_length} tokens"] += 1
                continue
            notes.counts[f"examples cut to {max_length} tokens"] += 1
        examples.append(example)
    return examples


def prompts(
    rows: Dataset, layout: Layout, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> list[tuple[list[int], str, int]]:
    """Return (prompt tokens, wanted answer, answer's length in tokens) of each row that fits the context whole."""
    found = []
    for row in rows:
        messages = to_messages(row, layout)
        if not messages:
            continue
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        *before, answer = render(messages[: last + 1], tokenizer)
        ids = encode_pieces(before, tokenizer, answers_only=True)["input_ids"]
        length = len(tokenizer(answer[0], add_special_tokens=False)["input_ids"])
        if len(ids) + length <= max_length:
            found.append((ids, messages[last]["content"], length))
    return found


def label_names(train: Dataset, test: Dataset, column: str) -> list[str]:
    """Return the class names in order; whole numbers keep their order and become "0", "1", …

    Raises:
        ValueError: fewer than two classes, or a class that only the test rows have.
    """
    feature = train.features[column]
    if hasattr(feature, "names"):
        return list(feature.names)
    classes = set(train[column])
    if None in classes or any(isinstance(c, (float, list)) for c in classes):
        raise ValueError(f"column '{column}' must hold whole numbers or names, got {next(iter(classes))!r}")
    if len(classes) < 2:
        raise ValueError(f"column '{column}' must hold two classes or more, got {sorted(map(str, classes))}")
    if unknown := set(test[column]) - classes:
        raise ValueError(f"class {sorted(map(str, unknown))[0]!r} of the test rows does not occur in the training rows")
    return [str(c) for c in sorted(classes)]


def classification_examples(
    rows: Dataset,
    layout: Layout,
    tokenizer: PreTrainedTokenizerBase,
    *,
    names: list[str],
    max_length: int,
    notes: Notes,
) -> list[dict[str, Any]]:
    """Make examples with the tokens of one text or a pair, and the class as the label."""
    label, feature = layout.columns["label"], rows.features[layout.columns["label"]]
    ids = {name: i for i, name in enumerate(names)}
    examples = []
    for row in rows:
        texts = [row[layout.columns[role]] or "" for role in ("text", "text2") if role in layout.columns]
        encoded = tokenizer(*texts, verbose=False)
        if len(encoded["input_ids"]) > max_length:
            encoded = tokenizer(*texts, truncation=True, max_length=max_length)
            notes.counts[f"examples cut to {max_length} tokens"] += 1
        value = row[label]
        examples.append({**encoded, "labels": value if hasattr(feature, "names") else ids[str(value)]})
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
