"""Contexts longer than trained on: each rule is transformers' own, in and out, and a setting that
older configs and runs do without.
"""

from dataclasses import replace

import pytest
import torch

from modern_llm.config import ConfigError, ModelConfig, override, to_dict
from modern_llm.data.tokens import save_tokenizer, train_tokenizer
from modern_llm.files import read_json, write_json
from modern_llm.interchange import hub
from modern_llm.interchange.export import export_model
from modern_llm.interchange.llama_layout import CannotImport, model_config
from modern_llm.models.attention import rotary_frequencies, rotary_tables
from modern_llm.models.contexts import attention_temperature, changed_base, kept_by_place
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.saving import load_model, save_model

TRAINED, FACTOR = 64, 4.0
CFG = ModelConfig(vocab_size=320, context_length=int(TRAINED * FACTOR), width=64, num_layers=2,
                  num_heads=4, num_kv_heads=2, head_dim=32, ffn_width=96, rope_theta=5000.0,
                  rope_trained_context=TRAINED, rope_factor=FACTOR, use_qk_norm=False,
                  zero_init_outputs=False, init_std=0.15)
RULES = ("llama3", "linear", "ntk", "yarn")
BOUNDS = {"llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0}}
YARN = {"rope_type": "yarn", "factor": FACTOR, "original_max_position_embeddings": TRAINED}


def ids(length: int = CFG.context_length) -> torch.Tensor:
    return torch.randint(3, 280, (2, length), generator=torch.Generator().manual_seed(1))


def tokenizer_in(folder) -> None:
    save_tokenizer(train_tokenizer(["Anna has 3 apples and 12 pears."] * 3, 300), folder)


def theirs_with(rope: dict, kind: str = "Llama", **settings):
    """A random model of transformers with these rope_parameters."""
    transformers = pytest.importorskip("transformers", reason="its rules are held against ours")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, initializer_range=0.15,
        max_position_embeddings=CFG.context_length, bos_token_id=1, eos_token_id=2,
        pad_token_id=None, rope_parameters={"rope_theta": 5000.0, **rope}, **settings)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def written(folder, rope: dict, **settings):
    theirs = theirs_with(rope, **settings)
    theirs.save_pretrained(folder)
    tokenizer_in(folder)
    return theirs


IMPORTED = {"llama3": {**YARN, "rope_type": "llama3", **BOUNDS["llama3"]},
            "linear": {"rope_type": "linear", "factor": FACTOR}, "yarn": YARN,
            "yarn, spelled out": {**YARN, "beta_fast": 32, "beta_slow": 1, "truncate": True,
                                  "attention_factor": attention_temperature(FACTOR, "yarn")},
            "yarn, by mscale": {**YARN, "mscale": 1.0},
            "yarn from the context itself": {"rope_type": "yarn", "factor": 2.0}}


@pytest.mark.parametrize("rope", IMPORTED.values(), ids=IMPORTED)
@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
@torch.no_grad()
def test_a_stretched_folder_of_theirs_has_the_same_logits_beyond_its_context(rope, kind, tmp_path):
    theirs = written(tmp_path / "source", rope, kind=kind)
    hub.import_model(tmp_path / "source", tmp_path / "ours")
    ours, expected = load_model(tmp_path / "ours").eval(), theirs(ids()).logits
    assert (ours.cfg.rope_scaling, ours.cfg.rope_factor) == (rope["rope_type"], rope["factor"])
    assert (ours(ids()) - expected).abs().max() < 1e-4
    # without the rule they differ, and most where nothing was trained
    plain = ModernDecoderLM(replace(ours.cfg, rope_factor=1.0)).eval()
    plain.load_state_dict(ours.state_dict())
    assert (plain(ids()) - expected)[:, TRAINED:].abs().max() > 0.05


