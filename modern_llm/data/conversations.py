"""Rows of chat data sets as conversations: lists of messages, each with a role and a content, which
begin with the user. Imports no torch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from modern_llm.data.sources import DataError

Messages = list[dict[str, str]]  # "role": "user" or "assistant" in turn, "content": text


def turns(texts: Iterable[str]) -> Messages:
    """Texts as messages: the user's and the assistant's in turn."""
    return [{"role": ("user", "assistant")[number % 2], "content": text}
            for number, text in enumerate(texts)]


def instruction(row: dict) -> Messages:
    """A row of Alpaca: the instruction, with its input below it, and the output."""
    return turns([f"{row['instruction'].strip()}\n{row['input'].strip()}".strip(),
                  row["output"].strip()])


def best_paths(messages: Iterable[dict], languages: Sequence[str] = ("en",)) -> Iterator[Messages]:
    """One conversation of each message tree: from its root down, always the best-ranked reply.

    Args:
        messages: rows with message_id, parent_id (None at a root), text, role ("prompter" or
            "assistant"), rank (0 is best, None unranked) and lang, in any order (OpenAssistant,
            Köpf et al. 2023, 2304.07327).
        languages: of the roots to keep.

    A reply to a message that is not among the rows, and an empty one, is left out. A tree nobody
    answered is its question alone. A last question without an answer is left out.
    """
    replies, roots, seen = defaultdict(list), [], set()
    for message in messages:
        place, role = getattr(message, "place", "oasst1"), message["role"]
        if message["message_id"] in seen:
            raise DataError(f"{place}: the message_id {message['message_id']!r} is there twice")
        seen.add(message["message_id"])
        if role not in ("prompter", "assistant"):
            raise DataError(f"{place}: role {role!r} is not 'prompter' or 'assistant'")
        if message.get("parent_id"):
            replies[message["parent_id"]].append(message)
        elif role == "prompter":
            roots.append(message)
        else:
            raise DataError(
                f"{place}: an assistant's message has no parent_id, but answers something")
    if roots and not (there := {root["lang"] for root in roots}) & set(languages):
        file = place.partition(": ")[0]
        raise DataError(f"{file}: no conversation is in {', '.join(languages)}, only in "
                        f"{', '.join(sorted(there))}")
    for root in (root for root in roots if root["lang"] in languages):
        path = [root]
        while answers := [m for m in replies[path[-1]["message_id"]]
                          if m["role"] != path[-1]["role"] and m["text"].strip()]:
            path.append(min(answers, key=lambda m: math.inf if (rank := m.get("rank")) is None
                                                               or math.isnan(rank) else rank))
        texts = [message["text"] for message in path]
        yield turns(texts[:max(1, len(texts) // 2 * 2)])
