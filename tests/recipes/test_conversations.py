"""Every answer of every usual format is learnt as it is given; what is not learnt is said."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import finetune
from chat_templates import plain_template
from conversations import ROLES
from data_files import Notes, read
from text_data import IGNORE, find_layout, first_example, generation_examples

CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "tells it", "parameters": {}}}]
TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASKED = {"role": "user", "content": "who?"}
ANSWERED = {"role": "assistant", "content": "me."}


def learn(rows, tokenizer, **kwargs):
    """Return (what bears loss, all text) of every example, and the notes."""
    notes = Notes()
    rows = rows if isinstance(rows, Dataset) else Dataset.from_list(rows, on_mixed_types="use_json")
    row_format = find_layout(rows.column_names, kwargs, "auto")
    found = generation_examples(rows, row_format, tokenizer, max_length=100_000, answers_only=True, notes=notes)
    learnt = [tokenizer.decode([i for i in e["labels"] if i != IGNORE]) for e in found]
    return learnt, [tokenizer.decode(e["input_ids"]) for e in found], notes


FORMATS = {  # name → row, what is learnt between the ends, what stands before it
    "openai": ({"messages": [ASKED, ANSWERED]}, ["me."], "who?"),
    "openai as json": ({"messages": json.dumps([ASKED, ANSWERED])}, ["me."], "who?"),
    "parts": (
        {"messages": [ASKED | {"content": [{"type": "text", "text": "wh"}, {"type": "text", "text": "o?"}]}, ANSWERED]},
        ["me."],
        "who?",
    ),
    "parts of an answer": (
        {"prompt": "who?", "completion": [{"type": "text", "text": "m"}, {"type": "text", "text": "e."}]},
        ["me."],
        "who?",
    ),
    "weights": (
        {"messages": [ASKED, ANSWERED | {"content": "no.", "weight": 0}, ASKED, ANSWERED | {"weight": 1}]},
        ["me."],
        "no.",
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "who?"}, {"from": "gpt", "value": "me."}], "system": "S"},
        ["me."],
        "S\n<|user|>\nwho?",
    ),
    "opened by the assistant": ({"messages": [ANSWERED | {"content": "hi"}, ASKED, ANSWERED]}, ["hi", "me."], "who?"),
    "trl text": ({"prompt": "who?", "completion": "me."}, ["me."], "who?"),
    "trl messages": ({"prompt": [ASKED], "completion": [ANSWERED]}, ["me."], "who?"),
    "trl messages as json": ({"prompt": json.dumps([ASKED]), "completion": json.dumps([ANSWERED])}, ["me."], "who?"),
    "trl message": ({"prompt": ASKED, "completion": ANSWERED}, ["me."], "who?"),
    "trl prompt of turns": (
        {"prompt": [ASKED, ANSWERED | {"content": "no."}, ASKED], "completion": [ANSWERED]},
        ["me."],
        "no.",
    ),
    "alpaca": (
        {"instruction": "who?", "input": "x", "output": "me.", "system": "S", "history": [["a", "b"], ["c", "d"]]},
        ["b", "d", "me."],
        "<|system|>\nS\n<|user|>\na",
    ),
    "history as json": (
        {"instruction": "who?", "output": "me.", "history": '[["a", "b"]]', "system": None},
        ["b", "me."],
        "<|user|>\na",
    ),
    "squad": ({"question": "who?", "answer": "me.", "context": "C"}, ["me."], "who?\nC"),
    "number": ({"prompt": "who?", "completion": 5}, ["5"], "who?"),
    "truth": ({"prompt": "who?", "completion": True}, ["true"], "who?"),
    "list": ({"prompt": "who?", "completion": ["ü", 1]}, ['["ü", 1]'], "who?"),
    "object": ({"prompt": "who?", "completion": {"a": None}}, ['{"a": null}'], "who?"),
    "text that looks like json": ({"prompt": "who?", "completion": '[{"a":1}]'}, ['[{"a":1}]'], "who?"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_learnt_as_it_is_given(tokenizer, name):
    row, answers, before = FORMATS[name]
    learnt, texts, _ = learn(
        Dataset.from_list([row], on_mixed_types=None if name == "sharegpt" else "use_json"), tokenizer
    )
    assert [part.strip("\n") for part in learnt[0].split("<|eos|>")] == [*answers, ""]
    assert before in texts[0]


@pytest.mark.parametrize("conversation", ["openai", "sharegpt", "older", "as json"])
def test_calls_of_tools_are_learnt_where_the_template_writes_them(tokenizer, conversation):
    call = {"name": "weather", "arguments": {"city": "Rome"}}
    asked = {
        "openai": {"role": "assistant", "content": None, "tool_calls": [CALL]},
        "sharegpt": {"from": "function_call", "value": json.dumps(call)},
        "older": {"role": "assistant", "content": None, "function_call": CALL["function"]},
        "as json": {"role": "assistant", "content": "", "tool_calls": json.dumps([call])},
    }[conversation]
    told = {"from": "observation", "value": "21"} if conversation == "sharegpt" else {"role": "tool", "content": "21"}
    row = {"messages": [ASKED, asked, told, ANSWERED], "tools": json.dumps(TOOLS)}
    plain = learn([row], tokenizer)
    assert not plain[0]
    assert "the template does not write tool calls" in plain[2].lines()[0]
    tokenizer.chat_template = TOOL_TEMPLATE
    learnt, texts, notes = learn([row], tokenizer)
    assert learnt == ['{"name": "weather", "arguments": {"city": "Rome"}}</>me.</>']
    assert texts[0].startswith(json.dumps(TOOLS)[:20])
    assert "<tool>21</>" in texts[0]
    assert not notes.lines()


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "user"}]}, "a message must have a role and a content, got"),
        ({"messages": [{"content": "x"}, ANSWERED]}, "a message must have a role and a content, got"),
        ({"messages": ["x"]}, "a message must have a role and a content, got 'x'"),
        (
            {"messages": [ASKED | {"role": "Narrator"}, ANSWERED]},
            "the role of a message must be one of .* got .*Narrator",
        ),
        ({"messages": "who? me."}, "messages must be a list of dicts with role and content, got 'who"),
        (
            {"messages": [ASKED | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "parts of the type text",
        ),
        (
            {"messages": [ASKED | {"tool_calls": [CALL]}, ANSWERED]},
            "tool_calls must be a list, in a message of the assist",
        ),
        ({"messages": [ANSWERED | {"tool_calls": [{"function": {}}]}]}, "a tool call must have a function with a name"),
        ({"messages": [ASKED, ANSWERED], "tools": [{"function": "weather"}]}, "tools must be a list of dicts"),
        ({"prompt": "q", "completion": "a", "history": ["x"]}, "a history must be a list of"),
        ({"messages": "[" * 200_000}, r"messages must be a list of dicts with role and content, got '\[\["),
        ({"messages": [ASKED, ANSWERED], "tools": "[" * 999 + "]" * 999}, r"tools must be a list of dicts, got '\[\["),
        ({"prompt": "q", "completion": [{"type": "image", "url": "x"}]}, "parts of the type text"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "chosen and rejected hold preferences"),
    ],
)
def test_a_broken_row_is_refused_with_its_place(tmp_path, tokenizer, row, said):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [{**row}, {**row}])))
    notes = Notes()
    rows = read(str(tmp_path / "rows.jsonl"), notes=notes)["train"].select([1])
    with pytest.raises(ValueError, match=said) as refusal:
        generation_examples(
            rows,
            find_layout(rows.column_names, {}, "auto"),
            tokenizer,
            max_length=99,
            answers_only=True,
            notes=notes,
        )
    assert "chosen" in row or str(refusal.value).startswith(f"row 1 of '{tmp_path}/rows.jsonl': ")  # the first like it


@pytest.mark.parametrize(
    ("row", "note"),
    [
        ({"messages": None}, "rows without an answer left out: 1"),
        ({"messages": []}, "rows without an answer left out: 1"),
        ({"messages": [ASKED]}, "rows without an answer left out: 1"),
        ({"messages": [ASKED, ANSWERED | {"content": None}]}, "rows without an answer left out: 1"),
        ({"messages": [ASKED, ANSWERED, ASKED, ANSWERED | {"content": ""}]}, "empty answers, which bear no loss: 1"),
        ({"messages": [ASKED, ANSWERED, ASKED]}, "messages after the last answer left out: 1"),
        (
            {"messages": [ASKED, ANSWERED | {"reasoning_content": "because"}]},
            "values of 'reasoning_content' in messages",
        ),
        ({"messages": [ASKED, ANSWERED], "tools": TOOLS}, "rows whose tools the chat template does not write: 1"),
        ({"messages": [ASKED, ANSWERED], "source": "x", "id": 7}, "rows of which source, id is not used: 1"),
        ({"messages": [ASKED | {"role": "system"}, ASKED, ANSWERED], "system": "S"}, "system columns not used"),
        ({"prompt": "q", "completion": None}, "rows without an answer left out: 1"),
        ({"prompt": "q", "completion": ""}, "rows without an answer left out: 1"),
        ({"prompt": None, "completion": "a"}, "answers without a question: 1"),
        ({"prompt": "q", "completion": {"a": 1}}, "values that are lists or objects, taken as JSON: 1"),
        (
            {"prompt": [ASKED, ANSWERED, ASKED], "completion": [ANSWERED]},
            "answers within prompts, which bear no loss: 1",
        ),
        ({"text": None}, "rows without text left out: 1"),
    ],
)
def test_what_is_not_learnt_is_counted(tokenizer, row, note):
    assert note in "\n".join(learn([row], tokenizer)[2].lines())


TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=6)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "text", "role", "a"]), inner),
    max_leaves=4,
)
MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from([*ROLES, "Narrator", None, 5]),
        "from": st.sampled_from(["human", "gpt", "system"]),
        "content": TEXT | VALUE,
        "value": TEXT,
        "weight": st.sampled_from([0, 1, 0.0, None, "0"]),
        "tool_calls": st.none() | st.just([CALL]) | VALUE,
        "name": TEXT,
    },
)
GOOD = st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from([*ROLES]), TEXT)
MESSAGES = st.lists(GOOD, max_size=5) | st.lists(GOOD | MESSAGE | VALUE, max_size=4) | VALUE
ROW = st.fixed_dictionaries(
    {"messages": MESSAGES}, optional={"system": TEXT | VALUE, "tools": st.just(TOOLS) | VALUE}
) | st.fixed_dictionaries(
    {"prompt": TEXT | MESSAGES, "completion": TEXT | MESSAGES},
    optional={"input": TEXT | VALUE, "system": VALUE, "history": VALUE | st.lists(st.tuples(TEXT, TEXT), max_size=2)},
)


def answers_of(row):
    """Return the answers that are plainly such: texts of the assistant."""
    messages = row.get("messages", row.get("completion"))
    if isinstance(messages, str) and "messages" not in row:
        return [messages]
    messages = messages if isinstance(messages, list) else []
    dicts = [m for m in messages if isinstance(m, dict) and ROLES.get(str(m.get("role"))) == "assistant"]
    return [m["content"] for m in dicts if isinstance(m.get("content"), str) and m.get("weight", 1) not in (0, "0")]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=ROW, template=st.sampled_from(["own", "plain", TOOL_TEMPLATE]))
@example(row={"messages": [ANSWERED | {"content": "a"}, ASKED]}, template="own")
def test_every_answer_is_learnt_or_refused_or_counted(tmp_path, tokenizer, row, template):
    own = tokenizer.chat_template
    (tmp_path / "row.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row))
    if template != "own":
        tokenizer.chat_template = plain_template(tokenizer) if template == "plain" else template
    try:
        learnt, _, notes = learn(read(str(tmp_path / "row.jsonl"))["train"], tokenizer)
    except ValueError as error:
        learnt, said = [], str(error)
    else:
        said = " ".join(notes.lines())
    finally:
        tokenizer.chat_template = own
    assert "\n" not in said
    for answer in filter(None, answers_of(row)):
        assert said or any(answer in text for text in learnt), (answer, learnt)
    assert said or (learnt and all(text.removesuffix("<|eos|>") for text in learnt))  # never nothing, never silence


TRL = importlib.util.find_spec("trl")
TEMPLATES = sorted(Path(TRL.origin).parent.glob("chat_templates/*.jinja")) if TRL else []


@pytest.mark.skipif(not TEMPLATES, reason="the templates of well-known models come with trl")
@pytest.mark.parametrize("thought", ["", "<think>\nhm\n</think>\n\n"])
def test_templates_of_well_known_models_bear_loss_on_every_answer(tokenizer, thought):
    taught = 0
    messages = [
        {"role": role, "content": f"{thought if role == 'assistant' else ''}{role} {i}"}
        for i in range(3)
        for role in ("user", "assistant")
    ]
    for path in TEMPLATES:
        tokenizer.chat_template = path.read_text()
        learnt, texts, notes = learn([{"messages": messages}], tokenizer)
        said = " ".join(notes.lines())
        assert learnt or "the chat template refuses" in said, path.name
        taught += bool(learnt)
        for message in messages:
            is_answer = message["role"] == "assistant"
            text = message["content"].removeprefix(thought) if is_answer else message["content"]
            assert sum(part.count(text) for part in learnt) == (is_answer and bool(learnt)), (path.name, learnt)
            if learnt and "as they are" not in said:
                assert message["content"] in "".join(texts), path.name
    assert taught > 0.8 * len(TEMPLATES)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x", "no system"),
        ("{{ messages[0].content + 5 }}", "can only concatenate"),
        ("{{ messages[0].missing.key }}", "missing"),
        ("nothing of it", "the template does not write the answer as it is"),
        ("{% for m in messages %}", "chat template can't be parsed: line 1"),
        ("{{ messages | shuffle }}", "chat template can't be parsed: line 1: No filter named"),
    ],
)
def test_a_template_that_refuses_every_row_is_a_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys, template, said):
    import shutil

    from arguments import TINY_LLAMA

    shutil.copytree(TINY_LLAMA, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    rows = [{"messages": [ASKED | {"role": "system"}, ASKED, ANSWERED | {"content": f"{i}"}]} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    paths = {"--model_name_or_path": "model", "--dataset": "rows.jsonl", "--output_dir": "out"}
    monkeypatch.setattr(
        sys, "argv", ["finetune.py", *(word for n, p in paths.items() for word in (n, f"{tmp_path}/{p}"))]
    )
    with pytest.raises(SystemExit) as stop:
        finetune.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("finetune.py: error: ")
    assert said in error


def test_the_first_example_is_shown_with_what_bears_loss(tokenizer, monkeypatch):
    rows = Dataset.from_list([{"prompt": "x" * 5000, "completion": "a “b”"}])
    made = generation_examples(
        rows,
        find_layout(rows.column_names, {}, "auto"),
        tokenizer,
        max_length=9999,
        answers_only=True,
        notes=Notes(),
    )
    shown = first_example(made[0], tokenizer)
    assert len(shown) < 1500
    assert shown.endswith("x\n<|assistant|>\n>>>a “b”<|eos|><<<")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", type("Ascii", (), {"encoding": "ascii"})())
        assert first_example(made[0], tokenizer).endswith(r">>>a \u201cb\u201d<|eos|><<<")
    assert first_example({"input_ids": made[0]["input_ids"][-8:], "labels": 1}, tokenizer, ["no", "yes"]).endswith(
        "\n>>>yes<<<"
    )
