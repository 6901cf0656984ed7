"""Files of rows come back as they were written, or are refused: over dialects, values and random rows."""

import csv
import gzip
import io
import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from linlora.training import Data
from linlora.training.data import load_split, notes_on_files, notes_on_lines

ODD = [
    "None", "NA", "N/A", "nan", "NaN", "null", "NULL", "-", "?", "#N/A", "inf", "True", "false", "007", "1e5", "1.50",
    "1_000", "+1", "12345678901234567890", "0x1F", "2020-01-01", " leading", "trailing ", "it's", 'say "hi"',
    '"quoted"', "comma, inside", "semi;colon", "tab\tinside", "two\nlines", "two\r\nlines", "é ü 漢字 🙂", "a\u2028b",
    "\x0bvertical", "# comment", "a\\nb", "=1+1", "x" * 200_000,
]  # fmt: skip


def by_csv(delimiter, **dialect):
    def write(rows):
        file = io.StringIO(newline="")
        csv.writer(file, delimiter=delimiter, **dialect).writerows([["text", "label"], *rows])
        return file.getvalue().encode()

    return write


def by_json(rows):
    return json.dumps([{"text": text, "label": label} for text, label in rows]).encode()


def by_lines(**options):
    return lambda rows: "".join(
        json.dumps({"text": text, "label": label}, **options) + "\n" for text, label in rows
    ).encode()


WRITERS = {
    "csv": ("csv", by_csv(",")),
    "csv of unix": ("csv", by_csv(",", lineterminator="\n")),
    "csv with all cells quoted": ("csv", by_csv(",", quoting=csv.QUOTE_ALL)),
    "csv with a byte order mark": ("csv", lambda rows: b"\xef\xbb\xbf" + by_csv(",")(rows)),
    "csv in UTF-16": ("csv", lambda rows: by_csv(",")(rows).decode().encode("utf-16")),
    "csv in gzip": ("csv.gz", lambda rows: gzip.compress(by_csv(",")(rows))),
    "tsv": ("tsv", by_csv("\t")),
    "tsv with all cells quoted": ("tsv", by_csv("\t", quoting=csv.QUOTE_ALL)),
    "json": ("json", by_json),
    "jsonl": ("jsonl", by_lines()),
    "jsonl in UTF-8": ("jsonl", by_lines(ensure_ascii=False)),
    "jsonl with indents": ("jsonl", by_lines(indent=2)),
}


def read(folder, ending, content, columns=("text", "label")):
    """The rows of a file with some content."""
    path = folder / f"rows.{ending}"
    path.write_bytes(content)
    return load_split(Data(str(path)), "train", columns)


def pairs(rows):
    return [(row["text"], row["label"]) for row in rows]


@pytest.mark.parametrize("writer", WRITERS)
def test_odd_cells_are_read_as_they_were_written(tmp_path, writer):
    ending, write = WRITERS[writer]
    texts = [(text, "yes") for text in ODD]
    labels = [("text", label) for label in ODD]
    assert pairs(read(tmp_path, ending, write(texts))) == texts
    assert pairs(read(tmp_path, ending, write(labels))) == labels


@pytest.mark.parametrize("writer", [name for name in WRITERS if "json" not in name])
@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        (["0", "1", "-7"], [0, 1, -7]),
        (["0.5", "1.0"], [0.5, 1.0]),
        (["3.50", "1", "2e0"], [3.5, 1.0, 2.0]),
        (["True", "False"], [True, False]),
        (["01", "02"], ["01", "02"]),
        (["1", "2", "n/a"], ["1", "2", "n/a"]),
        (["99999999999999999999", "1"], ["99999999999999999999", "1"]),
    ],
)
def test_labels_are_numbers_where_all_of_them_are_written_so(tmp_path, writer, cells, labels):
    ending, write = WRITERS[writer]
    found = read(tmp_path, ending, write([("text", cell) for cell in cells]))["label"]
    assert [(type(label), label) for label in found] == [(type(label), label) for label in labels]


@pytest.mark.parametrize("writer", ["csv", "tsv", "csv with all cells quoted", "json", "jsonl"])
def test_numbers_in_a_text_keep_every_character(tmp_path, writer):
    ending, write = WRITERS[writer]
    for cells in (["1.50", "2"], ["007", "8"], ["1", "2.5"], ["1e400", "2"], ["12345678901234567890", "1"]):
        assert list(map(str, read(tmp_path, ending, write([(cell, "a") for cell in cells]))["text"])) == cells


def test_json_values_keep_their_type_or_become_text(tmp_path):
    def texts(*values):
        content = "".join(json.dumps({"text": value, "label": 1}) + "\n" for value in values)
        return list(read(tmp_path, "jsonl", content.encode())["text"])

    assert texts(1, 2) == [1, 2]
    assert texts(True, False) == [True, False]
    assert texts(1, 2.5) == ["1", "2.5"]
    assert texts("a", 1) == ["a", "1"]
    assert texts(10**30, 1) == [str(10**30), "1"]
    assert texts(["a", "b"], ["c"]) == ["['a', 'b']", "['c']"]


