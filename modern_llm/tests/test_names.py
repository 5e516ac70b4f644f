"""What a user names is what is read: a name is taken literally, wherever data are named."""

import gzip
import json
import os
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from modern_llm import cli
from modern_llm.config import ConfigError, get_pipeline_preset, override, parse_overrides
from modern_llm.data import corpus, reading, sources, tokens
from modern_llm.data.sources import DatasetNotFound
from modern_llm.runs import data_files


@pytest.fixture(autouse=True)
def somewhere(monkeypatch, tmp_path, offline):
    """An empty working folder, no mirror and no network."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def put(name, word="right"):
    """A file in the format that its name says, with forty documents; lines that would be titles in
    WikiText.
    """
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = [f" = The {word} one = \n\n Number {i} . \n" for i in range(40)]
    kind = sources.plain_suffix(path)
    lines = {
        ".jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts),
        ".json": json.dumps([{"text": text} for text in texts]),
        ".csv": "text\n" + "".join(f'"{text}"\n' for text in texts),
        ".tsv": "n\ttext\n" + "".join(f"1\t{text.split()[2]} {i}\n" for i, text in enumerate(texts))
    }
    content = lines.get(kind, "\n".join(["", *texts])).encode()
    path.write_bytes(gzip.compress(content) if path.suffix.lower() == ".gz" else content)
    return path


def read(name):
    return sorted(text for split in ("train", "validation")
                  for text in reading.documents(str(name), split))


def is_right(name):
    found = "".join(read(name))
    return "right" in found and "wrong" not in found


ODD = ["notes[1].txt", "a*b.jsonl", "data?.csv", "{a,b}.json", "my notes, part 2.txt", "a=b.csv",
       "a #1.txt", "a::b.jsonl", "hf:/x/y.txt", "zip:/a.jsonl", "~nobody-here.txt",
       "$HOME.txt", "%41.tsv", "-p.txt", "train/test/validation.jsonl", "UPPER.TXT", "A.JSONL.GZ",
       "b.Csv.Gz", "2024.txt", "null.json", "1e5.csv", "caf\u00e9 \u96ea.txt", "tab\tname.txt",
       "line\nname.jsonl", "wikitext-mine.txt", "wikitext-2-raw-v1.txt", "synthetic.txt",
       "synthetic-notes.jsonl", "sst2.tsv", "gsm8k/x.jsonl", "C:\\notes\\a.txt", ".hidden.txt",
       "x" * 240 + ".txt", "a.txt.gz.txt"]


@pytest.mark.fault("names")
@pytest.mark.parametrize("name", ODD)
def test_a_name_is_taken_literally(name, tmp_path):
    for old, new in (("[1]", "1"), ("*", "x"), ("?", "1"), ("{a,b}", "a"), ("%41", "A")):
        if old in name:
            put(name.replace(old, new), "wrong")
    put(name)
    plain = put("plain" + "".join(Path(name.lower()).suffixes[-2:] if name.lower().endswith(".gz")
                                  else Path(name.lower()).suffixes[-1:]))
    assert is_right(name) and read(name) == read(Path(name).absolute()) == read(plain)
    config = override(get_pipeline_preset("local-smoke"),
                      parse_overrides("data.sources=" + shlex.quote(json.dumps([name]))))
    assert (data_files.data_names(config, "pretrain") == [name]
            and not data_files.missing_data(config, ["pretrain"]))
    assert ([entry["path"] for entry in data_files.data_files(config, "pretrain").values()]
            == [str(Path(name).absolute())])


@pytest.mark.fault("names")
@pytest.mark.parametrize("name", ["x" * 240 + ".txt", ".hidden.txt", "a b, [1]|#.jsonl", "..txt"])
def test_a_token_cache_is_made_of_any_name(name, tmp_path):
    put(name)
    cache = corpus.build_token_cache(
        name, "train", tokens.train_tokenizer(["The right one 1."], 280),
        cache_dir=tmp_path / "cache", progress=False)
    made = [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert len(cache) and len(made) == 1 and made[0][0] != "." and "-train-" in made[0]


@pytest.mark.fault("names")
@pytest.mark.parametrize(
    "name, message",
    [("", "is an empty name; is there a comma too many"),
     (" ", "is an empty name"), ("empty/", "is a folder; it holds no"),
     ("./sst2", "is a folder; name the files in it, for example 'sst2/notes.txt'"),
     ("sst2/", "is a folder"), ("book.docx", "a type that is not read; use .txt"),
     ("book", "a type that is not read"), ("https://x.org/a.txt", "is an address; download"),
     ("hf://datasets/x/a.jsonl", "is an address"), ("~nobody-here/a.txt", "no such file"),
     ("/nowhere/a.txt", "no such file"), ("./gone", "no such file"),
     ("y" * 300 + ".txt", "no such file .File name too long"), ("a\0b.txt", "no such file"),
     ("dangling.txt", "no such file"), ("book.txt/a.txt", "no such file .Not a directory"),
     (" b.txt", "JSON list"), (os.fsdecode(b"caf\xe9.txt"), "not UTF-8; rename"),
     ("pipe.txt", "neither a file"), ("tinystories ", "did you mean 'tinystories'"),
     ("text", "is unknown"), ("a;b", "is unknown")])
def test_what_is_no_source_says_what_is_there_instead(name, message):
    for file in ("sst2/notes.txt", "book.docx", "book", "book.txt", os.fsdecode(b"caf\xe9.txt")):
        put(file)
    os.mkdir("empty")
    os.symlink("gone", "dangling.txt")
    os.mkfifo("pipe.txt")
    with pytest.raises(DatasetNotFound, match=message) as caught:
        sources.find_source(name)
    assert repr(name) in str(caught.value)


@pytest.mark.fault("names")
def test_a_link_has_the_type_of_its_own_name():
    put("blobs/0a1b")
    os.symlink("blobs/0a1b", "story.txt")
    os.symlink("story.txt", "again.txt")
    assert is_right("story.txt") and is_right("again.txt")


@pytest.mark.fault("names")
def test_a_home_folder_may_be_meant(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "a.txt")
    assert is_right("~/a.txt")
    put("~/a.txt", "other")  # a folder really called so
    assert "other" in read("~/a.txt")[0]


@pytest.mark.fault("names")
@pytest.mark.parametrize("words, want", [
    ("data.sources=2024", ["2024"]), ("data.sources=true", ["true"]),
    ("data.sources=null,1e5", ["null", "1e5"]), ("data.sources=a.txt,b.txt", ["a.txt", "b.txt"]),
    ("'data.sources=a, b.txt'", ["a, b.txt"]),
    ("""'data.sources=["a, b.txt", "c.txt"]'""", ["a, b.txt", "c.txt"]),
    ("""'data.sources="a, b.txt"'""", ["a, b.txt"]), ("data.sources=[1].txt", ["[1].txt"]),
    ("data.sources=[1].txt,b.txt", ["[1].txt", "b.txt"]), ("data.sources={a,b}.txt", ["{a,b}.txt"]),
    ("data.sources=", []), ("data.sources=x,", ["x", ""]), ("data.sources=a=b.txt", ["a=b.txt"]),
    ("eval.baselines=my,model", ["my,model"]), ("sft.sources=7", ["7"]), ("data.sources=[]", []),
    ("""'data.sources=C:\\notes\\a.txt'""", ["C:\\notes\\a.txt"]), ("""'data.sources="'""", ['"']),
])
def test_a_list_of_names_holds_names(words, want):
    for name in ("a, b.txt", "{a,b}.txt", "my,model/config.json"):
        put(name)
    [[found]] = [values.values() for values in parse_overrides(words).values()]
    assert found == want
    assert (parse_overrides("sft.weights=1,2 eval.shots=4")
            == {"sft": {"weights": [1, 2]}, "eval": {"shots": [4]}})


@pytest.mark.fault("names")
@pytest.mark.parametrize("words", ["data.sources=a.txt,b.txt,a.txt", "sft.sources=alpaca,alpaca",
                                   "dpo.sources=synthetic,synthetic"])
def test_a_source_is_named_once(words):
    with pytest.raises(ConfigError, match=r"sources=.*names a source twice"):
        override(get_pipeline_preset("local-smoke"), parse_overrides(words))


@pytest.mark.fault("names")
@pytest.mark.parametrize("value, folder", [
    ("../mirror", "mirror"), ("~/mirror", "mirror"), ("../my [1]* data?", "my [1]* data?"),
    ("../ends with a space ", "ends with a space "), (" ../mirror ", "mirror"),
    ("../a::b,c=d #1", "a::b,c=d #1"),
])
def test_the_mirror_is_the_folder_that_is_named(value, folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MODERN_LLM_DATA", value)
    put(tmp_path / folder / "tinystories" / "train.jsonl")
    assert is_right("tinystories")


@pytest.mark.fault("names")
@pytest.mark.parametrize(
    "value, message", [("/nowhere", "MODERN_LLM_DATA=/nowhere is not a folder"),
                       ("a.txt", "is not a folder"), ("~nobody-here/x", "is not a folder"),
                       ("", "is not set"), ("  ", "is not set"), (".", "no files in tinystories")])
def test_a_mirror_that_is_none_is_named(value, message, monkeypatch):
    put("a.txt")
    monkeypatch.setenv("MODERN_LLM_DATA", value)
    with pytest.raises(DatasetNotFound, match=message):
        sources.find_source("tinystories")


@pytest.mark.fault("names")
def test_a_folder_does_not_stand_in_for_the_hub(monkeypatch):
    put("roneneldan/TinyStories/train.jsonl", "wrong")
    monkeypatch.setattr(reading, "hub_state", lambda info: "cached")
    with pytest.raises(DatasetNotFound,
                       match="here/roneneldan/TinyStories hides the hub's roneneldan/TinyStories"):
        reading.load_hub("tinystories", "train")


# ---- modern-llm datasets reads rows


def asked(*names):
    done = CliRunner().invoke(cli.main, ["datasets", *names])
    return done.exit_code, done.output


@pytest.mark.fault("promises")
@pytest.mark.parametrize(
    "name, content, message",
    [("a.jsonl", "not json\n", "line 1: 'not json' is not valid JSON"),
     ("a.jsonl", "", "the file is empty"),
     ("a.txt", " \n", "the file is empty"),
     ("a.csv", "text\na,b\n", "line 2: 2 cells"),
     ("a.jsonl", '{"story": "x"}\n', "line 1 has no field 'text', only ['story']"),
     ("a.parquet", "PAR1", "not a Parquet file"),
     ("a.jsonl", '{"text": "x"}\n' * 3000 + '{"text": 7}\n', "line 3001: text is an integer"),
     ("a.txt.gz", "plain", "Not a gzipped file")])
def test_a_damaged_file_is_called_damaged(name, content, message):
    Path(name).write_text(content)
    put("fine.txt")
    code, output = asked("fine.txt", name)
    assert code == 1 and f"Damaged: {name}. " in output and message in output, output
    rows = [line.split() for line in output.splitlines()]
    assert rows[1][:2] == ["fine.txt", "found"] and rows[2][:2] == [name, "damaged"]


@pytest.mark.fault("promises")
def test_what_is_here_is_read_and_counted(monkeypatch, tmp_path):
    Path("mine.jsonl").write_text('{"text": "one", "author": "Ida"}\n{"text": ""}\n')
    code, output = asked("mine.jsonl")
    assert code == 0 and "2 rows, 1 without text" in output and "columns: text, author" in output
    monkeypatch.setenv("MODERN_LLM_DATA", str(tmp_path / "mirror"))
    put(tmp_path / "mirror/tinystories/train.jsonl")
    for split, label in (("train", "1"), ("dev", "good")):
        put(tmp_path / f"mirror/sst2/{split}.tsv").write_text(f"sentence\tlabel\ngood\t{label}\n")
    assert asked()[0] == 0  # what nobody asked for may be missing
    put(tmp_path / "mirror/gsm8k/train.jsonl").write_text(
        '{"question": "How many?", "answer": 7}\n')
    code, output = asked()
    assert (code == 1 and "Damaged: gsm8k. " in output
            and "line 1: answer is an integer, 7" in output)


@pytest.mark.fault("names")
@pytest.mark.parametrize("first, second",
                         [("a.txt", "./a.txt"), ("a.txt", "sub/../a.txt"),
                          ("a.txt", "link.txt"), ("wikitext-2", "wikitext-2-raw-v1"),
                          ("tinystories", "roneneldan/TinyStories"), ("a.txt", "b.txt")])
def test_one_source_by_two_names_is_refused(first, second):
    for name in ("a.txt", "b.txt", "sub/c.txt"):
        put(name)
    os.symlink("a.txt", "link.txt")
    found = data_files.missing_data(
        override(get_pipeline_preset("local-smoke"), {"data": {"sources": [first, second]}}),
        ["pretrain"])
    twice = f"data: data.sources names the same source twice: {first!r} and {second!r}"
    assert (twice in found) == (second != "b.txt")
