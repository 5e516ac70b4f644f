"""A model's own chat template is run, not imitated: the same text and ids as in transformers, in
every place that writes a conversation.
"""

import datetime
import json

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors

from modern_llm import messages
from modern_llm.cli.talk import Chat, open_model, samples
from modern_llm.config import ModelConfig
from modern_llm.data.answer_pairs import encode_candidate
from modern_llm.data.chat import (
    answer, chat_format, encode_chat, encode_example, encode_prompt, end_id, is_chat_model,
    stop_sequences,
)
from modern_llm.data.pairs import Pair, encode_pair
from modern_llm.data.tasks import word_problems
from modern_llm.data.templates import TemplateError
from modern_llm.data.tokens import load_tokenizer, save_tokenizer, train_tokenizer
from modern_llm.files import read_json, write_json
from modern_llm.interchange import hub
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.saving import save_model
from modern_llm.report.card import export_with_card
from modern_llm.training.sft import InstructionExample, encode_examples

transformers = pytest.importorskip("transformers",
                                   reason="its rendering is what ours is held against")
TEXTS = ["system user assistant model You are a helpful assistant. What is 2 + 3? It is 5. Be "
         "brief. Today Date: 26 Jul 2024"] * 3
SPECIALS = {"chatml": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
            "llama3": ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
                       "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
            "mistral": ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
            "gemma": ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
            "phi": ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")}
BODY = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n"
        "' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}")
CUE = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools' }}{{ tools | tojson }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) or message.role == "assistant" and not message.tool_calls %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = ("{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ "
           "'[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' "
           "%}{{ message['content'] + eos_token }}{% else %}{{ raise_exception('Only user and "
           "assistant roles are supported!') }}{% endif %}{% endfor %}")
GEMMA = ("{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role "
         "not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] "
         "== 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must "
         "alternate user/assistant/...') }}{% endif %}{% if message['role'] == 'assistant' %}{% "
         "set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
         "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n"
         "' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}")
THINKING = """{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set said = m.content.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.last %}{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + said + '<|im_end|>\\n' }}
        {%- else %}{{- '<|im_start|>assistant\\n' + said + '<|im_end|>\\n' }}{%- endif %}
    {%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
""" + CUE
TEMPLATES = {  # tokenizer, template, what may stand in a system message (None: it refuses one)
    "ChatML": ("chatml", BODY + CUE, ""), "Qwen2.5's default system": ("chatml", QWEN, ""),
    "Llama 3's headers and day": ("llama3", LLAMA, ""),
    "Mistral": ("mistral", MISTRAL, None), "Gemma": ("gemma", GEMMA, None),
    "thoughts only in the last turn": ("chatml", THINKING, ""),
    "generation blocks": ("chatml",
                          BODY.replace("{{", "{% generation %}{{")
                              .replace("}}{% endfor", "}}{% endgeneration %}{% endfor") + CUE, ""),
    "loop controls": ("chatml", "{% for m in messages %}{% if m.role == 'system' %}{% continue "
                                "%}{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
                                "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
                                "{% endif %}", ""),
    "namespaces and macros":
        ("chatml", "{% macro turn(m) %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n\n"
                   "{% endmacro %}{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n "
                   "= ns.n + 1 %}{{ turn(m) }}{% endfor %}" + CUE, ""),
    "phi": ("phi", "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n"
                   "' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n"
                   "' }}{% else %}{{ eos_token }}{% endif %}", ""),
    "as JSON": ("chatml", "{% for m in messages %}<|im_start|>{{ m.role }}\n"
                          "{{ {'é': m.content} | tojson }}<|im_end|>\n{% endfor %}" + CUE, ""),
    "words for roles": ("mistral",
                        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}USER: {{ "
                        "m.content }} {% elif m.role == 'system' %}{{ m.content }} "
                        "{% else %}ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}{% if "
                        "add_generation_prompt %}ASSISTANT:{% endif %}", ""),
}
SYSTEM = [{"role": "system", "content": "Be brief."}]
TALK = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "It is 5."},
        {"role": "user", "content": "  And 3 + 3? \n"},
        {"role": "assistant", "content": "\n6, naïvely 🙂"}]