@pytest.mark.parametrize("scaling", RULES)
@torch.no_grad()
def test_a_stretched_model_of_ours_has_the_same_logits_in_transformers(scaling, tmp_path):
    transformers = pytest.importorskip("transformers", reason="it opens what is exported here")
    model = ModernDecoderLM(replace(CFG, rope_scaling=scaling)).eval()
    (tmp_path / "ours").mkdir()
    save_model(tmp_path / "ours", model, eos_id=2)
    tokenizer_in(tmp_path / "ours")
    exported = export_model(tmp_path / "ours", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
    assert (theirs(ids()).logits - model(ids())).abs().max() < 1e-4
    # as an older version reads it: rope_scaling beside rope_theta
    config = read_json(exported / "config.json")
    assert config.pop("rope_parameters")["rope_theta"] == config["rope_theta"]
    write_json(exported / "config.json", config)
    older = transformers.AutoModelForCausalLM.from_pretrained(exported)
    assert (older(ids()).logits - model(ids())).abs().max() < 1e-4
    # and back again, "ntk" as the larger base that it is
    again = hub.import_model(exported, tmp_path / "again")
    assert torch.equal(load_model(again).eval()(ids()), model(ids()))
    assert load_model(again).cfg.rope_factor == (1.0 if scaling == "ntk" else FACTOR)


SIZES = [(64, 1e4, 8192, 8.0), (128, 5e5, 8192, 32.0), (8, 100.0, 64, 2.0), (32, 1e6, 5, 4.0),
         (4, 1e4, 40, 3.0), (64, 2.0, 2048, 4.0)]


@pytest.mark.parametrize("width, theta, trained, factor", SIZES)
@pytest.mark.parametrize("scaling", ["llama3", "linear", "yarn"])
def test_speeds_and_temperature_are_those_of_transformers(scaling, width, theta, trained, factor):
    pytest.importorskip("transformers", reason="its rules are held against ours")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": scaling, "factor": factor, "rope_theta": theta, **BOUNDS.get(scaling, {})}
    if scaling != "linear":
        rope["original_max_position_embeddings"] = trained
    config = LlamaConfig(head_dim=width, hidden_size=2 * width, num_attention_heads=2,
                         max_position_embeddings=int(trained * factor), rope_parameters=rope)
    expected, temperature = ROPE_INIT_FUNCTIONS[scaling](config, "cpu")
    found = rotary_frequencies(width, theta, None, factor, trained, scaling)
    torch.testing.assert_close(found, expected, rtol=3e-6, atol=0)
    assert attention_temperature(factor, scaling) == pytest.approx(temperature, rel=1e-12)


@pytest.mark.parametrize("width, theta, trained, factor", SIZES)
def test_another_base_keeps_the_first_pair_and_slows_the_last(width, theta, trained, factor):
    plain, found = (rotary_frequencies(width, theta, None, by, trained, "ntk")
                    for by in (1.0, factor))
    assert found[0] == plain[0] and found[-1] * factor == pytest.approx(plain[-1].item(), rel=1e-5)
    assert torch.equal(found, rotary_frequencies(width, changed_base(theta, factor, width)))
    # between the pair and the whole factor, the slower the more
    assert ((plain / found).diff() > 0).all()


def test_yarn_keeps_what_turns_often_and_interpolates_what_turns_less_than_once():
    speeds = rotary_frequencies(128, 1e4)
    turns, kept = 4096 * speeds / (2 * torch.pi), kept_by_place(speeds, 1e4, 4096)
    assert (kept[turns > 32] == 1).all() and (kept[turns < 1] == 0).all()
    between = kept[(turns < 30) & (turns > 1.2)]
    assert len(between) > 10 and ((between > 0) & (between < 1)).all()


REFUSED = {
    r"beta_fast, beta_slow=\(16, 1\) are not YaRN's own": YARN | {"beta_fast": 16},
    "truncate=False lets YaRN's ramp": YARN | {"truncate": False},
    "attention_factor, mscale, mscale_all_dim=.* another attention temperature": YARN | {
        "attention_factor": 1.0},
    r"mscale_all_dim=\[None, 1.0, 0.5\] give another": YARN | {"mscale": 1.0,
                                                              "mscale_all_dim": 0.5},
    "rope_scaling='dynamic' stretches .* grows with the text.* larger rope_theta": {
        "rope_type": "dynamic", "factor": 2.0},
    "rope_scaling='longrope' stretches .* another rule than 'llama3', 'linear' and 'yarn'": {
        "rope_type": "longrope", "factor": 2.0},
    "factor=None is not the number": {"rope_type": "linear"},
    "original_max_position_embeddings='many' is not the number": YARN | {
        "original_max_position_embeddings": "many"},
    "model.rope_factor=0.5 must be at least 1": YARN | {"factor": 0.5},
}


@pytest.mark.parametrize("message, rope", REFUSED.items(), ids=REFUSED)
def test_other_rules_are_refused_by_what_differs(message, rope):
    source = {"architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32,
              "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
              "max_position_embeddings": 256, "rope_theta": 1e4}
    for key in ("rope_scaling", "rope_parameters"):
        with pytest.raises(CannotImport, match=message):
            model_config(source | {key: rope})
    assert model_config(source | {"rope_scaling": YARN}).rope == (1e4, FACTOR, TRAINED, "yarn")


def test_configs_from_before_the_setting_mean_llama3():
    before = {key: value for key, value in to_dict(CFG).items() if key != "rope_scaling"}
    assert override(ModelConfig(), before) == CFG and CFG.rope_scaling == "llama3"
    tables = rotary_tables(torch.arange(300), 32, *CFG.rope)
    for table, former in zip(tables, rotary_tables(torch.arange(300), 32, 5000.0, FACTOR, TRAINED)):
        assert torch.equal(table, former)


@pytest.mark.parametrize("scaling", RULES)
def test_a_factor_of_one_is_no_rule(scaling):
    for table, plain in zip(rotary_tables(torch.arange(99), 32, 1e4, 1.0, 16, scaling),
                            rotary_tables(torch.arange(99), 32, 1e4)):
        assert torch.equal(table, plain)


@pytest.mark.parametrize("message, change", {
    "model.rope_scaling='yarm' .*yarn": {"rope_scaling": "yarm"},
    "'ntk' .* a head of 2 channels has one pair; use 'linear'": {"rope_scaling": "ntk",
                                                                 "head_dim": 2},
    "'yarn' needs pairs of different speeds.*rope_theta=1.0": {"rope_scaling": "yarn",
                                                               "rope_theta": 1.0},
}.items())
def test_settings_that_cannot_be_are_refused(message, change):
    with pytest.raises(ConfigError, match=message):
        replace(CFG, **change)
