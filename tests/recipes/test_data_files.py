"""What people have as data is read as it stands; what can't be read is a sentence with file and row."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import finetune
from data_files import READERS, Notes, read

ROWS = [{"text": f"row {i}, “ü”", "label": i} for i in range(5)]
TABLE = [{name: str(value) for name, value in row.items()} for row in ROWS]  # a cell of a table is text
LINES = "\n".join(map(json.dumps, ROWS))


def table(mark):
    text = io.StringIO()
    writer = csv.DictWriter(text, ROWS[0], delimiter=mark)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue()


def rows_of(source, **kwargs):
    return list(read(str(source), **kwargs)["train"])


SOURCES = {  # file → content
    "list.json": json.dumps(ROWS),
    "pretty.json": json.dumps(ROWS, indent=2),
    "lines.json": LINES,
    "lines.jsonl": LINES + "\n\n",
    "upper.JSONL": LINES,
    "lines.ndjson": LINES,
    "pretty_lines.jsonl": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "with_a_mark.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "within.json": json.dumps({"version": "1.1", "data": ROWS}),
    "splits.json": json.dumps({"train": ROWS, "test": ROWS[:1]}),
    "columns.json": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}),
    "pandas.json": json.dumps({name: {str(i): row[name] for i, row in enumerate(ROWS)} for name in ROWS[0]}),
    "lines.jsonl.gz": gzip.compress(LINES.encode()),
    "lines.jsonl.bz2": bz2.compress(LINES.encode()),
    "lines.jsonl.xz": lzma.compress(LINES.encode()),
    "list.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "commas.csv": table(","),
    "semicolons.csv": table(";"),
    "tabs.csv": table("\t"),
    "bars.csv": table("|"),
    "tabs.tsv": table("\t"),
    "commas.csv.gz": gzip.compress(table(",").encode()),
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_same_rows_come_out_of_every_file(tmp_path, name):
    content = SOURCES[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert rows_of(tmp_path / name) == (TABLE if {".csv", ".tsv"} & {*Path(name).suffixes} else ROWS)


def test_the_same_rows_come_out_of_what_datasets_writes(tmp_path):
    rows = Dataset.from_list(ROWS)
    rows.to_parquet(tmp_path / "rows [1].parquet")
    rows.with_format("torch").save_to_disk(tmp_path / "saved")
    DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "dict")
    for name in ("rows [1].parquet", "saved", "dict", "saved/data-00000-of-00001.arrow"):
        assert rows_of(tmp_path / name) == ROWS, name
    assert len(read(str(tmp_path / "dict"))["test"]) == 1


def test_a_folder_is_read_by_the_names_of_its_files(tmp_path):
    parts = {
        "a/train-00000-of-00002.jsonl": ROWS[:2],
        "a/train-00001-of-00002.jsonl": ROWS[2:],
        "b/part-0.jsonl": ROWS[:3],
    }
    parts |= {"b/part-1.json": ROWS[3:], "c/train.jsonl": ROWS, "c/dev.jsonl": ROWS[:1], "c/other.jsonl": ROWS[:2]}
    for name, rows in parts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    for name in ("README.md", "train.py", "test.md", ".cache/train.jsonl"):  # none of them is data
        (tmp_path / "b" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "b" / name).write_text("words")
    for folder in ("a", "b", "c"):
        assert rows_of(tmp_path / folder) == ROWS, folder
    assert rows_of(f"{tmp_path}/b/*.json*") == ROWS
    notes = Notes()
    assert len(read(str(tmp_path / "c"), notes=notes)["validation"]) == 1
    assert notes.lines() == [f"data files of '{tmp_path}/c' whose names are of no split, not read: 1"]
    notes = Notes()
    assert rows_of(f"{tmp_path}/b/*", notes=notes) == ROWS
    assert notes.lines() == [f"files of '{tmp_path}/b/*' whose endings are of no data, not read: 3"]


@pytest.mark.parametrize(
    "cell", ["None", "NA", "null", "007", "1.0", "0.10", "true", "1e5", '"quoted"', "a,b", "x\ny", ""]
)
def test_a_cell_of_a_table_is_the_text_that_stands_there(tmp_path, cell):
    text = io.StringIO()
    csv.writer(text).writerows([("instruction", "output"), ("q", cell), ("q", "r" * 200_000)])
    (tmp_path / "a.csv").write_text(text.getvalue())
    assert rows_of(tmp_path / "a.csv")[0] == {"instruction": "q", "output": cell}


def test_a_file_may_hold_its_splits(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"train": ROWS, "val": ROWS[:2], "version": 1}))
    assert {name: len(rows) for name, rows in read(str(tmp_path / "a.json")).items()} == {"train": 5, "val": 2}


def test_a_text_file_is_read_by_paragraphs(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    assert rows_of(tmp_path / "a.txt") == [{"text": "one\ntwo"}, {"text": "three\n"}]


def test_rows_may_differ_in_columns_and_columns_in_types(tmp_path):
    rows = [{"a": 1}, {"b": [{"x": 1}]}, {"a": "one", "b": [{"y": "2"}]}, {"a": '"5"'}, {"a": "null"}, {"a": 1.5}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.jsonl").write_text('{"a": {"z": null}}')
    empty = {"a": None, "b": None}
    assert rows_of(f"{tmp_path}/*.jsonl") == [empty | row for row in rows] + [{"a": {"z": None}, "b": None}]
    assert type(rows_of(tmp_path / "a.jsonl")[0]["a"]) is int  # beside 1.5


def test_no_code_of_a_data_set_runs_whatever_stdin_says(tmp_path, monkeypatch, offline):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    code = f"open({str(tmp_path / 'ran')!r}, 'w')"
    for name in ("mine", "alone"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text(code)
    (tmp_path / "mine" / "rows.jsonl").write_text(LINES)
    assert rows_of(tmp_path / "mine") == ROWS
    for source in (tmp_path / "alone", tmp_path / "mine" / "mine.py"):
        with pytest.raises(ValueError, match="ends? in one of .json"):
            read(str(source))
    (tmp_path / "evil.pkl").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    with pytest.raises(ValueError, match="must end in one of .json"):
        read(str(tmp_path / "evil.pkl"))
    assert not (tmp_path / "ran").exists()


BROKEN = {  # file → content, what the sentence says
    **{f"empty{ending}": (b"", "is empty") for ending in READERS},
    **{f"noise{ending}": (b"\x00\xff\xfe\x81 noise", "can't be read|not UTF-8") for ending in READERS},
    **{f"noise{ending}.gz": (b"\x00\xff noise", "can't be read as") for ending in (".jsonl", ".csv", ".txt")},
    "cut.jsonl.gz": (gzip.compress(os.urandom(999))[:500], "can't be read as jsonl"),
    "null.json": (b"null", "row 1 must be an object with named values, got null"),
    "number.jsonl": (b'{"text": "a"}\n5\n', "row 2 must be an object with named values, got 5"),
    "lists.json": (b"[[1, 2]]", r"row 1 must be an object with named values, got \[1, 2\]"),
    "none.json": (b"[]", "is empty"),
    "nothing.json": (b"{}", "is empty"),
    "two.json": (
        b'{"a": [{"text": "x"}], "b": [{"text": "y"}]}',
        "holds several lists of rows, a, b, and none is named",
    ),
    "no_train.json": (b'{"train": [], "test": [{"text": "a"}]}', "is empty"),
    "no_rows.json": (b'{"train": [1], "test": [{"text": "a"}]}', "row 1 must be an object"),
    "half.jsonl": (b'{"text": "a"}\n{"text": "b\n{"text": "c"}', "line 2"),
    "comma.json": (b'[{"text": "a"},\n{"text": "b"},\n]', "line 3"),
    "latin.jsonl": ('{"text": "ü"}'.encode("latin-1"), "is not UTF-8 text: .* at byte 10"),
    "wide.csv": ("text\nü".encode("utf-16"), "is not UTF-8 text"),
    "deep.json": (b"[" * 200_000, "nested too deeply"),
    "deeper.json": (b'{"text":' * 900 + b"1" + b"}" * 900, "row 1 of .* can't be read: it is nested too deeply"),
    "huge.jsonl": (b'{"text": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
    "large.jsonl": (b'{"text": 1}\n{"text": ' + b"9" * 30 + b"}", "row 2 of .* can't be read: .* too large"),
    "half_a_letter.jsonl": (
        b'{"text": "a"}\n{"text": "\\ud800"}',
        "row 2 of .* can't be read: .* surrogates not allowed",
    ),
    "short.csv": (b"a,b\n1,2\n3", "line 3 has 1 cells, and the header 2"),
    "long.csv": (b"text\nhello, world", "line 2 has 2 cells, and the header 1"),
    "quote.csv": (b'a,b\n1,"2', "line 2: unexpected end of data"),
    "twice.csv": (b"a,a\n1,2", "columns must have different names, got a, a"),
    "header.csv": (b"a,b\n", "is empty"),
    "one.json": (b'[{"text": "a"}]', "must have 2 rows or more"),
    "prose.docx": (b"a", "must end in one of .json"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_sentence_with_its_name_and_exit_code_2(tmp_path, monkeypatch, capsys, name):
    content, sentence = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    assert_refused(tmp_path / name, tmp_path, monkeypatch, capsys, sentence)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("missing.jsonl", "does not exist"),
        ("folder", "holds no file that ends in one of"),
        ("folder.jsonl", "holds no file that ends in one of"),
        ("*.nothing", "no data file is named as"),
        ("fifo.jsonl", "is no file"),
        ("tests", "must hold train.jsonl"),
        ("saved", "can't be read as what save_to_disk writes"),
        ("name" * 999, "can't be opened|does not exist"),
        ("nul\0", "must be a file, a folder, a pattern or a name"),
    ],
)
def test_what_is_no_data_is_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys, source, sentence):
    for folder in ("folder", "folder.jsonl", "tests", "saved"):
        (tmp_path / folder).mkdir()
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "tests" / "test.jsonl").write_text(LINES)
    (tmp_path / "saved" / "dataset_dict.json").write_text("null")
    assert_refused(tmp_path / source, tmp_path, monkeypatch, capsys, sentence)


def assert_refused(source, folder, monkeypatch, capsys, sentence):
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--dataset", str(source), "--output_dir", str(folder / "out")])
    with pytest.raises(SystemExit) as stop:
        finetune.main()
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2
    assert said.startswith("finetune.py: error: ")
    assert "Traceback" not in said
    with pytest.raises(ValueError, match=sentence):
        raise ValueError(said)
    assert source.name.replace("\0", "\\x00")[:20] in said


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.lists(ANY, max_size=4), cut=st.integers(0, 40), ending=st.sampled_from(sorted(READERS)))
def test_whatever_a_file_holds_is_rows_or_a_sentence_with_its_name(tmp_path, content, cut, ending):
    path = tmp_path / f"any{ending}"
    path.write_bytes("\n".join(json.dumps(value) for value in content).encode()[cut // 20 * cut :])
    refused = ""
    try:
        assert all(isinstance(row, dict) for row in read(str(path))["train"])
    except ValueError as error:
        refused = str(error)
    assert not refused or (path.name in refused and "\n" not in refused)