def a_tokenizer(kind: str) -> Tokenizer:
    """A byte-level BPE with the special tokens of a family; <s> or <bos> goes in front of what is
    encoded by itself.
    """
    trained = json.loads(train_tokenizer(TEXTS, 330).to_str())
    vocab = {token: index for token, index in trained["model"]["vocab"].items()
             if not token.startswith("<|")}
    order = [*SPECIALS[kind], *sorted(vocab, key=vocab.get)]
    trained["model"]["vocab"], trained["added_tokens"] = (
        {token: i for i, token in enumerate(order)}, [])
    tokenizer = Tokenizer.from_str(json.dumps(trained))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIALS[kind]])
    begin = next(
        (token for token in ("<s>", "<bos>", "<|begin_of_text|>") if token in SPECIALS[kind]), None)
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))])
    return tokenizer


ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>",
        "phi": "<|end|>"}
BEGINS = {"llama3": "<|begin_of_text|>", "mistral": "<s>", "gemma": "<bos>"}
EOS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "gemma": "<eos>",
       "phi": "<|endoftext|>"}


def a_model(folder, kind: str, template: str | None, way: str = "key"):
    """A tiny Llama with the tokenizer of a family and a template, as its makers publish one; the
    tokenizer is returned.
    """
    tokenizer = a_tokenizer(kind)
    cfg = transformers.LlamaConfig(
        vocab_size=400, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=tokenizer.token_to_id(EOS[kind]), pad_token_id=None)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(cfg).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGINS.get(kind),
            "eos_token": {"content": EOS[kind], "__type": "AddedToken"}}
    if way == "list":
        said["chat_template"] = [{"name": "tool_use", "template": "tools"},
                                 {"name": "default", "template": template}]
    elif way in ("file", "both"):
        (folder / "chat_template.jinja").write_text(template)
        said |= {"chat_template": "{{ raise_exception('the older one') }}"} if way == "both" else {}
    elif way == "folder":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
        (folder / "chat_template.jinja").write_text(template)
    elif template:
        said["chat_template"] = template
    write_json(folder / "tokenizer_config.json", said)
    ends = sorted(
        {tokenizer.token_to_id(token)
         for token in (EOS[kind], ENDS[kind], *(["<|eom_id|>"] if kind == "llama3" else []))})
    write_json(folder / "generation_config.json", {"eos_token_id": ends})
    return tokenizer


@pytest.fixture(scope="module", params=TEMPLATES)
def brought(request, tmp_path_factory):
    """A template's name, its family, the source's folder and the imported one."""
    folder = tmp_path_factory.mktemp("source")
    kind, template, system = TEMPLATES[request.param]
    a_model(folder, kind, template)
    return (request.param, kind, system is not None, folder,
            hub.import_model(folder, folder.with_name(folder.name + "-ours"), chat_tokens=True))


def theirs(folder, talk, cue):
    return list(transformers.AutoTokenizer.from_pretrained(folder)
                    .apply_chat_template(talk, add_generation_prompt=cue, return_dict=False))


@pytest.mark.fault("templates")
def test_a_conversation_has_the_ids_that_transformers_gives_it(brought):
    _, kind, system, source, folder = brought
    tokenizer = load_tokenizer(folder)
    # no tokens of ours beside its own
    assert tokenizer.get_vocab_size() == a_tokenizer(kind).get_vocab_size()
    for talk in (TALK[:1], TALK[:2], TALK[:3], TALK,
                 *([SYSTEM + TALK[:1], SYSTEM + TALK] if system else [])):
        for cue in (False, True):
            assert (encode_chat(tokenizer, talk, cue) == theirs(source, talk, cue)
                    == theirs(folder, talk, cue))
    if kind in BEGINS:
        # by the template, not by the tokenizer as well
        assert encode_chat(tokenizer, TALK).count(tokenizer.token_to_id(BEGINS[kind])) == 1


