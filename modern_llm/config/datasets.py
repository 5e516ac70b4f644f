"""The data sets by their short names: one entry each, which says where it lies, under which
licence, what a row of it is, and what reads one.

An entry is all there is to add for a new data set: every setting that wants its kind accepts it,
and every stage reads it by its parser. No data are read here, and no parser is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module

# what a parser makes of a row: a text (str); chat messages; data.pairs.Pair, or why it is none;
# data.synth.Problem; data.synth.Review
KINDS = ("text", "chats", "pairs", "problems", "sentences")
# kinds that a model can be asked in a chat, and so be tuned on
CHAT_KINDS = ("chats", "problems", "sentences")
BUILT_IN = ("synthetic", "synthetic-problems")  # sources written by a program, of every kind


@dataclass(frozen=True)
class DatasetInfo:
    """What is known about a data set before it is opened."""

    name: str
    hub: str  # path on the Hugging Face hub; "" = not there
    licence: str
    kind: str  # what a row is, one of KINDS
    fields: tuple[str, ...]  # columns that, joined, make a document
    # a row -> an item of the kind: a function, or where it is, "package.module:name"; "" = of a
    # text: the fields, joined
    parse: Callable | str = ""
    # `parse` takes all the rows of a split at once, where an item is spread over several
    parses_all: bool = False
    config: str | None = None
    revision: str | None = None
    folders: tuple[str, ...] = ()  # folder names in a mirror, besides `name`
    # split -> file names in a mirror
    files: dict[str, tuple[str, ...]] = field(default_factory=dict)
    hub_splits: tuple[str, ...] = ("train",)
    aliases: tuple[str, ...] = ()
    note: str = ""  # what to know about the files in `files`
    key: Callable[[dict], str] | None = None  # text that decides on which side of a cut a row falls
    optional: tuple[str, ...] = ()  # fields that a row may lack: missing, null and "" are the same
    # further columns that `parse` reads, with their types
    columns: dict[str, tuple[type, ...]] = field(default_factory=dict)
    test_split: str = "test"  # another one where the labels of that are not public

    @property
    def is_wikitext(self) -> bool:
        """Whether the rows are lines of articles; a file of your own is not, whatever it is called.
        """
        return self.hub == "Salesforce/wikitext"

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """The further columns that every row must have."""
        return tuple(name for name, types in self.columns.items() if type(None) not in types)


def _question(row: dict) -> str:
    return str(row.get("chosen", "")).split("\n\nAssistant:")[0]


_RAW_WIKITEXT = {split: (f"wiki.{short}.raw",) for split, short in
                 (("train", "train"), ("validation", "valid"), ("test", "test"))}
_WIKITEXT_2 = {"train": ("train.txt.gz",), "validation": ("valid.txt.gz",),
               "test": ("raw_test.txt.gz",)}
_HH = tuple(f"{part}-test.jsonl.gz" for part in
            ("helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base"))
_ALL = ("train", "validation", "test")
_PARQUET = "refs/convert/parquet"  # the hub's own conversion, for data sets that were scripts

DATASET_REGISTRY: dict[str, DatasetInfo] = {info.name: info for info in (
    DatasetInfo("synthetic", "", "MIT", "text", ("text",), hub_splits=("train", "validation")),
    DatasetInfo("wikitext-2-raw-v1", "Salesforce/wikitext", "CC BY-SA 3.0", "text", ("text",),
                config="wikitext-2-raw-v1", folders=("wikitext2", "wikitext-2"), files=_WIKITEXT_2,
                hub_splits=_ALL, aliases=("wikitext-2",),
                note="tokenised text with <unk>, not the raw one"),
    DatasetInfo("wikitext-103-raw-v1", "Salesforce/wikitext", "CC BY-SA 3.0", "text", ("text",),
                config="wikitext-103-raw-v1", folders=("wikitext103", "wikitext-103"),
                files=_RAW_WIKITEXT, hub_splits=_ALL, aliases=("wikitext-103",)),
    DatasetInfo("tinystories", "roneneldan/TinyStories", "CDLA-Sharing-1.0", "text", ("text",),
                hub_splits=("train", "validation")),
    DatasetInfo("openwebtext", "Skylion007/openwebtext", "CC0 (packaging)", "text", ("text",),
                revision=_PARQUET),
    DatasetInfo("bookcorpus", "bookcorpus/bookcorpus", "unknown", "text", ("text",),
                revision=_PARQUET),
    DatasetInfo("alpaca", "tatsu-lab/alpaca", "CC BY-NC 4.0", "chats",
                ("instruction", "input", "output"), "modern_llm.data.conversations:instruction",
                files={"train": ("random_9k.jsonl.gz", "extra.jsonl.gz")},
                key=lambda row: str(row.get("instruction")), optional=("input",)),
    DatasetInfo("oasst1", "OpenAssistant/oasst1", "Apache-2.0", "chats", ("text",),
                "modern_llm.data.conversations:best_paths", parses_all=True,
                hub_splits=("train", "validation"),
                key=lambda row: str(row.get("message_tree_id") or row.get("text")),
                columns={**dict.fromkeys(("message_id", "role", "lang"), (str,)),
                         "parent_id": (str, type(None)), "rank": (int, float, type(None))}),
    DatasetInfo("hh-rlhf", "Anthropic/hh-rlhf", "MIT", "pairs", ("chosen",),
                "modern_llm.data.pairs:dialogue_pair", files={"test": _HH},
                hub_splits=("train", "test"), key=_question, columns={"rejected": (str,)}),
    DatasetInfo("gsm8k", "openai/gsm8k", "MIT", "problems", ("question", "answer"),
                "modern_llm.data.tasks:marked_problem", config="main",
                hub_splits=("train", "test"), key=lambda row: str(row.get("question"))),
    DatasetInfo("sst2", "stanfordnlp/sst2", "see its authors", "sentences", ("sentence",),
                "modern_llm.data.tasks:labelled_sentence", folders=("sst-2", "SST-2"),
                files={"train": ("train.tsv.gz",),
                       "validation": ("dev.tsv",), "test": ("test_labeled.tsv",)},
                hub_splits=_ALL, aliases=("glue/sst2",), columns={"label": (int, str)},
                test_split="validation"),
)}


def register_dataset(info: DatasetInfo) -> DatasetInfo:
    """Add an entry from outside, for this process: its name is then accepted wherever its kind is.

    Raises:
        ValueError: the name is taken, the kind unknown, or there is no parser for it.
    """
    taken = {*BUILT_IN, "text", *DATASET_REGISTRY,
             *(alias for known in DATASET_REGISTRY.values() for alias in known.aliases)}
    if info.name in taken or info.name != info.name.lower() or not info.name:
        raise ValueError(f"register_dataset: the name {info.name!r} is taken, or has capital "
                         "letters; call the data set otherwise")
    refused = f"register_dataset: {info.name}: "
    if info.kind not in KINDS:
        raise ValueError(f"{refused}kind {info.kind!r} is none of {', '.join(KINDS)}")
    if info.kind != "text" and not info.parse:
        raise ValueError(f"{refused}rows become {info.kind} by a parser; give parse=")
    if info.kind == "text" and info.parse:
        raise ValueError(f"{refused}a text is its fields, joined; leave parse= out")
    DATASET_REGISTRY[info.name] = info
    return info


def function_of(given: Callable | str) -> Callable:
    """A function or class, given as itself or by where it is: "package.module:name"."""
    if callable(given):
        return given
    module, _, name = given.partition(":")
    return getattr(import_module(module), name)


def names_of(*kinds: str) -> tuple[str, ...]:
    """The names that a setting may give which wants data of these kinds.

    The built-in world serves every kind as "synthetic"; where several kinds will do, it has its
    problems by a name of their own.
    """
    return (*BUILT_IN[:1 + (len(kinds) > 1)],
            *(name for name, info in DATASET_REGISTRY.items()
              if info.kind in kinds and name not in BUILT_IN))


def columns_of(kind: str) -> tuple[str, str]:
    """A data set of a kind, and the columns in words that rows of one's own need to be read by its
    name.
    """
    info = DATASET_REGISTRY[next(name for name in names_of(kind) if name not in BUILT_IN)]
    *others, last = (*info.fields, *info.needed_columns)
    return info.name, f"{', '.join(others)} and {last}" if others else last
