"""Apple's GPUs have no float64: nothing on a device may become one, only what has been brought to
the host by `.cpu()`.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modern_llm.config import ModelConfig, VerifierConfig, get_pipeline_preset
from modern_llm.data.pairs import encode_pairs, preference_pairs
from modern_llm.data.tasks import word_problems
from modern_llm.data.tokens import make_tokenizer
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.likelihoods import document_nats
from modern_llm.models.prefix import continuation_log_probs, word_log_probs
from modern_llm.models.verifier import VerifierModel
from modern_llm.tests.test_hardware import MODEL, rows_of, stage_of
from modern_llm.training.dpo import pair_log_probs
from modern_llm.training.verifier_scores import score_answers, start_from_surprise

CONFIG = ModelConfig(width=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_width=16)


class NoFloat64(TorchDispatchMode):
    """Refuses every float64 that is not made of tensors on the host."""

    _should_skip_dynamo = classmethod(lambda cls: False)  # else it imports torch's compiler: 3 s

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        host = any(getattr(each, "on_host", False) or each.dtype == torch.float64 for each in given)
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                if tensor.dtype == torch.float64 and given and not host:
                    raise TypeError(
                        f"{function}: cannot convert a tensor of this device to float64")
                if host:
                    tensor.on_host = True
        return made


@pytest.fixture
def device(monkeypatch):
    """The CPU, seen as a device without float64, whose tensors reach the host by `.cpu()` only."""
    def to_host(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        copy.on_host = True
        return copy

    monkeypatch.setattr(torch.Tensor, "cpu", to_host)
    with NoFloat64():
        yield


def verifier() -> VerifierModel:
    return VerifierModel(ModernDecoderLM(CONFIG), VerifierConfig()).eval()


def preferences() -> None:
    tokenizer = make_tokenizer(get_pipeline_preset("local-smoke").data)
    pair_log_probs(ModernDecoderLM(CONFIG),
                   encode_pairs(tokenizer, preference_pairs("synthetic", "test", 3)[0], 256)[0])


def judged() -> None:
    problems = word_problems("synthetic", "test", 2)
    score_answers(verifier(), make_tokenizer(get_pipeline_preset("local-smoke").data), problems,
                  [problem.answer for problem in problems])


def started() -> None:
    module, _, batches, _ = stage_of("verifier", MODEL)
    start_from_surprise(module, [batches(0)])


def documents() -> None:
    document_nats(ModernDecoderLM(MODEL),
                  [{**rows_of(0), "document_ids": rows_of(0)["segment_ids"]}])


def answers() -> None:
    continuation_log_probs(ModernDecoderLM(CONFIG), [[1, 2, 3, 4], [1, 2, 5]], [2, 2])
    word_log_probs(ModernDecoderLM(CONFIG), [[1, 2], [1, 3]], [[4], [5, 6]])


WAYS = {"answers": answers, "preferences": preferences, "verifier": judged,
        "verifier's start": started, "held-out text": documents}


@pytest.mark.fault("ranks")
@pytest.mark.parametrize("way", WAYS)
def test_nothing_on_a_device_becomes_float64(device, way):
    WAYS[way]()


def test_the_device_refuses(device):
    with pytest.raises(TypeError, match="float64"):
        torch.ones(2).add(1).double()
    torch.ones(2).cpu().double()