@pytest.mark.fault("templates")
def test_what_is_trained_is_what_is_asked(brought):
    name, kind, _, _, folder = brought
    tokenizer = load_tokenizer(folder)
    end = tokenizer.token_to_id("<|endoftext|>" if ENDS[kind] == "</s>" else ENDS[kind])
    assert end_id(tokenizer) == end and is_chat_model(folder, tokenizer)
    ids, labels = encode_example(tokenizer, TALK)
    said = [i for i in labels if i >= 0]
    assert (len(ids) == len(labels) and labels[-1] == end
            and said.count(end) == (1 if name.startswith("thoughts") else 2))
    assert all(label in (-100, after) for label, after in zip(labels, ids[1:]))
    prompt = encode_chat(tokenizer, TALK[:-1], True)
    last, last_labels = encode_example(tokenizer, TALK, last_only=True)
    start = next(i for i, label in enumerate(last_labels) if label >= 0)
    assert last == ids and last[:start + 1] == prompt and last_labels[start:] == labels[start:]
    if "JSON" not in name:
        assert ("6, naïvely 🙂" in tokenizer.decode(last_labels[start:])
                and "?" not in tokenizer.decode(last_labels[start:]))


@pytest.mark.fault("templates")
def test_every_place_that_writes_a_conversation_runs_the_template(brought, tmp_path):
    """SFT, pairs, the verifier's candidates, chat, an export: each by the template of the model."""
    _, kind, _, source, folder = brought
    tokenizer, request = load_tokenizer(folder), "What is 2 + 3?"
    prompt = theirs(source, TALK[:1], True)
    assert encode_prompt(tokenizer, request) == prompt
    (ids, labels), = encode_examples(tokenizer, [InstructionExample(request, output="It is 5.")],
                                     400)[0]
    assert (ids[:len(prompt)] == prompt
            and [*ids, labels[-1]] == theirs(source, TALK[:2], False)[:len(ids) + 1])
    pair, cut = encode_pair(tokenizer, Pair((TALK[0],), "It is 5.", "It is 6."), 400)
    assert pair.chosen == (ids, labels) and not cut and pair.rejected[0][:len(prompt)] == prompt
    problem = word_problems("synthetic", "train", 1)[0]
    candidate, start = encode_candidate(tokenizer, problem, "#### 7")
    assert (candidate[-1] == end_id(tokenizer)
            and candidate[:start] == encode_prompt(tokenizer, problem.question))
    model = ModernDecoderLM(ModelConfig(vocab_size=400, context_length=400, width=16, num_layers=1,
                                        num_heads=2, num_kv_heads=1, ffn_width=32))
    talk = Chat(model, tokenizer, max_new_tokens=3)
    assert talk.prompt(request) == prompt
    talk.history.clear()
    assert isinstance("".join(talk.reply(request)), str) and len(talk.history) == 2
    (tmp_path / "tuned").mkdir()
    save_model(tmp_path / "tuned", model, eos_id=end_id(tokenizer))
    # as the stages save one
    save_tokenizer(tokenizer, tmp_path / "tuned", chat_format(tokenizer).template)
    export_with_card(tmp_path / "tuned", tmp_path / "out")
    assert (theirs(tmp_path / "out", TALK[:1], True) == prompt
            == encode_prompt(load_tokenizer(tmp_path / "tuned"), request))
    ends = read_json(tmp_path / "out" / "generation_config.json")["eos_token_id"]
    assert end_id(tokenizer) in (ends if isinstance(ends, list) else [ends])


@pytest.mark.fault("templates")
@pytest.mark.parametrize("typed", ["Is {} the end?", "{}", "{}{}", "a{}", " {} b", "<{}>"])
def test_what_somebody_types_closes_nothing(typed, brought):
    _, kind, _, _, folder = brought
    tokenizer = load_tokenizer(folder)
    words = [token for token in SPECIALS[kind] if tokenizer.token_to_id(token) is not None]
    for word in words:
        talk = [{"role": "user", "content": typed.format(word, word)}]
        plain, cheat = (encode_chat(tokenizer, [{"role": "user", "content": "x"}], True),
                        encode_chat(tokenizer, talk, True))
        specials = [[i for i in ids if tokenizer.id_to_token(i) in words] for ids in (plain, cheat)]
        assert specials[0] == specials[1]
        assert (typed.format(word, word).strip() in tokenizer.decode(cheat)
                or kind == "chatml" and "é" in tokenizer.decode(cheat))


