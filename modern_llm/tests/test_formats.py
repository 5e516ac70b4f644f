"""What stands in a file is what is read: rows of tables, what JSON allows, encodings; and an error
names the file and the line.
"""

import csv
import gzip
import io
import json

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from modern_llm.data import reading
from modern_llm.data.pairs import preference_pairs
from modern_llm.data.sources import DataError
from modern_llm.data.tasks import sentences, word_problems
from modern_llm.training import sft


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path, offline):
    monkeypatch.setenv("MODERN_LLM_DATA", str(tmp_path / "mirror"))


def put(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def texts(path):
    return [row["text"] for row in reading.read_file(path)]


def refused(path, message, read=None):
    """The reading ends in a DataError that names the file and what `message` says."""
    with pytest.raises(DataError, match=message) as caught:
        list((read or reading.read_file)(path if read is None else str(path)))
    assert str(path) in str(caught.value)


def everything(path):
    return [*reading.documents(path, "train"), *reading.documents(path, "validation")]


# ---- tables

TABLES = [
    ("text\nDear Ann, the boat sails.\n",
     "line 2: 2 cells, but the header .line 1. has 1: text; put quotation marks"),
    ("text,label\nHello there,0\nfine film,1,\n", "line 3: 3 cells, but the header .line 1. has 2"),
    ("text,label\nHello,0,\nfine,1,\n", "line 2: 3 cells"),
    ("text,label\n\"a\nb\",0\nc\n", "line 4: 1 cell,"),
    ("label,text\n1,good\n0\n", "line 3: 1 cell, but"),
    ("a,b,text\n1,2\n", "line 2: 2 cells"),
    ("text,label\n\"one\",1\n\"two,0\nthree,1\n",
     "line 3: a quotation mark in the row that begins here is never closed"),
    ("text\n\"say \\\"hi\\\" now\"\n", "line 2: .*written twice"),
    ("text\n\"one\" two\n", "line 2: .*in the row that begins on line 2"),
    ("text,text\na,b\n", "line 1: the header names the column 'text' twice"),
    ("text;label\nfine;1\ngood; bad;1\n",
     "line 3: 3 cells, but the header .line 1. has 2: text, label; put quotation marks round a "
     "cell with semicolons"),
    ("A story.\nAnother story.\n", "line 2 has no field 'text', only .'A story.'."),
    ("text\n", "empty but for its header"),
    ("\n\n", "the file is empty"),
]


@pytest.mark.fault("tables")
@pytest.mark.parametrize("content, message", TABLES)
def test_a_table_that_is_no_table_is_refused(content, message, tmp_path):
    refused(put(tmp_path, "a.csv", content), message, everything)


@pytest.mark.fault("tables")
@pytest.mark.parametrize(
    "content, want",
    [("text\n\"Dear Ann, the boat sails.\"\n", ["Dear Ann, the boat sails."]),
     ("text,\nfine,\n", ["fine"]),
     (",text\n0,fine\n1,good\n", ["fine", "good"]),
     ("\"text\",n\nfine,1\n", ["fine"]),
     ("text\n007\n1e5\nTrue\nNA\nnull\nnan\n1.50\n\n-0\n",
      ["007", "1e5", "True", "NA", "null", "nan", "1.50", "-0"]),
     ("text,n\na 5\" disk,1\n\"say \"\"hi\"\"\",2\n", ["a 5\" disk", "say \"hi\""]),
     ("text,n\r\n\"one\r\ntwo\",1\r\nthree,2\r\n", ["one\r\ntwo", "three"]),
     ("\n\ntext\nfine\n", ["fine"]),
     ("text,n\nfine,1", ["fine"]),
     ("n,text\n1,\n2,fine\n", ["", "fine"]),
     ("text\n# no comment\n'a'\n", ["# no comment", "'a'"]),
     ("text;label\r\nDear Ann, the boat sails.;1\r\n\"one; two\r\nthree\";0\r\n",
      ["Dear Ann, the boat sails.", "one; two\r\nthree"]),
     ("\ufeff\"label\";\"text\";\r\n1;\"a \"\"b\"\", c\";\r\n2;fine;\r\n", ["a \"b\", c", "fine"]),
     ("sep=;\r\nlabel;text\r\n1;a, b\r\n", ["a, b"]),
     ("sep=,\ntext,label\n\"a; b\",1\n", ["a; b"]), ("sep=\t\ntext\na, b\n", ["a, b"]),
     ("text\tlabel\na, b\t1\n\"say \"\"hi\"\"\tnow\"\t0\n", ["a, b", "say \"hi\"\tnow"]),
     ("text|label\na; b|1\n", ["a; b"]),
     ("text,\"a;b\"\nfine;good,1\n", ["fine;good"]), ("text\nfine; good\n", ["fine; good"]),
     ("text,label,,\r\n\"a, b\",1,,\r\n,,,\r\n", ["a, b", ""])])
def test_a_cell_is_text_whatever_it_looks_like(content, want, tmp_path):
    assert texts(put(tmp_path, "a.csv", content)) == want


@pytest.mark.fault("tables")
@pytest.mark.parametrize("content, want", [
    ("text\tn\n\"a\t1\nb\"\t2\n", ["\"a", "b\""]),
    ("text\tn\r\nnull\t1\r\n007\t2\r\n", ["null", "007"]),
    ("n\ttext\n1\ta, b\n", ["a, b"]), ("n\ttext\n\"\"\t\"a\" b\"\n", ["\"a\" b\""]),
])
def test_a_tsv_has_tabs_and_no_quotes(content, want, tmp_path):
    assert texts(put(tmp_path, "a.tsv", content)) == want


@pytest.mark.fault("tables")
@pytest.mark.parametrize("content, message", [
    ("text\tn\na\tb\t1\n",
     "line 2: 3 cells, but the header .line 1. has 2: text, n; cells are separated by one tab"),
    ("text\tn\na\t1\nb\n", "line 3: 1 cell,"),
    ("text\nfine\n\"say \"\"hi\"\"\"\n",
     "line 3: a cell is in quotation marks and doubles those within.* save the table as .csv"),
    ("n\ttext\n1\t\"\"\"hi\"\", said Ann\"\n", "line 2: a cell is in quotation marks"),
])
def test_a_tsv_row_of_another_width_is_refused(content, message, tmp_path):
    refused(put(tmp_path, "a.tsv", content), message)


# ---- what a row promises

WRONG_TYPES = [("[\"a\", \"b\"]", "a list"), ("7", "an integer"), ("1.5", "a number"),
               ("true", "true or false"), ("{\"a\": 1}", "an object"), ("NaN", "a number")]


@pytest.mark.fault("tables")
@pytest.mark.parametrize("value, kind", WRONG_TYPES)
def test_what_is_no_text_is_refused_with_its_line(value, kind, tmp_path):
    path = put(tmp_path, "a.jsonl", f'{{"text": "fine"}}\n\n{{"text": {value}}}\n')
    refused(path, f"line 3: text is {kind}, .*should be text", everything)


@pytest.mark.fault("tables")
def test_null_is_a_missing_field(tmp_path):
    refused(put(tmp_path, "a.jsonl", '{"text": "fine"}\n{"text": null, "n": 1}\n'),
            "line 2 has no field 'text', only .'n'. .it is null.", everything)
    refused(put(tmp_path, "a.jsonl", '{"text": "fine"}\n{"n": 1}\n'),
            "line 2 has no field 'text', only .'n'.;", everything)


TIMES = {"beyond the year 9999": (2**62, pa.timestamp("ms")),
         "of no time zone": (2**40, pa.timestamp("ms", tz="Mars/Phobos")),
         "a day beyond": (2**30, pa.date32()), "a long time": (2**62, pa.duration("s")),
         "nanoseconds": (1700000000123456789, pa.timestamp("ns"))}


@pytest.mark.fault("encodings")
@pytest.mark.parametrize("time", TIMES)
def test_other_columns_of_parquet_may_hold_anything(time, tmp_path):
    value, kind = TIMES[time]
    rows = [{"at": value}] * 2
    table = {"text": ["fine", "good"], "time": pa.array([value] * 2, kind),
             "list": pa.array([[value]] * 2, pa.list_(kind)), "rows": rows}
    parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    assert (texts(tmp_path / "a.parquet") == ["fine", "good"]
            and next(reading.read_file(tmp_path / "a.parquet"))["rows"] == rows[0])


@pytest.mark.fault("tables")
def test_parquet_names_a_column_once(tmp_path):
    parquet.write_table(
        pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]),
        tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "the header names the column 'text' twice")


