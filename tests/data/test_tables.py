"""Rows of text files, in each form, and what is wrong with them."""

import json

import pytest

from jaxbrewer.data.tables import FORMS, column, form_of, read_rows
from jaxbrewer.files import UnreadableFileError


def write(path, text):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


GIVEN = {
    "a.csv": ('text,label\n"one, two",x\r\n\n"say ""hi""\nthere",y\n', 2, "one, two"),
    "a.tsv": ('\ufefftext\tlabel\nHe said "no\tx\n', 1, 'He said "no'),
    "a.jsonl": ('{"text": "ä"}\n\n{"text": "b\u2028c"}\n', 2, "ä"),
    "a.json": ('[{"text": "t"}]', 1, "t"),
    "a.txt": ("first\n\n second \n", 2, "first"),
}


@pytest.mark.parametrize("name", GIVEN)
def test_each_form_gives_its_rows(name, tmp_path):
    content, count, first = GIVEN[name]
    rows = read_rows(write(tmp_path / name, content))
    assert len(rows) == count and rows[0]["text"] == first
    assert read_rows(tmp_path / name, most=1) == rows[:1]


def test_conll_columns_become_sentences(tmp_path):
    text = "-DOCSTART- -X- O\n\n# id 1\nAnna NNP B-PER\nsings VB O\n\t\n#\tO\nhi\tO\n\n\n"
    rows = read_rows(write(tmp_path / "a.conll", text))
    assert rows == [
        {"tokens": ["Anna", "sings"], "tags": ["B-PER", "O"]},
        {"tokens": ["#", "hi"], "tags": ["O", "O"]},
    ]


def squad(**asked):
    return {
        "data": [{"paragraphs": [{"context": "c", "qas": [{"id": "1", "question": "q", **asked}]}]}]
    }


def test_squad_becomes_rows_with_and_without_answers(tmp_path):
    found = squad(answers=[{"text": "c", "answer_start": 0}])
    (row,) = read_rows(write(tmp_path / "a.json", json.dumps(found)))
    assert row["answers"] == {"text": ["c"], "answer_start": [0]} and row["context"] == "c"
    nothing = squad(is_impossible=True, answers=[], plausible_answers=[])
    (row,) = read_rows(write(tmp_path / "b.json", json.dumps(nothing)))
    assert row["answers"] == {"text": [], "answer_start": []}


def test_parquet_is_read_by_pyarrow_alone(tmp_path):
    path = write(tmp_path / "a.parquet", b"PAR1")
    with pytest.raises(UnreadableFileError, match=r"pip install pyarrow|cannot be read by pyarrow"):
        read_rows(path)


WRONG = {
    "twice.csv": ("a,a\n1,2\n", "each once"),
    "short.tsv": ("a\tb\n1\n", "line 2 has 1 columns, and line 1 has 2"),
    "bad.jsonl": ('{"a": 1}\n{"a":\n', "line 2 is not JSON"),
    "list.jsonl": ("[1]\n", "line 1 is a list, expected a JSON object"),
    "deep.json": ("[" * 100_000, "is not JSON"),
    "object.json": ('{"a": 1}', "expected a list of JSON objects"),
    "squad.json": ('{"data": [{"paragraphs": [{}]}]}', "not as SQuAD's files are"),
    "word.conll": ("Anna\n", "line 1: expected a word and its tag"),
    "latin.txt": (b"\xe4", "is not UTF-8"),
    "nul.csv": (b'a,b\n"1', "cannot be read"),
    "empty.tsv": ("a\tb\n", "has no rows"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_with_its_line(name, tmp_path):
    content, expected = WRONG[name]
    with pytest.raises(UnreadableFileError, match=expected) as caught:
        read_rows(write(tmp_path / name, content))
    assert name in str(caught.value)


def test_paths_and_forms_that_cannot_be_meant(tmp_path):
    with pytest.raises(UnreadableFileError, match="there is no such file"):
        read_rows(tmp_path / "a.csv")
    with pytest.raises(UnreadableFileError, match="is a folder"):
        read_rows(tmp_path, "csv")
    with pytest.raises(ValueError, match=r"suffix '\.xyz' does not tell"):
        read_rows(tmp_path / "a.xyz")
    with pytest.raises(ValueError, match="did you mean 'jsonl'"):
        form_of("a.csv", "jsonll")
    assert {form_of("a", form) for form in FORMS} == set(FORMS)


def test_a_column_that_is_not_there_is_named_with_those_there_are():
    rows = [{"text": "a"}, {"text": None}]
    with pytest.raises(ValueError, match="row 1 has no column 'texts': did you mean 'text'"):
        column(rows, "texts", "a.csv")
    with pytest.raises(ValueError, match="row 2 has nothing in its column 'text'"):
        column(rows, "text", "a.csv")
    assert column(rows[:1], "text", "a.csv") == ["a"]


@pytest.mark.parametrize(
    ("header", "form"), [("sentence,label", "csv"), ("sentence\tlabel", "tsv")]
)
def test_a_file_in_another_form_is_suspected_by_its_only_column(header, form):
    with pytest.raises(ValueError, match=f"its only column is .*; if it is {form}, say so: form"):
        column([{header: "a"}], "sentence", "train.txt")


def test_a_file_without_names_is_told_where_they_belong():
    with pytest.raises(
        ValueError, match="choose from 'a fine film', '1'; they are named in the first"
    ):
        column([{"a fine film": "a", "1": "0"}], "sentence", "train.tsv")
