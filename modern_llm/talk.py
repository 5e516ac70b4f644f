"""Talking to a finished model: what `modern-llm chat` and `modern-llm sample` do. Plain plumbing over chat and generation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from modern_llm.chat import encode_chat, end_id, other_ends, speaks_chat
from modern_llm.checkpoints import pick_device
from modern_llm.generation import generate, stream
from modern_llm.inputs import GENERATORS, StageError, find_checkpoint, is_model
from modern_llm.models import load_model
from modern_llm.parameters import runs_folder
from modern_llm.tokens import end_of_text_id, load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from modern_llm.models import ModernDecoderLM


def choose_model(run: str | None, stage: str | None, checkpoint: str | None, output_dir: str | None) -> Path:
    """The checkpoint folder that the words name; StageError says what was tried."""
    if stage is not None and stage not in GENERATORS:
        raise StageError(f"stage {stage!r} makes no language model; use one of {', '.join(reversed(GENERATORS))}")
    root = Path(output_dir or runs_folder()).expanduser()
    if run and checkpoint:
        raise StageError("say either --run or --checkpoint, not both")
    if checkpoint:
        folder = Path(checkpoint).expanduser()
        if stage and is_model(folder) and folder.resolve().parent.name != stage:
            raise StageError(f"--stage {stage} chooses among the stages of a run, and {folder} is one checkpoint: leave --stage out")
    elif run:
        folder = root / run
    else:
        there = sorted(path.parent.name for path in root.glob("*/run.json"))
        raise StageError(f"which model? Say --run NAME or --checkpoint PATH; runs in {root}: {', '.join(there) or 'none'}")
    return find_checkpoint(folder / stage if stage and (run or not is_model(folder)) else folder)


def open_model(run: str | None, stage: str | None, checkpoint: str | None, output_dir: str | None, device: str = "auto",
               purpose: str = "sample") -> tuple[ModernDecoderLM, Tokenizer, Path]:
    """A model, its tokenizer and the folder they came from."""
    folder = choose_model(run, stage, checkpoint, output_dir)
    tokenizer = load_tokenizer(folder)
    if purpose == "chat" and not speaks_chat(folder, tokenizer):
        raise StageError(f"{folder} is a base model: it was never taught to answer. Use `modern-llm sample` with it, or run the sft stage")
    return load_model(folder, device=pick_device(device)), tokenizer, folder


class Chat:
    """A conversation with a model; the oldest turns are forgotten when the context is full."""

    def __init__(self, model: ModernDecoderLM, tokenizer: Tokenizer, max_new_tokens: int = 128, temperature: float = 0.7, seed: int = 0):
        self.model, self.tokenizer, self.history = model, tokenizer, []
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed

    def prompt(self, request: str) -> list[int]:
        """Token ids of as many turns as leave room for an answer, and the request. ValueError if it alone leaves none."""
        room = self.model.cfg.context_length
        wanted = min(self.max_new_tokens, room // 2)
        turns = [*self.history, {"role": "user", "content": request}]
        while True:
            ids = encode_chat(self.tokenizer, turns, generation_prompt=True)
            if len(ids) + wanted <= room or len(turns) == 1:
                break
            turns = turns[2:]
        if len(ids) >= room:
            raise ValueError(f"the request has {len(ids)} tokens and the context of this model {room}: ask something shorter")
        self.history = turns
        return ids

    def reply(self, request: str) -> Iterator[str]:
        """The answer, piece by piece; the pieces joined are the text of all its tokens."""
        ids, tokens, said = self.prompt(request), [], ""
        for token in stream(self.model, ids, max_new_tokens=self.max_new_tokens, temperature=self.temperature,
                            seed=self.seed + len(self.history), eos_id=(end := end_id(self.tokenizer)), stop=other_ends(self.tokenizer, end)):
            tokens.append(token)
            text = self.tokenizer.decode(tokens)
            if text.endswith("\ufffd"):  # half of a character
                continue
            yield text[len(said):]
            said = text
        rest = self.tokenizer.decode(tokens)
        if rest != said:
            yield rest[len(said):]
        self.history.append({"role": "assistant", "content": rest})


def samples(model: ModernDecoderLM, tokenizer: Tokenizer, folder: Path, prompt: str, count: int, max_new_tokens: int = 128,
            temperature: float = 0.7, seed: int = 0) -> list[str]:
    """`count` texts: continuations of the prompt by a base model, answers to it by a model that chats."""
    if speaks_chat(folder, tokenizer) and prompt:
        ids, ending = encode_chat(tokenizer, [{"role": "user", "content": prompt}], generation_prompt=True), end_id(tokenizer)
        opening = ""
    else:
        ids, ending = [end_of_text_id(tokenizer), *tokenizer.encode(prompt, add_special_tokens=False).ids], end_of_text_id(tokenizer)
        opening = prompt
    answers = generate(model, [ids], samples=count, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, eos_id=ending,
                       stop=other_ends(tokenizer, ending))
    return [opening + tokenizer.decode(tokens) for tokens in answers]
