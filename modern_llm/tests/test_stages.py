"""What a `StageSpec` says is there: notebooks, settings, earlier stages, recipes."""

import dataclasses

import pytest

from modern_llm.config import (
    ALWAYS, GENERATORS, NOTEBOOKS, STAGES, TRAINED, PipelineConfig, StageSpec, TrainConfig,
)
from modern_llm.runs import data_files, lineage
from modern_llm.runs.preflight import settings_of
from modern_llm.runs.spec import notebook_of, recipe_of, sections, setting

CONFIG = PipelineConfig()


def test_the_stages_and_what_becomes_of_them():
    assert list(STAGES) == [*NOTEBOOKS, "report"]
    assert GENERATORS == ("grpo", "dpo", "sft", "pretrain")
    assert set(NOTEBOOKS) - set(ALWAYS) == {"grpo"}
    assert {name for name in STAGES
            if isinstance(settings_of(CONFIG, name), TrainConfig)} == set(TRAINED)


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_stage_names_is_there(stage):
    spec, earlier = STAGES[stage], list(STAGES)[:list(STAGES).index(stage)]
    assert {*spec.starts_from, *spec.judges, *spec.base} <= set(earlier)
    assert not spec.notebook or notebook_of(stage).is_file()
    assert not spec.optional or setting(CONFIG, spec.optional) is False
    assert sections(CONFIG, stage).keys() == set(spec.settings)
    assert all(setting(CONFIG, path) is not None for path in spec.data)
    assert {path for path, _, _ in spec.learns} <= set(spec.data)
    assert bool(spec.learns) == bool(spec.recipe)
    assert spec.called or not any(stage in other.judges for other in STAGES.values())
    assert not spec.recipe or all(callable(getattr(recipe_of(stage), name))
                                  for name in ("evaluate", "save", "fit"))


def test_a_new_stage_is_one_entry(monkeypatch, tmp_path):
    spec = StageSpec("toy", "toy.ipynb", "Toy", settings=("sft.lr", "seed"),
                     data=("sft.sources",), starts_from=("sft",), base=("pretrain", "sft"))
    monkeypatch.setitem(STAGES, "toy", spec)
    config = dataclasses.replace(CONFIG, seed=3)
    assert sections(config, "toy") == {"sft.lr": config.sft.lr, "seed": 3}
    named = [name for name in config.sft.sources if not name.startswith("synthetic")]
    assert data_files.data_names(config, "toy") == named
    assert lineage.own_inputs("toy", tmp_path) == {}
    assert "--stage sft" in str(lineage.no_inputs("toy", tmp_path, "lesson"))