@pytest.mark.fault("templates")
@pytest.mark.parametrize("way", ["key", "list", "file", "both", "folder"])
def test_the_template_is_found_where_transformers_finds_it(way, tmp_path):
    (tmp_path / "source").mkdir()
    a_model(tmp_path / "source", "chatml", QWEN, way)
    folder = hub.import_model(tmp_path / "source", tmp_path / "ours", chat_tokens=True)
    assert (encode_prompt(load_tokenizer(folder), "Hi")
            == theirs(tmp_path / "source", [{"role": "user", "content": "Hi"}], True))


BROKEN = {
    "{% for m in messages %}\n{{ m.content }<|im_end|>\n"
    "{% endfor %}": r"chat_template.jinja, line 2 of the chat template: ",
    BODY + "{% frobnicate %}": "line 3 of the chat template: Encountered unknown tag 'frobnicate'",
    "{% for m in messages %}{{ m.content }}{% endfor %}":
        "writes no special token behind an answer",
    "{{ messages[0].content }}<|im_end|>": "leaves out what the assistant says",
    "\n\n{{ 1 // 0 }}" + BODY: "line 3 of the chat template: it refuses a conversation of user, "
                               "assistant: .*zero",
    "{{ nothing.at.all }}" + BODY: "'nothing' is undefined",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}" + BODY:
        "loops go on for more than 100,000",
    "{{ 'a' * 10000000000 }}" + BODY: "too large", "{{ 9 ** 99999999 }}" + BODY: "too large",
    "{{ ().__class__.__base__.__subclasses__() }}" + BODY: "unsafe",
    "{{ messages.append(1) }}" + BODY: "refuses a conversation",
    "{{ raise_exception('Bring tools!') }}": "Bring tools!",
    "{% include 'x' %}" + BODY: "refuses a conversation|no loader",
}


@pytest.mark.fault("templates")
@pytest.mark.parametrize("template", BROKEN)
def test_a_template_that_cannot_be_used_is_named_with_its_line(template, tmp_path, monkeypatch):
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "source").mkdir()
    a_model(tmp_path / "source", "chatml", template, "file")
    with pytest.raises(messages.StageError, match=BROKEN[template]) as error:
        hub.find_checkpoint(tmp_path / "source")
    assert "chat_template.jinja" in str(error.value)
    # whoever asks it nothing in a chat can evaluate it
    assert hub.load(tmp_path / "source")[0].cfg.vocab_size == 400


@pytest.mark.fault("templates")
def test_several_templates_without_a_default_are_named(tmp_path):
    (tmp_path / "source").mkdir()
    a_model(tmp_path / "source", "chatml", None)
    said = read_json(tmp_path / "source" / "tokenizer_config.json")
    write_json(
        tmp_path / "source" / "tokenizer_config.json",
        {**said, "chat_template": [{"name": n, "template": BODY} for n in ("rag", "tool_use")]})
    with pytest.raises(TemplateError, match="none called default, only rag, tool_use"):
        hub.import_model(tmp_path / "source", tmp_path / "ours", chat_tokens=True)


@pytest.mark.fault("templates")
def test_a_refused_conversation_and_a_prompt_that_changes_are_errors(tmp_path):
    gemma, drops = tmp_path / "gemma", tmp_path / "drops"
    for folder, kind, template in (
        (gemma, "gemma", GEMMA),
        (drops, "chatml", BODY + CUE.replace("assistant\n", "assistant\n<think>\n"))):
        folder.mkdir()
        a_model(folder, kind, template)
    refusing = load_tokenizer(hub.import_model(gemma, tmp_path / "a", chat_tokens=True))
    for talk, said in ((SYSTEM + TALK[:1], "system, user: System role not supported"),
                       (TALK[:1] * 2, "user, user: Conversation roles must")):
        with pytest.raises(TemplateError, match=said):
            encode_chat(refusing, talk)
    with pytest.raises(TemplateError,
                       match="writes the prompt of an answer otherwise once the answer is there"):
        encode_example(load_tokenizer(hub.import_model(drops, tmp_path / "b", chat_tokens=True)),
                       TALK[:2])


