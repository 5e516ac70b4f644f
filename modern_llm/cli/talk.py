"""Talking to a finished model: what `modern-llm chat` and `modern-llm sample` do. Plain plumbing
over chat and generation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from modern_llm.config import GENERATORS
from modern_llm.data.chat import (
    DEFAULT_FORMAT, chat_format, encode_chat, end_id, is_chat_model, stop_sequences,
)
from modern_llm.data.tokens import encode_documents, end_of_text_id, load_tokenizer
from modern_llm.interchange.hub import find_checkpoint, is_model
from modern_llm.messages import StageError, say
from modern_llm.models.generation import generate, stream
from modern_llm.models.saving import load_model
from modern_llm.runs.parameters import chosen_folder
from modern_llm.training.training_state import pick_device

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from modern_llm.models.decoder import ModernDecoderLM


def choose_model(run: str | None, stage: str | None, checkpoint: str | None,
                 output_dir: str | None) -> Path:
    """The checkpoint folder that the words name; StageError says what was tried."""
    if stage is not None and stage not in GENERATORS:
        raise StageError(f"stage {stage!r} makes no language model; use one of "
                         f"{', '.join(reversed(GENERATORS))}")
    folder = chosen_folder(run, checkpoint, output_dir)
    if checkpoint and stage and is_model(folder) and folder.resolve().parent.name != stage:
        raise StageError(f"--stage {stage} chooses among the stages of a run, and {folder} is "
                         "one checkpoint: leave --stage out")
    return find_checkpoint(folder / stage if stage and (run or not is_model(folder)) else folder)


def readable(text: str) -> str:
    """Text that any tokenizer takes: what stands for a byte that is not UTF-8, and half of a
    character, is U+FFFD.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def open_model(run: str | None, stage: str | None, checkpoint: str | None, output_dir: str | None,
               device: str = "auto",
               purpose: str = "sample") -> tuple[ModernDecoderLM, Tokenizer, Path]:
    """A model, its tokenizer and the folder they came from."""
    folder = choose_model(run, stage, checkpoint, output_dir)
    model, tokenizer = load_model(folder, device=pick_device(device)), load_tokenizer(folder)
    if purpose == "chat" and not is_chat_model(folder, tokenizer):
        if chat_format(tokenizer) is not DEFAULT_FORMAT:
            end_id(tokenizer)  # a template that cannot be used says so itself
        raise StageError(f"{folder} is a base model: it was never taught to answer. Use "
                         "`modern-llm sample` with it, or run the sft stage")
    return model, tokenizer, folder


def context_full(model: ModernDecoderLM) -> str:
    """Why a text ended that the model did not end, and what goes on."""
    return (f"the context of {model.cfg.context_length} tokens is full, so the text ends here; "
            "--streaming writes on, seeing the first and the last of it")


class Chat:
    """A conversation with a model; the oldest turns are forgotten when the context is full, which
    `note` is told.

    Whatever ends an answer early, the history has whole turns: of an interrupted answer what was
    said, of a failed one nothing.
    """

    def __init__(self, model: ModernDecoderLM, tokenizer: Tokenizer, max_new_tokens: int = 128,
                 temperature: float = 0.7, seed: int = 0, note: Callable[[str], None] = say,
                 streaming: bool = False):
        self.streaming = streaming
        self.model, self.tokenizer, self.history, self.note = model, tokenizer, [], note
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed

    def prompt(self, request: str) -> list[int]:
        """Token ids of as many turns as leave room for an answer, and the request. ValueError if it
        alone leaves none.
        """
        room = self.model.cfg.context_length
        wanted = min(self.max_new_tokens, room // 2)
        turns = [*self.history, {"role": "user", "content": readable(request)}]
        while True:
            ids = encode_chat(self.tokenizer, turns, generation_prompt=True)
            if len(ids) + wanted <= room or len(turns) == 1:
                break
            turns = turns[2:]
        if len(ids) >= room:
            frame = len(encode_chat(self.tokenizer, [{"role": "user", "content": ""}],
                                    generation_prompt=True))
            raise ValueError(f"the message has {len(ids) - frame} tokens; with room for an answer, "
                             f"at most {max(0, room - 1 - frame)} fit into the "
                             f"context of this model, {room} tokens: ask something shorter. The "
                             "conversation goes on as it was")
        if forgotten := len(self.history) + 1 - len(turns):
            which = "turn is" if forgotten == 2 else f"{forgotten // 2} turns are"
            self.note(f"(the context of {room} tokens is full: the oldest {which} forgotten)")
        self.history = turns
        return ids

    def reply(self, request: str) -> Iterator[str]:
        """The answer, piece by piece; the pieces joined are the text of all its tokens."""
        before, tokens, said, reasons = self.history, [], "", []
        ids = self.prompt(request)
        try:
            for token in stream(self.model, ids, max_new_tokens=self.max_new_tokens,
                                streaming=self.streaming, reasons=reasons,
                                temperature=self.temperature, seed=self.seed + len(self.history),
                                eos_id=(end := end_id(self.tokenizer)),
                                stop=stop_sequences(self.tokenizer, end)):
                tokens.append(token)
                text = self.tokenizer.decode(tokens)
                if text.endswith("\ufffd"):  # half of a character
                    continue
                piece, said = text[len(said):], text
                yield piece
        except Exception:
            self.history = before
            raise
        except BaseException:  # Ctrl-C, or nobody reads on: what was said was said
            self.history = [*self.history, {"role": "assistant", "content": said}]
            raise
        rest = self.tokenizer.decode(tokens)
        self.history = [*self.history, {"role": "assistant", "content": rest}]
        if rest != said:
            yield rest[len(said):]
        if reasons == ["context"]:
            self.note(f"\n({context_full(self.model)})")


SAMPLES_AT_ONCE = 64


def samples(model: ModernDecoderLM, tokenizer: Tokenizer, folder: Path, prompt: str, count: int,
            max_new_tokens: int = 128, temperature: float = 0.7, seed: int = 0,
            streaming: bool = False, note: Callable[[str], None] = say) -> Iterator[str]:
    """`count` texts: continuations of the prompt by a base model, answers to it by a model that
    chats. Nothing in the prompt is special. `note` is told of texts that fill the context.
    """
    prompt = readable(prompt)
    if is_chat_model(folder, tokenizer) and prompt:
        ids, ending = encode_chat(tokenizer, [{"role": "user", "content": prompt}],
                                  generation_prompt=True), end_id(tokenizer)
        opening = ""
    else:
        ids, ending = ([end_of_text_id(tokenizer), *encode_documents(tokenizer, [prompt])[0]],
                       end_of_text_id(tokenizer))
        opening = prompt
    for first in range(0, count, SAMPLES_AT_ONCE):
        # each text has a stream of draws of its own
        numbers, reasons = range(first, min(count, first + SAMPLES_AT_ONCE)), []
        for tokens in generate(model, [ids], samples=len(numbers), streams=numbers,
                               max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
                               eos_id=ending, stop=stop_sequences(tokenizer, ending),
                               streaming=streaming, reasons=reasons):
            yield opening + tokenizer.decode(tokens)
        if full := reasons.count("context"):
            note(f"({full} of {len(numbers)}: {context_full(model)})")