cells = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6)
nasty = st.text('",\t\r\na ', min_size=1, max_size=6)


@pytest.mark.parametrize("writer", WRITERS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(cells | nasty, cells | nasty), min_size=1, max_size=5))
def test_random_rows_come_back_or_their_quotation_marks_are_refused(tmp_path, writer, rows):
    ending, write = WRITERS[writer]
    if writer == "csv of unix":  # Python's csv writes a lone carriage return without quotation marks there
        rows = [(text.replace("\r", "r"), label.replace("\r", "r")) for text, label in rows]
    try:
        found = pairs(read(tmp_path, ending, write(rows)))
    except ValueError as error:
        assert "quoted" not in writer or ending == "tsv"
        assert ("spans lines" if "csv" in ending else "quotation marks") in str(error)  # noqa: PT017
        return
    assert [(str(text), str(label)) for text, label in found] == rows


def lines(rows, separator):
    return f"text{separator}label\n" + "".join(f"{text}{separator}{label}\n" for text, label in rows)


@pytest.mark.parametrize("marks", [["{}"], ['"{}'], ['{}"'], ['"{}"'], ['"{}', '{}"'], ['5" {}'], ['"{}" she said']])
def test_a_quotation_mark_in_a_tsv_swallows_no_rows(tmp_path, marks):
    texts = [marks[i // 5 % len(marks)].format(f"review {i}") if i % 5 == 0 else f"review {i}" for i in range(40)]
    rows = [(text, ("neg", "pos")[i % 2]) for i, text in enumerate(texts)]
    try:
        found = pairs(read(tmp_path, "tsv", lines(rows, "\t").encode()))
    except ValueError as error:
        assert len(marks) == 2
        assert "quotation marks" in str(error)  # noqa: PT017
        return
    assert found == rows


@pytest.mark.parametrize("quoted", [r'"\g<0>"', r'"\g<0>'])
def test_marks_around_cells_are_left_out_where_a_program_wrote_them(tmp_path, quoted):
    """Spreadsheets put cells with a comma in quotation marks, and only those."""
    texts = ["a plain text", "one, with a comma", "another"]
    written = [re.sub(".*,.*", quoted, text) for text in texts]
    found = read(tmp_path, "tsv", lines([(text, "x") for text in written], "\t").encode())["text"]
    assert list(found) == (texts if quoted.endswith('>"') else written)


@pytest.mark.parametrize(
    ("ending", "content", "message"),
    [
        ("csv", 'text,label\n"open,a\nb,c\n', r"line 2: a quotation mark .* is not closed"),
        ("csv", 'text,label\na,b\n"open,a\nb,c\n"d,e\n', r"line 3: a quotation mark"),
        ("csv", "text,label\na,b\nc\n", r"line 3: 1 cells, and the header has 2"),
        ("csv", "text,label\na,b,c\n", r"line 2: 3 cells, and the header has 2; a cell with a comma"),
        ("csv", "text,label,label\na,b,c\n", r"has 2 columns 'label'"),
        ("csv", "text, label\na,b\n", r"no column 'label'; its columns are text, ' label'"),
        ("csv", "text;label\na;b\n", r"no column 'text', 'label'; its columns are text;label"),
        ("csv", "", "has no data"),
        ("csv", "text,label\na,1.5\nb,NA\n", r"column 'label' .* holds numbers and, in 1 rows, 'NA'"),
        ("csv", "text,label\na,\n", r"column 'label' .* is empty in 1 rows"),
        ("tsv", "text\tlabel\na\tb\tc\n", r"line 2: 3 cells, and the header has 2; a cell with a tab"),
        ("tsv", 'text\tlabel\n"a\tx\nb\tx\nc"\ty\n', r"3 rows if its quotation marks .* and 1 if they stand around"),
        ("json", "", "has no data"),
        ("json", "[1, 2]", r"row 1 is 1, not an object"),
        ("json", '{"text": "a", "label": ', r"could not be read: line 1 is not JSON"),
        ("jsonl", '{"text": "a", "label": 1}\n{"text": ', r"line 2 is not JSON"),
        ("jsonl", '{"text": "a", "text": "b", "label": 1}', r"line 1: the key 'text' is there twice"),
        ("jsonl", '{"text": "a", "label": 1}\n{"text": "b"}', r"column 'label' .* is empty in 1 rows"),
        ("jsonl", '{"text": "a", "label": NaN}', r"column 'label' .* is empty in 1 rows"),
        ("jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": "x"}', r"labels of different kinds, 1 and 'x'"),
        ("jsonl", '{"text": "a", "label": {"x": 1}}', r"holds an object in row 1, \{'x': 1\}; a label is one word"),
        ("jsonl", '{"text": "\\ud800", "label": 1}', r"text that is not Unicode"),
        ("jsonl", "[" * 100_000, r"could not be read"),
        ("csv.gz", "text,label\n", r"could not be unpacked"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_whole_is_refused_with_its_place(tmp_path, ending, content, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, ending, content.encode())


def test_text_that_is_not_unicode_names_the_line(tmp_path):
    with pytest.raises(ValueError, match=r"rows\.csv is not UTF-8 \(byte 0xe9 in line 3\); convert it"):
        read(tmp_path, "csv", "text,label\na,b\ncafé,b\n".encode("latin-1"))


def test_blank_lines_are_no_rows(tmp_path):
    assert pairs(read(tmp_path, "csv", b"\n\ntext,label\r\n\r\na,b\r\n   \r\n\r\n")) == [("a", "b")]
    assert pairs(read(tmp_path, "jsonl", b'\n{"text": "a", "label": "b"}\r\n\n')) == [("a", "b")]


def test_the_files_of_a_folder_are_read_by_the_same_rule(tmp_path):
    for name, label in (("train.tsv", "None"), ("test.tsv", "NA")):
        (tmp_path / name).write_text(lines([('"half', label), ("007", "x")], "\t"))
    data = Data(str(tmp_path), test="test")
    assert pairs(load_split(data, "train", ["text", "label"])) == [('"half', "None"), ("007", "x")]
    assert pairs(load_split(data, "test", ["text", "label"])) == [('"half', "NA"), ("007", "x")]
    both = Data(str(tmp_path), train="train+test[1:]")
    assert [row["label"] for row in load_split(both, "train", ["label"])] == ["None", "x", "x"]


def test_files_of_a_folder_that_are_left_out_are_named(tmp_path):
    """`datasets` reads the files of one format, and passes over the others."""
    for name, row in (("train-1.csv", "a,x"), ("train-2.csv", "b,x"), ("test.csv", "c,x")):
        (tmp_path / name).write_text(f"text,label\n{row}\n")
    data = Data(str(tmp_path))
    assert notes_on_files(data, "train") == []
    (tmp_path / "train-3.jsonl").write_text('{"text": "d", "label": "x"}\n')
    assert notes_on_files(data, "train") == ["train-3.jsonl left out, beside files of another format"]
    assert notes_on_files(data, "test") == []
    assert list(load_split(data, "train", ["text"])["text"]) == ["a", "b"]


def test_columns_that_are_not_used_may_hold_anything(tmp_path):
    rows = '{"text": "a", "label": 1, "more": [1]}\n{"text": "b", "label": 2, "more": {"x": null}}\n'
    assert pairs(read(tmp_path, "jsonl", rows.encode())) == [("a", 1), ("b", 2)]
    assert pairs(read(tmp_path, "csv", b"text,label,x,x\na,b,,1\n")) == [("a", "b")]


SWALLOWED = [
    'text,label\n"bad film,neg\nfine,pos\ngreat",neg\npoor,neg\n',
    'text,label\n"bad film,neg\ngreat",pos\npoor,neg\n',
    'label,text\nneg,"bad film\npos,fine\nneg,great"\npos,a\n',
    'id,text,label\n1,"bad film,neg\n2,fine,pos\n3,great",neg\n',
    'text,label,id\r\n"bad film,neg,9\r\nfine,pos,8\r\n"",pos,7\r\nlast",neg,6\r\n',
    'text,label\n"bad film,0.5\nfine,1.25\ngreat",1.0\npoor,0.125\n',
    'text,label,more\nfine,pos,"a\nbad,neg,b\ngreat,pos,c"\n',
]


@pytest.mark.parametrize("content", SWALLOWED)
def test_a_mark_that_a_later_cell_closes_swallows_no_rows(tmp_path, content):
    with pytest.raises(ValueError, match=r"row 1 has a cell that spans lines, and one of these reads like the rest of"):
        read(tmp_path, "csv", content.encode())


def test_cells_of_several_lines_are_read(tmp_path):
    rows = [
        ("a film,\nand a good one", "pos"),
        ("1,2\n3,4\r\n", "neg"),
        ("yes, pos\nno, neg", "neg"),
        ("neg\npos", "pos"),
    ]
    ending, write = WRITERS["csv"]
    assert pairs(read(tmp_path, ending, write(rows))) == rows


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_a_table_says_how_many_rows_have_cells_of_several_lines(tmp_path, ending):
    rows = [("a film,\nand a good\none", "pos"), ("one line", "neg"), ("two\nlines", "neg")]
    data = Data(str(tmp_path / f"rows.{ending}"))
    found = notes_on_lines(data, "train", read(tmp_path, ending, WRITERS[ending][1](rows)))
    assert found == ([] if ending == "jsonl" else ["2 of 3 rows have a cell of several lines, the longest of 3"])