FINE = {"alpaca": {"instruction": "Add.", "input": "1, 2", "output": "3"},
        "gsm8k": {"question": "1 + 2?", "answer": "#### 3"},
        "oasst1": {"message_id": "a", "parent_id": None, "role": "prompter", "lang": "en",
                   "text": "Hello?", "rank": None},
        "hh-rlhf": {"chosen": "\n\nHuman: A?\n\nAssistant: B.",
                    "rejected": "\n\nHuman: A?\n\nAssistant: C."},
        "sst2": {"sentence": "good", "label": 1}, "tinystories": {"text": "A story."}}
READ = {"alpaca": lambda: sft.instructions("alpaca", "train", 9),
        "gsm8k": lambda: word_problems("gsm8k", "train", 9),
        "oasst1": lambda: sft.instructions("oasst1", "train", 9),
        "hh-rlhf": lambda: preference_pairs("hh-rlhf", "train", 9),
        "sst2": lambda: sentences("sst2", "train", 9),
        "tinystories": lambda: list(reading.documents("tinystories"))}


def mirror(folder, name, *rows):
    """The train and validation file of a data set; the path of the first."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    return [put(folder / "mirror" / name, f"{split}.jsonl", text)
            for split in ("validation", "train")][1]


@pytest.mark.fault("tables")
@pytest.mark.parametrize(
    "name, change, message",
    [("alpaca", {"output": 7}, "output is an integer, 7, but should be text"),
     ("alpaca", {"output": None}, "no field 'output'"),
     ("alpaca", {"input": ["a"]}, "input is a list"),
     ("alpaca", {"instruction": {"a": 1}}, "instruction is an object"),
     ("alpaca", {"input": False}, "input is true or false, False"),
     ("gsm8k", {"answer": 5}, "answer is an integer, 5"),
     ("gsm8k", {"question": ["How many?"]}, "question is a list"),
     ("gsm8k", {"answer": "five"}, "the answer 'five' does not end"),
     ("gsm8k", {"question": " "}, "the question is empty"),
     ("oasst1", {"message_id": 3}, "message_id is an integer"),
     ("oasst1", {"role": None}, "no field 'role'"),
     ("oasst1", {"text": {"en": "Hi"}}, "text is an object"),
     ("oasst1", {"rank": "0", "message_id": "b"}, "rank is text, '0'"),
     ("oasst1", {"parent_id": 1.0, "message_id": "b"}, "parent_id is a number"),
     ("oasst1", {}, "the message_id 'a' is there twice"),
     ("hh-rlhf", {"chosen": [{"role": "user", "content": "A?"}]}, "chosen is a list"),
     ("hh-rlhf", {"rejected": 7}, "rejected is an integer"),
     ("hh-rlhf", {"rejected": None}, "no field 'rejected'"),
     ("sst2", {"label": "positive"}, "label 'positive' is not 0 or 1"),
     ("sst2", {"label": True}, "label is true or false"),
     ("sst2", {"label": 1.0}, "label is a number, 1.0"),
     ("sst2", {"label": "1.0"}, "label '1.0' is not 0 or 1"),
     ("sst2", {"label": None}, "no field 'label'"),
     ("sst2", {"sentence": 3}, "sentence is an integer"),
     ("sst2", {"sentence": " "}, "the sentence is empty"),
     ("oasst1", {"role": "user", "message_id": "b"}, "role 'user' is not"),
     ("tinystories", {"text": ["a", "b"]}, "text is a list"),
     ("tinystories", {"text": 1e5}, "text is a number")])
def test_every_stage_gets_what_a_data_set_promises(name, change, message, tmp_path):
    path = mirror(tmp_path, name, FINE[name], {**FINE[name], **change})
    with pytest.raises(ValueError, match=f"line 2(: | has ).*{message}") as caught:
        READ[name]()
    assert str(path) in str(caught.value)


@pytest.mark.fault("tables")
@pytest.mark.parametrize("row", [{}, {"input": None}, {"input": ""}])
def test_an_optional_field_may_be_absent(row, tmp_path):
    mirror(tmp_path, "alpaca", {"instruction": "Say hello.", "output": "Hello.", **row})
    assert READ["alpaca"]() == [sft.InstructionExample("Say hello.", output="Hello.")]
    assert list(reading.documents("alpaca")) == ["Say hello.\nHello."]


@pytest.mark.fault("tables")
def test_rows_without_a_request_or_an_answer_are_counted():
    from modern_llm.data import tokens

    examples = [sft.InstructionExample(instruction, output=output)
                for instruction, output in (("", "Yes."), ("Ask.", " "), ("Ask.", "Yes."))]
    _, counts = sft.encode_examples(tokens.train_tokenizer(["Ask. Yes."], 280), examples, 64)
    assert (counts["read"], counts["no text"], counts["kept"]) == (3, 2, 1)


@pytest.mark.fault("tables")
def test_messages_of_one_conversation_are_on_one_side(tmp_path):
    rows = [{**FINE["oasst1"], "message_id": f"{tree}-{i}",
             "message_tree_id": str(tree), "text": f"{tree} {i}"}
            for tree in range(300) for i in range(3)]
    put(tmp_path / "mirror" / "oasst1", "train.jsonl",
        "".join(json.dumps(row) + "\n" for row in rows))
    sides = [{row["message_tree_id"] for row in reading.rows("oasst1", split)}
             for split in ("train", "validation")]
    assert all(sides) and not sides[0] & sides[1]


# ---- JSON and encodings

@pytest.mark.fault("encodings")
@pytest.mark.parametrize(
    "written, want",
    [(r'"half \ud83d"', "half \ufffd"), (r'"\uDE00 half"', "\ufffd half"),
     (r'"\ud83d\ud83d\ude00"', "\ufffd\U0001f600"), (r'"whole \ud83d\ude00"', "whole \U0001f600"),
     (r'"a\u0000b"', "a\0b"),
     ('"tw\u2028o\u0085 \x0b"'.replace("\x0b", "\\u000b"), "tw\u2028o\u0085 \x0b"),
     ('"first", "text": "last"', "last"), ('"x", "n": 1, "n": "two"', "x"),
     ('"x", "n": NaN, "m": -Infinity', "x"), ('"x", "n": 123456789012345678901234567890', "x"),
     ('"x", "\\ud83d": ["\\ude00"]', "x"), ('"a\\r\\nb"', "a\r\nb")])
def test_what_json_allows_is_read(written, want, tmp_path):
    # far behind what a parser looks at first
    rows = [f'{{"text": "line {i}"}}' for i in range(5000)]
    path = put(tmp_path, "a.jsonl", "\n".join([*rows, f'{{"text": {written}}}', rows[0]]) + "\n")
    found = texts(path)
    assert found[5000] == want and len(found) == 5002
    assert found[5000].encode()  # it can be written


@pytest.mark.fault("encodings")
@pytest.mark.parametrize(
    "first, second", [({"n": 1}, {"n": "one"}), ({"n": [1]}, {"n": {"a": 1}}),
                      ({"n": None}, {"m": 1.5}), ({}, {"n": [[]]})])
def test_other_columns_may_hold_anything(first, second, tmp_path):
    path = put(tmp_path, "a.jsonl",
               "".join(json.dumps({"text": "x", **row}) + "\n" for row in (first, second)))
    assert ([dict(row) for row in reading.read_file(path)]
            == [{"text": "x", **first}, {"text": "x", **second}])


@pytest.mark.fault("encodings")
@pytest.mark.parametrize(
    "content",
    ['[{"text": "one"}, {"text": "two"}]', '[\n {"text": "one"},\n {"text":\n  "two"}\n]\n',
     '{"text": "one"}\n{"text": "two"}\n', '{\n "text": "one"\n}\n{\n "text": "two"\n}\n',
     '\ufeff[{"text": "one"},{"text": "two"}]', '{"text": "one"} {"text": "two"}',
     '[{"text": "one", "n": "' + "x" * 3_000_000 + '"}, {"text": "two"}]'])
def test_a_json_file_is_a_list_or_objects(content, tmp_path):
    assert (texts(put(tmp_path, "a.json", content))
            == ["one", "two"] == texts(put(tmp_path, "a.json.gz", content)))


@pytest.mark.fault("encodings")
@pytest.mark.parametrize("name, content, message", [
    ("a.json", '[{"text": "a"},\n\n {"text": }]', "line 3: .* is not valid JSON"),
    ("a.json", '[{"text": "a"}\n', "line 2: the list is not closed"),
    ("a.json", '[{"text": "a"}]\n{"text": "b"}', "line 2: there is more behind the list"),
    ("a.json", '[{"text": "a"},\n3]', "line 2: '3' is not a JSON object"),
    ("a.json", '{"text": "a"\n', "line 2: .* is not valid JSON"),
    ("a.json", "[]", "the file is empty"),
    ("a.jsonl", '[\n{"text": "a"}\n]', "line 1: .* is not valid JSON on its own.* ends in .json"),
    ("a.jsonl", '{"text": "a"}\n{\n  "text": "b"\n}\n',
     "line 2: .* is not valid JSON on its own.* ends in .json"),
    ("a.jsonl", '[{"text": "a"}]', "line 1: .* is not a JSON object .* ends in .json"),
    ("a.jsonl", '{"text": "a"}{"text": "b"}', "line 1: .* is not valid JSON"),
    ("a.jsonl", "[" * 100_000, "line 1: .* is not valid JSON"),
    ("a.jsonl", '{"text": "a"}\n{"text": "b"}\n{"text": "tab\there"}\n',
     "line 3: .* is not valid JSON"),
])
def test_what_is_no_json_is_refused_with_its_line(name, content, message, tmp_path):
    refused(put(tmp_path, name, content), message)


ROWS = {".txt": b"a line\n", ".jsonl": b'{"text": "a line"}\n', ".csv": b"a line,1\n",
        ".tsv": b"a line\t1\n", ".json": b'{"text": "a line"}\n'}


def long_file(suffix, line):
    """19,999 good lines, the given one, and good ones again."""
    head = {".csv": b"text,n\n", ".tsv": b"text\tn\n"}.get(suffix, ROWS[suffix])
    return head + ROWS[suffix] * 19_998 + line + ROWS[suffix] * 20_000


@pytest.mark.fault("encodings")
@pytest.mark.parametrize("suffix", ROWS)
@pytest.mark.parametrize(
    "odd, message",
    [(b"caf\xe9", "line 20000: byte 0xe9 at column [0-9]+ is not UTF-8"),
     ("caf\xe9".encode("utf-16-le"), "line 20000: byte 0 .*UTF-16"),
     (b"\xed\xa0\xbd", "line 20000: byte 0xed"), (b"cut \xf0\x9f\x98", "line 20000: byte 0xf0")])
def test_odd_bytes_late_in_a_file_are_named_with_their_line(suffix, odd, message, tmp_path):
    refused(put(tmp_path, "a" + suffix, long_file(suffix, ROWS[suffix].replace(b"a line", odd))),
            message)


@pytest.mark.fault("encodings")
@pytest.mark.parametrize("suffix", ROWS)
@pytest.mark.parametrize("encoding, name",
                         [("utf-16", "UTF-16"), ("utf-16-be", "UTF-16"), ("utf-32", "UTF-32")])
def test_a_wide_encoding_is_named(suffix, encoding, name, tmp_path):
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    refused(put(tmp_path, "a" + suffix, mark + long_file(suffix, b"").decode().encode(encoding)),
            f"is {name} text, .*iconv -f utf-")


@pytest.mark.fault("encodings")
@pytest.mark.parametrize("suffix", ROWS)
@pytest.mark.parametrize("zipped", ["", ".gz"])
def test_a_byte_order_mark_is_no_text(suffix, zipped, tmp_path):
    head = {".csv": b"text,n\n", ".tsv": b"text\tn\n"}.get(suffix, b"")
    path = put(tmp_path, "a" + suffix + zipped, b"\xef\xbb\xbf" + head + ROWS[suffix])
    assert texts(path) == ["a line"]
    assert reading.check_rows(str(path))["columns"].split(", ")[0] == "text"


@pytest.mark.fault("encodings")
def test_a_mark_within_a_file_stays_and_between_json_lines_does_not(tmp_path):
    assert texts(put(tmp_path, "a.txt", "\ufeffone\n\ufefftwo\n")) == ["one", "\ufefftwo"]
    assert (texts(put(tmp_path, "a.jsonl", '\ufeff{"text": "one"}\n\ufeff{"text": "\ufefftwo"}\n'))
            == ["one", "\ufefftwo"])


@pytest.mark.fault("encodings")
@pytest.mark.parametrize("content, want", [
    ("one\rtwo\r", ["one", "two"]), ("one\r\ntwo", ["one", "two"]),
    ("tw\u2028o\u2029\x0b\x0c\x1c\x1d\x1e\x85\n", ["tw\u2028o\u2029\x0b\x0c\x1c\x1d\x1e\x85"]),
])
def test_lines_end_where_an_editor_ends_them(content, want, tmp_path):
    assert texts(put(tmp_path, "a.txt", content)) == want


@pytest.mark.fault("encodings")
@pytest.mark.parametrize("cut", [9, 100, 5_000])
def test_a_gzip_that_breaks_off_says_where(cut, tmp_path):
    import random

    lines = random.Random(0).choices(["red fox", "old owl", "the sea"], k=20_000)
    whole = gzip.compress("".join(json.dumps({"text": line}) + "\n" for line in lines).encode())
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(whole[:len(whole) - cut])
    refused(path, "cannot be read.*behind line [0-9]+; is it a whole copy")


# ---- properties

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
FEW = settings(max_examples=60, deadline=None, derandomize=True)


def read_bytes(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    return [dict(row) for row in reading.read_file(path)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("properties")


@FEW
@given(rows=st.lists(st.dictionaries(
    ANY_TEXT, st.none() | st.integers() | ANY_TEXT | st.lists(ANY_TEXT, max_size=2), max_size=3
), min_size=1, max_size=5), ascii_only=st.booleans(), indent=st.sampled_from([None, 1]))
def test_json_comes_back_as_it_was_written(rows, ascii_only, indent, folder):
    lines = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    assert (read_bytes(folder, "a.jsonl", lines.encode()) == rows
            == read_bytes(folder, "a.json", lines.encode()))
    assert read_bytes(folder, "a.json",
                      json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode()) == rows


@FEW
@given(width=st.integers(1, 4), data=st.data(), end=st.sampled_from(["\n", "\r\n"]),
       quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
def test_a_csv_comes_back_as_it_was_written(width, data, end, quoting, folder):
    names = [f"c{i}" for i in range(width)]
    table = data.draw(st.lists(st.lists(ANY_TEXT, min_size=width, max_size=width), min_size=1,
                               max_size=8))
    file = io.StringIO()
    csv.writer(file, lineterminator=end, quoting=quoting).writerows([names, *table])
    want = [dict(zip(names, cells)) for cells in table if width > 1 or cells[0].strip()]
    if want:
        assert read_bytes(folder, "a.csv", file.getvalue().encode()) == want


@FEW
@given(
    lines=st.lists(ANY_TEXT.map(lambda text: text.replace("\n", "").replace("\r", "")), min_size=1),
    end=st.sampled_from(["\n", "\r\n", "\r"]), zipped=st.booleans())
def test_lines_come_back_as_they_were_written(lines, end, zipped, folder):
    content = "".join(line + end for line in ["first", *lines]).encode()
    name, content = ("a.txt.gz", gzip.compress(content)) if zipped else ("a.txt", content)
    assert [row["text"] for row in read_bytes(folder, name, content)] == ["first", *lines]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(content=st.binary(max_size=60) | ANY_TEXT.map(str.encode),
       suffix=st.sampled_from([".txt", ".jsonl", ".json", ".csv", ".tsv", ".txt.gz", ".parquet"]),
       head=st.sampled_from([b"", b"text\n", b'{"text": "', b'[{"text": "a"}, ', b"\xef\xbb\xbf"]))
def test_any_bytes_are_read_or_refused_with_the_file(content, suffix, head, folder):
    path = folder / ("any" + suffix)
    path.write_bytes(head + content)
    try:
        assert all(isinstance(row, dict) and row.place.startswith(str(path))
                   for row in reading.read_file(path))
    except DataError as error:
        assert str(error).startswith(str(path))
