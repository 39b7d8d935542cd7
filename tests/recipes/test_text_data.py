"""Formats, prompts, the loss mask and packing."""

import csv
import json

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from text_data import (
    IGNORE,
    Collator,
    Notes,
    RowFormat,
    classification_examples,
    encode_pieces,
    end_of_turn,
    find_layout,
    generation_examples,
    label_names,
    layouts,
    pack,
    packs_are_isolated,
    plain_template,
    prompts,
    render,
    split,
    to_messages,
)

NOTHING = dict.fromkeys(("instruction", "input", "output", "messages", "text", "label"))
INSTRUCTION = RowFormat("instruction", {"instruction": "instruction", "input": "input", "output": "output"})
ROWS = [
    {"instruction": "Say it backwards.", "input": "abc", "output": "cba"},
    {"instruction": "Say nothing else.", "input": "", "output": "ok"},
]


def examples_of(rows, row_format, tokenizer, *, max_length=200, answers_only=True, notes=None):
    return generation_examples(
        rows if isinstance(rows, Dataset) else Dataset.from_list(rows),
        row_format,
        tokenizer,
        max_length=max_length,
        answers_only=answers_only,
        notes=notes or Notes(),
    )


def written(path, rows):
    """Write rows in the format of the path's ending."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(r) for r in rows))
    elif path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    return str(path)


def test_a_folder_gives_its_files_as_splits(tmp_path):
    for name, count in (("train", 3), ("dev", 2)):
        written(tmp_path / f"{name}.tsv", [{"sentence": f"{name} {i}", "label": i} for i in range(count)])
    train, test = split(str(tmp_path), None, config=None, eval_fraction=0.5, seed=0, notes=Notes())
    assert (len(train), len(test)) == (3, 2)


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (["instruction", "input", "output"], "instruction"),
        (["instruction", "output", "answer"], "instruction"),
        (["prompt", "completion"], "instruction"),
        (["messages", "source"], "messages"),
        (["conversations"], "messages"),
        (["text"], "text"),
        (["text", "label"], "classification"),
        (["sentence", "label"], "classification"),
        (["index", "sentence1", "sentence2", "label"], "classification"),
    ],
)
def test_the_format_is_seen_from_the_columns(columns, kind):
    assert find_layout(columns, NOTHING, "auto").kind == kind


def test_the_user_decides_over_what_is_seen():
    assert find_layout(["text", "label"], NOTHING, "generation").kind == "text"
    named = NOTHING | {"instruction": "q", "output": "a"}
    assert find_layout(["q", "a"], named, "auto").columns == {"instruction": "q", "output": "a"}
    for named_output in ({"output": "chosen"}, {"output": "completion"}):
        assert find_layout(["prompt", "chosen", "rejected", "completion", "label"], named_output, "auto")
    assert find_layout(["q", "a", "messages"], named, "auto").kind == "instruction"
    assert find_layout(["body", "stars"], NOTHING | {"text": "body", "label": "stars"}, "auto").kind == "classification"


@pytest.mark.parametrize(
    ("columns", "named", "task", "sentence"),
    [
        (["text"], {"output": "reply"}, "auto", "no column 'reply'; the data set has text"),
        (["foo", "bar"], {}, "auto", "no known format among the columns foo, bar"),
        (["text"], {}, "classification", "needs a label column"),
        (["label"], {}, "classification", "needs a text column"),
        (["prompt", "chosen", "rejected"], {}, "auto", "chosen and rejected hold preferences"),
        (["prompt", "completion", "label"], {}, "auto", "prompt, completion and label hold preferences"),
        (["q", "text"], {"instruction": "q"}, "auto", "need an output .--output_column. too; there are q, text"),
        (["a", "text"], {"output": "a"}, "auto", "need an instruction .--instruction_column. too"),
    ],
)
def test_unknown_columns_are_refused_with_a_sentence(columns, named, task, sentence):
    with pytest.raises(ValueError, match=sentence):
        find_layout(columns, NOTHING | named, task)


@pytest.mark.parametrize("template", ["own", "plain"])
def test_loss_is_on_the_answer_and_its_end_alone(tokenizer, template):
    if template == "plain":
        tokenizer.chat_template = plain_template(tokenizer)
    for row, example in zip(ROWS, examples_of(ROWS, INSTRUCTION, tokenizer), strict=True):
        labels = [i for i in example["labels"] if i != IGNORE]
        assert tokenizer.decode(labels) == row["output"] + tokenizer.eos_token
        kept = [i for i, label in enumerate(example["labels"]) if label != IGNORE]
        assert kept == list(range(len(example["labels"]) - len(kept), len(example["labels"])))
        assert [example["input_ids"][i] for i in kept] == labels
        text = tokenizer.decode(example["input_ids"])
        assert row["instruction"] in text
        assert row["input"] in text


def test_loss_on_everything_on_request_but_never_on_the_first_token(tokenizer):
    (example, _) = examples_of(ROWS, INSTRUCTION, tokenizer, answers_only=False)
    assert example["labels"] == [IGNORE, *example["input_ids"][1:]]


def test_every_answer_of_a_conversation_bears_loss_and_no_question_does(tokenizer):
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "second"},
    ]
    (example,) = examples_of([{"messages": messages}], RowFormat("messages", {"messages": "messages"}), tokenizer)
    assert tokenizer.decode([i for i in example["labels"] if i != IGNORE]) == "first<|eos|>second<|eos|>"
    assert tokenizer.decode(example["input_ids"]) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_template_that_rewrites_earlier_turns_learns_each_in_an_example_of_its_own(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}[forgotten]"
        "{% else %}<{{ m['role'] }}>{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    notes = Notes()
    first, second = render([{"role": r, "content": c} for r, c in turns], tokenizer, notes=notes)
    assert first == [("<user>a<assistant>", False), ("b", True)]
    assert second == [("<user>a[forgotten]<user>c<assistant>", False), ("d", True)]
    assert notes.lines() == ["answers that the chat template changes later on, learnt in examples of their own: 1"]


def test_an_answer_that_stays_as_it_is_is_learnt_once(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role[0] }}>{{ m.content if loop.last else m.content.split(')')[-1] }}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    turns = [("user", "q"), ("assistant", "one"), ("user", "r"), ("assistant", "(t)two"), ("user", "s")]
    messages = [{"role": r, "content": c} for r, c in [*turns, ("assistant", "three")]]
    first, second = render(messages, tokenizer)
    assert first == [("<u>q<a>", False), ("one", False), ("<u>r<a>", False), ("(t)two", True)]
    assert second == [("<u>q<a>", False), ("one", True), ("<u>r<a>two<u>s<a>", False), ("three", True)]


def test_sharegpt_names_are_understood():
    row = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}
    assert to_messages(row, RowFormat("messages", {"messages": "conversations"})) == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
    ]


def test_a_message_without_content_is_refused_with_a_sentence():
    with pytest.raises(ValueError, match="a message must have a role and a content, got"):
        to_messages({"m": [{"role": "user"}]}, RowFormat("messages", {"messages": "m"}))


def test_what_the_model_is_prompted_with_is_what_it_saw_before_the_answer(tokenizer):
    rows = Dataset.from_list(ROWS)
    found = prompts(rows, INSTRUCTION, tokenizer, max_length=200)
    for (ids, reference, length), example in zip(found, examples_of(ROWS, INSTRUCTION, tokenizer), strict=True):
        assert example["input_ids"][: len(ids)] == ids
        assert all(label == IGNORE for label in example["labels"][: len(ids)])
        assert length == len(example["input_ids"]) - len(ids)
        assert tokenizer.decode(example["input_ids"][len(ids) :], skip_special_tokens=True) == reference


def test_the_wanted_answer_is_what_the_model_would_generate(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ '(thought)' if m.role == 'assistant' }}{{ m.content }}<|eos|>after"
        "{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    ((_, wanted, length),) = prompts(Dataset.from_list(ROWS[:1]), INSTRUCTION, tokenizer, max_length=200)
    assert wanted == "(thought)cba"
    assert length == len("(thought)cba") + len("after") + 1


def test_what_is_not_used_is_not_opened(tokenizer):
    rows = Dataset.from_list([row | {"picture": {"bytes": b"no picture", "path": None}} for row in ROWS])
    rows = rows.cast_column("picture", Image())
    notes = Notes()
    assert len(examples_of(rows, INSTRUCTION, tokenizer, notes=notes)) == len(ROWS)
    assert notes.lines() == ["rows of which picture is not used: 2"]


def test_generation_stops_where_an_answer_ends(tokenizer):
    assert end_of_turn(tokenizer) == [tokenizer.eos_token_id]


def test_long_examples_are_cut_and_counted_and_answers_cut_away_leave_no_example(tokenizer):
    rows = [
        {"instruction": "x" * 10, "input": "", "output": "y"},
        {"instruction": "x" * 10, "input": "", "output": "y" * 100},
        {"instruction": "x" * 100, "input": "", "output": "y"},
        {"instruction": "x", "input": "", "output": ""},
    ]
    notes = Notes()
    examples = examples_of(rows, INSTRUCTION, tokenizer, max_length=50, notes=notes)
    assert [len(e["input_ids"]) for e in examples] == [18, 50]
    assert notes.lines() == [
        "examples cut to 50 tokens: 1",
        "examples left out, because the answer begins after 50 tokens: 1",
        "rows without an answer left out: 1",
    ]


def test_a_long_text_goes_on_in_the_next_example_and_no_token_is_lost(tokenizer):
    notes = Notes()
    text = "".join(chr(97 + i % 26) for i in range(70))
    examples = examples_of([{"text": text}], RowFormat("text", {"text": "text"}), tokenizer, max_length=32, notes=notes)
    assert tokenizer.decode([i for e in examples for i in e["input_ids"]]) == text + tokenizer.eos_token
    assert all(len(e["input_ids"]) <= 32 for e in examples)
    assert notes.lines() == ["texts longer than 32 tokens cut into several examples: 1"]


def test_held_out_rows_are_not_training_rows_even_when_rows_repeat(tmp_path):
    path = written(tmp_path / "rows.json", [{"text": f"row {max(i, 10)}"} for i in range(60)])
    notes = Notes()
    train, test = split(path, None, config=None, eval_fraction=0.3, seed=0, notes=notes)
    assert not set(train["text"]) & set(test["text"])
    assert notes.counts["test rows left out, because they are training rows too"] == 18 - len(test) > 0


def test_test_rows_that_are_all_training_rows_are_refused(tmp_path):
    path = written(tmp_path / "rows.json", [{"text": "a"}, {"text": "a"}])
    with pytest.raises(ValueError, match="every test row is also a training row"):
        split(path, path, config=None, eval_fraction=0.1, seed=0, notes=Notes())


def test_class_names_become_numbers_in_order(tokenizer):
    train = Dataset.from_list(
        [{"text": "a", "label": "no"}, {"text": "b", "label": "maybe"}, {"text": "c", "label": "no"}]
    )
    row_format = RowFormat("classification", {"text": "text", "label": "label"})
    names = label_names(train, train, "label")
    examples = classification_examples(train, row_format, tokenizer, names=names, max_length=8, notes=Notes())
    assert names == ["maybe", "no"]
    assert [e["labels"] for e in examples] == [1, 0, 1]


def test_an_unseen_class_or_a_single_class_is_refused():
    one, two = Dataset.from_list([{"label": 0}, {"label": 1}]), Dataset.from_list([{"label": 2}])
    with pytest.raises(ValueError, match="class '?2'? of the test rows does not occur"):
        label_names(one, two, "label")
    with pytest.raises(ValueError, match="two classes or more"):
        label_names(two, two, "label")


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([5, 0, 2, 0], ["0", "2", "5"], [2, 0, 1, 0]),
        (["10", "9", "10"], ["9", "10"], [1, 0, 1]),
        ([1.0, None, -1.0], ["-1", "1"], [1, 0]),
        ([float("nan"), 0.0, 3.0], ["0", "3"], [0, 1]),
        ([True, False], ["False", "True"], [1, 0]),
        (["yes", "", None, "no"], ["no", "yes"], [1, 0]),
        ([1, "b", None, "1"], ["1", "b"], [0, 1, 0]),
    ],
)
def test_classes_may_have_gaps_and_rows_without_one_are_counted(tokenizer, labels, names, numbers):
    rows = Dataset.from_list([{"text": "a", "label": label} for label in labels], on_mixed_types="use_json")
    row_format, notes = RowFormat("classification", {"text": "text", "label": "label"}), Notes()
    assert label_names(rows, rows, "label") == names
    found = classification_examples(rows, row_format, tokenizer, names=names, max_length=8, notes=notes)
    assert [e["labels"] for e in found] == numbers
    assert notes.counts["rows without a label left out"] == len(labels) - len(numbers)


def test_a_label_of_the_hub_that_is_not_told_is_left_out(tokenizer):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    rows = Dataset.from_dict({"text": ["a", "b", None], "label": [1, -1, 0]}, features=features)
    notes = Notes()
    row_format = RowFormat("classification", {"text": "text", "label": "label"})
    found = classification_examples(rows, row_format, tokenizer, names=["no", "yes"], max_length=8, notes=notes)
    assert [e["labels"] for e in found] == [1]
    assert notes.lines() == ["rows without a label left out: 1", "rows without a text left out: 1"]


@pytest.mark.parametrize("labels", [[0.5, 1.0], [[0], [1]], [{"a": 1}, {"a": 2}], [None, None], ["a", "a"], [["a"], 1]])
def test_what_is_no_class_is_refused_with_the_column_and_the_value(labels):
    rows = Dataset.from_list([{"label": label} for label in labels], on_mixed_types="use_json")
    with pytest.raises(ValueError, match="column 'label' must hold (whole numbers or names|two classes or more), got"):
        label_names(rows, rows, "label")


CELL = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "a", "b", "1"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "text", "a"]), inner, max_size=2)
    ),
    max_leaves=3,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.fixed_dictionaries({"text": CELL, "label": CELL}), min_size=2, max_size=6)
    | st.lists(
        st.fixed_dictionaries({"text": CELL, "label": st.sampled_from([0, 2, 5.0, "a"])}), min_size=2, max_size=6
    ),
)
def test_whatever_cells_hold_is_classes_or_a_sentence_or_counted(tmp_path, tokenizer, rows):
    path, notes = written(tmp_path / "rows.jsonl", rows), Notes()
    try:
        train, test = split(path, None, config=None, eval_fraction=0.5, seed=0, notes=notes)
        row_format = find_layout(train.column_names, {}, "auto")
        names = label_names(train, test, "label")
        common = {"names": names, "max_length": 99, "notes": notes}
        found = [e for part in (train, test) for e in classification_examples(part, row_format, tokenizer, **common)]
    except ValueError as error:
        said = str(error)
        found = []
    else:
        said = ""
        left_out = sum(count for what, count in notes.counts.items() if "left out" in what)
        assert len(found) + left_out == len(rows)
    assert "\n" not in said
    assert said or all(0 <= e["labels"] < len(names) for e in found)


ALPACA = [{"instruction": f"say {i}", "output": str(i)} for i in range(4)]
OPENAI = [[{"role": "user", "content": f"say {i}!"}, {"role": "assistant", "content": str(i)}] for i in range(4)]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (ALPACA, [{"messages": turns} for turns in OPENAI]),
        (ALPACA, [{"prompt": "say 9", "completion": "9", "instruction": None}]),
        ([row | {"source": "x"} for row in ALPACA], [{"question": "say 9", "answer": "9", "source": "x"}]),
        (
            [{"text": f"t{i}", "label": i % 2} for i in range(4)],
            [{"sentence": f"s{i}", "label": i % 2} for i in range(4)],
        ),
    ],
)
def test_test_rows_may_have_columns_of_other_names(tmp_path, train, test):
    paths = [written(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", train), ("b", test))]
    found = split(*paths, config=None, eval_fraction=0.1, seed=0, notes=Notes())
    assert [len(part) for part in found] == [len(train), len(test)]
    own, other = layouts(*found, {}, "auto")
    assert own.columns != other.columns


@pytest.mark.parametrize(
    ("test", "sentence"),
    [
        ([{"body": "x"}], "the test rows can't be used: no known format among the columns body"),
        ([{"text": "x", "label": 1}], "the test rows must be of the kind of the training rows, instruction, got class"),
    ],
)
def test_test_rows_of_no_use_are_refused_for_the_true_reason(tmp_path, test, sentence):
    paths = [written(tmp_path / f"{name}.jsonl", rows) for name, rows in (("a", ALPACA), ("b", test))]
    with pytest.raises(ValueError, match=sentence):
        split(*paths, config=None, eval_fraction=0.1, seed=0, notes=Notes())


def test_a_row_that_differs_in_its_number_alone_is_the_same_row(tmp_path):
    paths = [
        written(tmp_path / f"{n}.jsonl", [row | {"id": f"{n}{i}"} for i, row in enumerate(ALPACA[:k])])
        for n, k in (("a", 4), ("b", 2))
    ]
    with pytest.raises(ValueError, match="every test row is also a training row"):
        split(*paths, config=None, eval_fraction=0.1, seed=0, notes=Notes())


@pytest.mark.parametrize("row", [{"text": None}, {"messages": []}, {"text": "", "label": 1}])
def test_empty_rows_are_no_training_rows_too(tmp_path, row):
    path = written(tmp_path / "rows.jsonl", [row] * 10)
    assert len(split(path, None, config=None, eval_fraction=0.3, seed=0, notes=Notes())[1]) == 3


def test_splits_that_are_not_used_are_named(tmp_path):
    for name in ("train", "test", "validation"):
        written(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(3)])
    notes = Notes()
    _, test = split(str(tmp_path), None, config=None, eval_fraction=0.1, seed=0, notes=notes)
    assert test["text"][0] == "validation 0"
    assert notes.lines() == ["rows of the split test, which is not used: 3"]


def small_llama(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, use_cache=False, **sizes)
    return LlamaForCausalLM(config).eval()


def test_packed_examples_see_only_themselves(tokenizer):
    examples = examples_of([*ROWS, ROWS[0] | {"input": "something longer"}], INSTRUCTION, tokenizer)
    packs = pack(examples, max_length=128)
    assert len(packs) < len(examples)
    batch = Collator(0)(packs)
    model = small_llama(tokenizer)
    with torch.no_grad():
        joined = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        alone = [model(input_ids=torch.tensor([e["input_ids"]])).logits[0] for e in examples]
    flat = [joined[i, : len(p["input_ids"])] for i, p in enumerate(packs)]
    torch.testing.assert_close(torch.cat(flat), torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_model_that_mixes_packed_examples_is_found_out(tokenizer):
    model = small_llama(tokenizer)
    assert packs_are_isolated(model, len(tokenizer))
    forward = model.forward
    model.forward = lambda position_ids, **kwargs: forward(**kwargs)  # as a model that knows no packing
    assert not packs_are_isolated(model, len(tokenizer))


def test_packs_have_the_loss_of_their_examples(tokenizer):
    examples = examples_of(ROWS, INSTRUCTION, tokenizer)
    model = small_llama(tokenizer)
    with torch.no_grad():
        packed = model(**Collator(0)(pack(examples, max_length=200))).loss
        padded = model(**Collator(0)(examples)).loss
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-6)


def test_padding_bears_no_loss_and_no_attention(tokenizer):
    batch = Collator(7)(examples_of(ROWS, INSTRUCTION, tokenizer))
    outside = batch["attention_mask"] == 0
    assert outside.any()
    assert (batch["labels"][outside] == IGNORE).all()
    assert (batch["input_ids"][outside] == 7).all()


def test_pieces_are_tokenized_one_by_one(tokenizer):
    example = encode_pieces([("ab", False), ("cd", True)], tokenizer, answers_only=True)
    assert tokenizer.decode(example["input_ids"]) == "abcd"
    assert example["labels"][:2] == [IGNORE, IGNORE]


def test_a_tokenizer_with_a_bos_token_of_its_own_keeps_it_in_the_plain_prompt(shared_data):
    from transformers import AutoTokenizer

    stories = AutoTokenizer.from_pretrained(shared_data / "stories260k")
    stories.chat_template = plain_template(stories)
    (example, _) = examples_of(ROWS, INSTRUCTION, stories)
    assert example["input_ids"][0] == stories.bos_token_id
    assert example["input_ids"].count(stories.bos_token_id) == 1
    assert example["labels"][-1] == stories.eos_token_id
