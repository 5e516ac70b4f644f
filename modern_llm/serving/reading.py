"""What a model reads of a request: token ids of its prompt, within the context, and what each token
of an answer was written from.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from modern_llm.data.chat import encode_chat, end_id, stop_sequences
from modern_llm.data.tokens import encode_documents, end_of_text_id
from modern_llm.evaluation.attention import attention_maps
from modern_llm.serving.protocol import Refused, wrong
from modern_llm.serving.worker import Served, Worker

LONGEST = 400  # tokens whose attention is shown; the memory of the maps has their square
ENCODING = threading.Lock()  # a tokenizer is switched while it encodes


def chat_prompt(served: Served, messages: Sequence[dict]) -> list[int]:
    """Token ids of a conversation, up to the place where the answer begins.

    Raises:
        Refused: a model that was not tuned for chat, a conversation that its template refuses, or
            one that leaves no room for an answer.
    """
    if not served.chats:
        raise Refused(400, f"{served.name} is a base model, never taught to answer: it continues "
                           "text, POST /v1/completions; or choose a model that chats", "model",
                      "model_without_chat")
    try:
        with ENCODING:
            ids = encode_chat(served.tokenizer, messages, generation_prompt=True)
    except ValueError as error:
        raise Refused(400, str(error), "messages", "invalid_value") from error
    return fitting(served, ids, "messages")


def completion_prompt(served: Served, prompt: str | list[int]) -> list[int]:
    """Token ids of a text to continue, behind the token that begins a document; ids are taken as
    they are. Refused if there is no room for an answer, or an id is of no token.
    """
    if isinstance(prompt, str):
        with ENCODING:
            ids = [end_of_text_id(served.tokenizer),
                   *encode_documents(served.tokenizer, [prompt])[0]]
    else:
        ids, size = prompt, served.tokenizer.get_vocab_size()
        if not 0 <= min(ids) <= max(ids) < size:
            raise wrong("prompt", min(ids) if min(ids) < 0 else max(ids),
                        f"token ids from 0 to {size - 1}")
    return fitting(served, ids, "prompt")


def fitting(served: Served, ids: list[int], param: str) -> list[int]:
    """The ids, if the context has room for them and an answer."""
    if len(ids) >= served.context:
        raise Refused(400, f"{param} has {len(ids)} tokens, and with room for an answer the "
                           f"context of {served.name} holds {served.context - 1}: shorten it",
                      param, "context_length_exceeded")
    return ids


def endings(served: Served, chat: bool) -> tuple[int, list[list[int]]]:
    """The token that ends an answer, and further sequences that do."""
    ending = end_id(served.tokenizer) if chat else end_of_text_id(served.tokenizer)
    return ending, stop_sequences(served.tokenizer, ending)


def attention_of(worker: Worker, served: Served, ids: list[int], answer: str,
                 layer: int | None = None, head: int | None = None) -> dict:
    """What every token of an answer was written from: the attention of the position before it, in
    the worker's thread.

    Args:
        ids: of the prompt.
        answer: text, encoded anew.
        layer: which, from 0; None is the last.
        head: which, from 0; None is the mean of all.

    Returns:
        "tokens" as text, prompt and answer; "start", where the answer begins; "weights", for each
        token of it those on all tokens before; "layers" and "heads", how many there are.
    """
    with ENCODING:
        said, = encode_documents(served.tokenizer, [answer])
    whole, cfg = [*ids, *said], worker.model(served).cfg
    if len(whole) > (most := min(LONGEST, served.context)):
        raise Refused(400, f"prompt and answer have {len(whole)} tokens, and attention is shown of "
                           f"{most} at most", "answer", "context_length_exceeded")
    for name, value, count in (("layer", layer, cfg.num_layers), ("head", head, cfg.num_heads)):
        if value is not None and not 0 <= value < count:
            raise wrong(name, value, f"a whole number from 0 to {count - 1}, or null")
    maps = attention_maps(worker.model(served), torch.tensor([whole[:-1]]))[:, 0]
    of_layer = maps[-1 if layer is None else layer]
    weights = of_layer.mean(0) if head is None else of_layer[head]
    rows = weights[len(ids) - 1:].tolist()
    return {"tokens": [served.tokenizer.decode([i], skip_special_tokens=False) for i in whole],
            "start": len(ids), "layers": cfg.num_layers, "heads": cfg.num_heads,
            "weights": [[round(weight, 4) for weight in row[:len(ids) + place]]
                        for place, row in enumerate(rows)]}
