"""A model's chat template: found where transformers finds it, rendered as transformers renders it.
Imports no torch.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from modern_llm.files import read_json
from modern_llm.messages import UserError

# what a template may ask for by name
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# turns of all the loops over numbers of one rendering, and characters of a repeated text
MOST = 100_000
# around text that only looks like a special token; noncharacters of Unicode, which no text has
TYPED = "\ufdd0", "\ufdd1"


class TemplateError(UserError, ValueError):
    """A chat template that cannot be used, or not for this conversation. The message names its file
    and line.
    """


# ---- reading -------------------------------------------------------------------------------------


def read_settings(folder: Path) -> dict:
    """What stands beside a tokenizer.json: the named tokens, the chat template and the file
    (`template_file`) it comes from.

    As in transformers, chat_template.jinja and additional_chat_templates/*.jinja go before the key
    in tokenizer_config.json, and of several templates the one called "default" is taken. Of two
    names of a token that in special_tokens_map.json counts; where tokenizer_config.json lists all
    tokens (added_tokens_decoder), that older file is not read. ValueError names a file that is
    damaged.
    """
    settings: dict = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path := folder / name).is_file():
            try:
                settings |= {} if "added_tokens_decoder" in settings else read_json(path)
            except ValueError as error:
                raise ValueError(f"{error}; copy it again") from error
    for name in NAMED:
        if isinstance(token := settings.get(name), dict):
            settings[name] = token.get("content")
    found, file = settings.pop("chat_template", None), folder / "tokenizer_config.json"
    if isinstance(found, list):  # as older versions of transformers wrote several
        found = {entry["name"]: entry["template"] for entry in found}
    more = {path.stem: path
            for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        more["default"] = folder / "chat_template.jinja"
    if more:
        try:
            found, file = ({name: path.read_text(encoding="utf-8") for name, path in more.items()},
                           more.get("default", folder))
        except UnicodeDecodeError as error:
            raise ValueError(f"a chat template in {folder} is not UTF-8: {error}") from error
    if isinstance(found, dict):
        names, found = sorted(found), found.get("default")
        if found is None and names:
            found = ("{{ raise_exception('there is none called default, only %s') }}"
                     % ", ".join(names).replace("'", ""))
    return settings | ({"chat_template": found, "template_file": str(file)} if found else {})


# ---- rendering -----------------------------------------------------------------------------------


class Generation(Extension):
    """`{% generation %}`, by which some templates mark what the assistant says; it writes nothing
    itself.
    """

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        """The block's content."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True),
                           lineno=line)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja for third-party templates: nothing but text can be reached, and no text becomes
    endless.
    """

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: object,
                   right: object) -> object:
        """A product, unless it would be huge."""
        sizes = [len(value) if isinstance(value, (str, list, tuple)) else abs(value)
                 for value in (left, right)]
        if ((operator == "**" and max(sizes) > 1000)
                or (operator == "*" and not all(isinstance(v, (int, float)) for v in (left, right))
                    and sizes[0] * sizes[1] > MOST)):
            raise OverflowError(f"{operator} makes something too large")
        return super().call_binop(context, operator, left, right)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _json(value: object, ensure_ascii: bool = False, indent: int | None = None,
          separators: tuple | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


@functools.lru_cache(maxsize=64)
def compiled(template: str, place: str) -> jinja2.Template:
    """The template as transformers compiles it. TemplateError names the line that is not Jinja."""
    jinja = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    jinja.filters["tojson"], jinja.globals["raise_exception"] = _json, _refuse
    try:
        return jinja.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"{place}, line {error.lineno} of the chat template: {error.message}; "
                            "fix it, or remove it") from error


def _numbers():
    left = [MOST]

    def numbers(*bounds: int) -> range:
        left[0] -= len(found := range(*bounds))
        if left[0] < 0:
            raise OverflowError(f"its loops go on for more than {MOST:,} turns")
        return found

    return numbers


@dataclass(frozen=True)
class ChatFormat:
    """One way to write a conversation down, as a Jinja template."""

    template: str
    closing: str | None = None  # the token that ends an answer; None is found by a trial
    place: str = "chat template"  # where it was read
    named: tuple[tuple[str, str], ...] = ()  # bos_token and its like
    date: str = ""  # what strftime_now tells, year-month-day; "" is today

    def render(self, messages: Sequence[dict], generation_prompt: bool = False) -> str:
        """The conversation as text, with the cue for an answer if it is wanted. TemplateError says
        what the template objects to.
        """
        day = datetime.datetime.fromisoformat(self.date) if self.date else datetime.datetime.now()
        template = compiled(self.template, self.place)
        try:
            return template.render(messages=[dict(message) for message in messages],
                                   add_generation_prompt=generation_prompt, tools=None,
                                   documents=None, strftime_now=day.strftime, range=_numbers(),
                                   **dict(self.named))
        except Exception as error:  # whatever a third-party template runs into
            line = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                    if frame.filename == "<template>"]
            raise TemplateError(
                f"{self.place}{f', line {line[-1]} of the chat template' if line else ''}: it "
                "refuses a conversation of "
                f"{', '.join(message['role'] for message in messages) or 'no message'}: {error}"
            ) from error


@functools.lru_cache(maxsize=64)
def closing_token(form: ChatFormat, tokens: tuple[str, ...]) -> str:
    """The one of `tokens` that a format writes behind an answer. TemplateError if it writes none:
    nobody could learn where to stop.
    """
    if form.closing:
        return form.closing
    text = form.render([{"role": "user", "content": "question"},
                        {"role": "assistant", "content": "an answer"}])
    before, answer, behind = text.rpartition("an answer")
    if not answer:
        raise TemplateError(f"{form.place}: the chat template leaves out what the assistant says")
    if found := re.search(
        "|".join(map(re.escape, sorted(filter(str.strip, tokens), key=len, reverse=True))) or "$^",
        behind):
        return found[0]
    raise TemplateError(
        f"{form.place}: the chat template writes no special token behind an answer, so that nobody "
        "can learn where one ends; let it write eos_token there")


def bundled_format(settings: dict) -> ChatFormat | None:
    """The format that came with a tokenizer, by its settings; None if it came without."""
    own = settings.get("modern_llm", {})
    named = tuple((name, settings[name]) for name in NAMED if isinstance(settings.get(name), str))
    return ChatFormat(settings["chat_template"], None,
                      settings.get("template_file", "chat template"), named, own.get(
                          "template_date", "")) if settings.get("chat_template") else None


# ---- text of users -------------------------------------------------------------------------------


def as_typed(text: str, tokens: Sequence[str]) -> str:
    """The text with marks around all in it that only looks like a special token."""
    for mark in TYPED:
        text = text.replace(mark, "\ufffd")
    pattern = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
    return (re.sub(pattern, lambda found: f"{TYPED[0]}{found[0]}{TYPED[1]}", text) if pattern
            else text)


def typed_places(marked: str) -> tuple[str, list[int]]:
    """The text without marks, and where in it the marked parts begin."""
    text, places = "", []
    for piece in re.split(f"({TYPED[0]}[^{TYPED[0]}{TYPED[1]}]+{TYPED[1]})", marked):
        if piece[:1] == TYPED[0] and piece[-1:] == TYPED[1]:
            places.append(len(text))
        text += re.sub(f"[{''.join(TYPED)}]", "", piece)
    return text, places
