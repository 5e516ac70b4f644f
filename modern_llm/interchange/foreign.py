"""A third-party model, adapted to the interface of `ModernDecoderLM` that generation and the
evaluation functions use.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from modern_llm.models.attention import attention_mask

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# what configs call it
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
NO_LIMIT = 2048  # context of a model that states none, because its positions have no end


@dataclass(frozen=True)
class AdapterConfig:
    """What the functions here ask of `model.cfg`."""

    architecture: str
    context_length: int
    vocab_size: int
    width: int


class AdapterCache:
    """transformers' own cache with the counting of `KVCache`: rows are padded at the left and all
    end at the same index.

    Args:
        config: of the transformers model.
        batch: rows b.
        max_length: tokens a row can hold, padding included.
        pad_lengths: padding at the left of each row; None is no padding.
    """

    def __init__(self, config: object, batch: int, max_length: int, pad_lengths: Int[Tensor, "b"]):
        from transformers import DynamicCache

        self.past, self.max_length, self.length = DynamicCache(config=config), max_length, 0
        self.pad_lengths = pad_lengths

    def positions(self, t: int) -> Int[Tensor, "b t"]:
        """Positions of the next t tokens: the index without the padding; padding itself sits at 0.
        """
        index = torch.arange(self.length, self.length + t, device=self.pad_lengths.device)
        return (index - self.pad_lengths[:, None]).clamp(min=0)

    def mask(self, t: int) -> Int[Tensor, "b s"]:
        """1 for every token written or about to be, 0 for padding.

        Raises:
            ValueError: t more tokens do not fit `max_length`.
        """
        end = self.length + t
        if end > self.max_length:
            raise ValueError(f"AdapterCache: {end} tokens do not fit max_length={self.max_length}; "
                             "allocate a longer cache")
        return (
            (torch.arange(end, device=self.pad_lengths.device) >= self.pad_lengths[:, None]).long())

    def advance(self, t: int) -> None:
        """Count t tokens as written."""
        self.length += t

    def select(self, rows: Int[Tensor, "rows"]) -> None:
        """Keep these rows, in this order: finished rows leave, or a prompt is repeated for several
        samples.
        """
        self.past.batch_select_indices(rows)
        self.pad_lengths = self.pad_lengths[rows]


class TransformersLM(nn.Module):
    """A causal language model of transformers, called as `ModernDecoderLM` is.

    Args:
        model: what `AutoModelForCausalLM` made.

    Raises:
        ValueError: the model cannot be called so: its head is more than a matrix product, or
            padding changes its answers.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, config = model, model.config.get_text_config()
        context = next((value for name in CONTEXT_NAMES
                        if isinstance(value := getattr(config, name, None), int)), NO_LIMIT)
        self.cfg = AdapterConfig(type(model).__name__, context, *self.lm_head.weight.shape)
        self.takes_positions = ("position_ids"
                                in inspect.signature(model.base_model.forward).parameters)
        windowed = (bool(getattr(config, "sliding_window", None))
                    and getattr(config, "use_sliding_window", True))
        # whether documents in one row can be kept apart
        self.packs = self.takes_positions and not windowed
        self.eval()
        self.check()

    @property
    def embed_tokens(self) -> nn.Module:
        return self.model.get_input_embeddings()

    @property
    def lm_head(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def hidden(
        self, input_ids: Int[Tensor, "b t"],
        segment_ids: Int[Tensor, "b t"] | None = None, cache: AdapterCache | None = None
    ) -> tuple[Float[Tensor, "b t c"], Float[Tensor, ""]]:
        """What the head reads, and 0 for the loss of routers.

        With `segment_ids` every document is read alone, from position 0. New keys and values go to
        the `cache`.

        Raises:
            ValueError: documents cannot be told apart in this model, or not together with a cache.
        """
        options: dict = {"use_cache": cache is not None}
        if cache is not None:
            if segment_ids is not None:
                raise ValueError("TransformersLM: segment_ids belong to packed rows; leave them "
                                 "out with a cache")
            options |= {"attention_mask": cache.mask(input_ids.shape[1]),
                        "past_key_values": cache.past}
            positions = cache.positions(input_ids.shape[1])
        elif segment_ids is not None:
            options["attention_mask"], positions = self.documents(segment_ids)
        if self.takes_positions and (cache is not None or segment_ids is not None):
            options["position_ids"] = positions
        hidden = self.model.base_model(input_ids, **options).last_hidden_state
        if cache is not None:
            cache.advance(input_ids.shape[1])
        return hidden, hidden.new_zeros((), dtype=torch.float32)

    def documents(
        self, segment_ids: Int[Tensor, "b t"]
    ) -> tuple[Float[Tensor, "b 1 t t"], Int[Tensor, "b t"]]:
        """The mask (0 = may read, else very negative) and the positions of rows in which each
        document is read alone.
        """
        if not self.packs:
            raise ValueError(
                f"{self.cfg.architecture} cannot keep packed documents apart (a sliding window, or "
                "positions that cannot be set): score its documents one per row")
        t, kind = segment_ids.shape[1], self.embed_tokens.weight.dtype
        allowed = attention_mask(t, t, segment_ids=segment_ids, device=segment_ids.device)
        index = torch.arange(t, device=segment_ids.device).expand_as(segment_ids)
        begins = torch.ones_like(segment_ids, dtype=torch.bool)
        begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
        starts = torch.where(begins, index, 0).cummax(1).values
        mask = torch.zeros(allowed.shape, dtype=kind, device=index.device).masked_fill(
            ~allowed, torch.finfo(kind).min)
        return mask, index - starts

    def forward(self, input_ids: Int[Tensor, "b t"], segment_ids: Int[Tensor, "b t"] | None = None,
                cache: AdapterCache | None = None) -> Float[Tensor, "b t v"]:
        """Logits of the token that follows each position."""
        return self.lm_head(self.hidden(input_ids, segment_ids, cache)[0])

    def new_cache(self, batch: int, max_length: int,
                  pad_lengths: Int[Tensor, "b"] | None = None) -> AdapterCache:
        """An empty cache of `max_length` tokens for `batch` rows."""
        device = self.embed_tokens.weight.device
        padding = (torch.zeros(batch, dtype=torch.long, device=device) if pad_lengths is None
                   else pad_lengths.to(device))
        return AdapterCache(self.model.config, batch, max_length, padding)

    @torch.inference_mode()
    def check(self) -> None:
        """Compare some of the model's own logits with the same ones through the head, a cache, left
        padding and packed documents.

        Raises:
            ValueError: the model cannot be called so, or then answers otherwise. Without packed
                documents it can be used.
        """
        device = self.embed_tokens.weight.device
        ids = torch.arange(1, 7, device=device) % self.cfg.vocab_size
        try:
            wanted = self.model(ids[None], use_cache=False).logits[0, [3, 5]]
            rows = torch.stack([torch.cat([ids[:2] * 0, ids[:4]]), ids])
            cache = self.new_cache(2, 6, torch.tensor([2, 0], device=device))
            self.hidden(rows[:, :4], cache=cache)
            same = logits_agree(self(rows[:, 4:], cache=cache)[:, -1], wanted)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(f"{self.cfg.architecture} cannot be called with a cache and "
                             f"left padding ({type(error).__name__}: "
                             f"{str(error)[:200]}); it cannot be evaluated here") from error
        if not same:
            raise ValueError(f"{self.cfg.architecture} answers otherwise with left padding, a "
                             "cache and its head alone than by itself: it is not causal, or "
                             "changes its logits after the head; it cannot be evaluated here")
        try:
            packed = self(ids[None], torch.tensor([[1, 1, 2, 2, 2, 2]], device=device))[:, -1]
            self.packs = logits_agree(
                packed, self.model(ids[None, 2:], use_cache=False).logits[:, -1])
        except (RuntimeError, TypeError, ValueError):
            # such as positions made from a mask of one row
            self.packs = False


def logits_agree(found: Tensor, wanted: Tensor) -> bool:
    """Whether logits are the same but for rounding: 0.1% of their range in float32, 3% in half
    precision.
    """
    limit = ((1e-3 if wanted.dtype == torch.float32 else 0.03)
             * (wanted.amax() - wanted.amin() + 1e-6).float())
    return bool((found.float() - wanted.float()).abs().max() <= limit)