@pytest.mark.fault("templates")
@pytest.mark.parametrize(
    "name, text",
    [("chat_template.jinja", BODY + CUE), ("generation_config.json", '{"eos_token_id": [0]}'),
     ("tokenizer_config.json", '{"eos_token": "<|endoftext|>"}'),
     ("additional_chat_templates/x.jinja", "y"),
     ("special_tokens_map.json", '{"bos_token": "<|endoftext|>"}'),
     ("config.json", None), ("vocab.json", "{}")])
def test_a_changed_file_is_imported_anew(name, text, tmp_path, monkeypatch):
    monkeypatch.setenv("MODERN_LLM_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.mkdir()
    a_model(source, "chatml", QWEN, "folder")
    former = hub.imported(source, chat_tokens=True)
    assert hub.imported(source, chat_tokens=True) == former
    (write_json(source / name,
                {**read_json(source / name), "rope_theta": 99.0, "rope_parameters": None})
     if text is None else (source / name).write_text(text))
    renewed = hub.imported(source, chat_tokens=True)
    assert renewed != former
    if name == "chat_template.jinja":
        assert (encode_prompt(load_tokenizer(renewed), "Hi")
                == theirs(source, [{"role": "user", "content": "Hi"}], True))


@pytest.mark.fault("templates")
def test_the_day_that_a_template_tells_stays_that_of_the_import(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    a_model(source, "llama3", LLAMA)
    folder = hub.import_model(source, tmp_path / "ours", chat_tokens=True)
    today = encode_prompt(load_tokenizer(folder), "Hi")
    said = read_json(folder / "tokenizer_config.json")
    assert said["modern_llm"]["template_date"] == datetime.date.today().isoformat()
    write_json(folder / "tokenizer_config.json",
               said | {"modern_llm": said["modern_llm"] | {"template_date": "2024-07-04"}})
    tokenizer = load_tokenizer(folder)
    assert ("Today Date: 04 Jul 2024" in tokenizer.decode(encode_prompt(tokenizer, "Hi"))
            and encode_prompt(tokenizer, "Hi") != today)
    (tmp_path / "tuned").mkdir()
    save_tokenizer(tokenizer, tmp_path / "tuned", chat_format(tokenizer).template)
    assert encode_prompt(load_tokenizer(tmp_path / "tuned"), "Hi") == encode_prompt(tokenizer, "Hi")


@pytest.mark.fault("templates")
def test_an_answer_ends_at_every_end_of_its_model(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    a_model(source, "llama3", LLAMA)
    tokenizer = load_tokenizer(hub.import_model(source, tmp_path / "ours", chat_tokens=True))
    assert stop_sequences(tokenizer, end_id(tokenizer)) == [[tokenizer.token_to_id("<|eom_id|>")]]
    model = ModernDecoderLM(ModelConfig(vocab_size=400, context_length=400, width=16, num_layers=1,
                                        num_heads=2, num_kv_heads=1, ffn_width=32))
    other = tokenizer.token_to_id("<|eom_id|>")
    with torch.no_grad():  # a model that always says <|eom_id|>
        model.embed_tokens.weight.fill_(1.0)
        model.embed_tokens.weight[other] = 2.0
    said = answer(model, tokenizer, ["Hi"], max_new_tokens=5)[0]
    assert (said.tokens == [] and said.ended
            and "".join(Chat(model, tokenizer, temperature=0).reply("Hi")) == "")


def imported(tmp_path, kind, template, chat_tokens=True, change=lambda folder: None):
    """A source's folder and its import."""
    (tmp_path / "source").mkdir()
    a_model(tmp_path / "source", kind, template)
    change(tmp_path / "source")
    return (tmp_path / "source",
            hub.import_model(tmp_path / "source", tmp_path / "ours", chat_tokens=chat_tokens))


CLOSES_ONLY_THE_LAST = {
    "eos behind the last answer": ("mistral",
                                   "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' "
                                   "%}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}{% if "
                                   "loop.last %}{{ eos_token }}{% endif %}{% endif %}{% endfor %}"),
    "another token behind it":
        ("chatml", "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.role "
                   "== 'assistant' and loop.last %}<|endoftext|>{% else %}<|im_end|>{% endif %}{% "
                   "endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")}


@pytest.mark.fault("templates")
@pytest.mark.parametrize("name", CLOSES_ONLY_THE_LAST)
def test_no_word_of_a_user_is_trained_where_only_the_last_answer_is_closed(name, tmp_path):
    source, folder = imported(tmp_path, *CLOSES_ONLY_THE_LAST[name])
    tokenizer = load_tokenizer(folder)
    ids, labels = encode_example(tokenizer, TALK)
    assert (tokenizer.decode([i for i in labels if i >= 0], skip_special_tokens=False).strip()
            == "6, naïvely 🙂<|endoftext|>")
    assert [*ids, labels[-1]] == theirs(source, TALK, False)
    # a last word of the user is nothing to learn from
    assert encode_example(tokenizer, TALK[:3]) == encode_example(tokenizer, TALK[:2])


@pytest.mark.fault("templates")
@pytest.mark.parametrize("template",
                         ["{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
                          "{% for m in messages %}{{ m.role }", "{{ raise_exception('no chat') }}"],
                         ids=["closes nothing", "no Jinja", "refuses all"])
def test_a_model_that_only_continues_text_needs_no_template(template, tmp_path):
    _, folder = imported(tmp_path, "mistral", template, chat_tokens=False)
    model, tokenizer, _ = open_model(None, None, str(folder), None, "cpu")
    assert (not is_chat_model(folder, tokenizer)
            and len(list(samples(model, tokenizer, folder, "What is", 2, max_new_tokens=3))) == 2)
    with pytest.raises(TemplateError):  # which says more than that it was never taught to answer
        open_model(None, None, str(folder), None, "cpu", purpose="chat")


def _tokens(folder, **changes):
    said = read_json(folder / "tokenizer_config.json") | changes
    write_json(folder / "tokenizer_config.json",
               {name: value for name, value in said.items() if value != "absent"})


NAMES = {
    "none that begins": lambda folder: _tokens(folder, bos_token=None),
    "the key is absent": lambda folder: _tokens(folder, bos_token="absent"),
    "the older file": lambda folder: write_json(
        folder / "special_tokens_map.json", {"bos_token": {"content": "</s>", "lstrip": False}}),
    "the older file beside a list of all": lambda folder: [write_json(
        folder / "special_tokens_map.json", {"bos_token": "</s>"}
    ), _tokens(folder, added_tokens_decoder={})],
    "an object": lambda folder: _tokens(
        folder, bos_token={"__type": "AddedToken", "content": "<s>", "lstrip": False,
                           "normalized": False, "rstrip": False, "single_word": False})}


@pytest.mark.fault("templates")
@pytest.mark.parametrize("name", NAMES)
def test_a_template_gets_the_names_of_tokens_that_transformers_gives_it(name, tmp_path):
    source, folder = imported(tmp_path, "mistral", MISTRAL, change=NAMES[name])
    tokenizer = load_tokenizer(folder)
    (tmp_path / "tuned").mkdir()
    save_tokenizer(tokenizer, tmp_path / "tuned", chat_format(tokenizer).template)
    for place in (folder, tmp_path / "tuned"):
        assert (encode_chat(load_tokenizer(place), TALK)
                == theirs(source, TALK, False) == theirs(place, TALK, False))


@pytest.mark.fault("templates")
def test_blank_text_is_no_end_of_an_answer(tmp_path):
    def blank(folder):
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.add_tokens([AddedToken("\n\n", normalized=False)])  # as Gemma's has
        tokenizer.save(str(folder / "tokenizer.json"))

    _, folder = imported(tmp_path, "chatml",
                         BODY.replace("+ '<|im_end|>'", "+ '\n\n<|im_end|>'") + CUE, change=blank)
    tokenizer = load_tokenizer(folder)
    assert end_id(tokenizer) == tokenizer.token_to_id("<|im_end|>")
