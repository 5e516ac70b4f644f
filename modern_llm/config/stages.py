"""What a stage is: one `StageSpec` each, from which pipeline, stage, report, submit, status and
export take what they must know of it. Plain data; imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class StageSpec:
    """All that is particular to a stage. A setting is named by its path, such as "sft.sources".

    Args:
        notebook: in nbs/; "" for the report, which has none.
        title: its heading in the report.
        settings: that its result depends on, besides the checkpoints it starts from.
        data: settings that name data sets it reads.
        learns: (setting that names data sets it trains on, as which kind, and the setting that is 0
            where it does not, or "").
        starts_from: earlier stages, the first of which that is finished it starts from.
        judges: earlier stages, all of which that are finished it reads, instead.
        optional: the setting that says whether "all stages" is to mean this one too; "" = it does.
        base: stages that make a small model to start from, for the preset "lesson" without one.
        recipe: what it trains, as "module:class", see `train_stage`; "" where nothing is trained.
        work: what it does besides training, "module:function" of the config, see `work.Work`.
        makes_generator: whether a language model comes of it, for later stages to start from.
        called: its name in the evaluation's tables.
        shown: how prose and headings call the model that comes of it.
        measured: files of its folder about the model it trained, stale once that is trained on.
        headline: how the names of its telling figures begin, the most telling first.
        section: it has a section of its own in the report, in place of its curves and table there.
        counted: (key of its results, heading) of the table that says what data were read.
    """

    name: str
    notebook: str = ""
    title: str = ""
    settings: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    learns: tuple[tuple[str, str, str], ...] = ()
    starts_from: tuple[str, ...] = ()
    judges: tuple[str, ...] = ()
    optional: str = ""
    base: tuple[str, ...] = ()
    recipe: str = ""
    work: str = ""
    makes_generator: bool = False
    called: str = ""
    shown: str = ""
    measured: tuple[str, ...] = ()
    headline: tuple[str, ...] = ()
    section: bool = False
    counted: tuple[str, str] | None = None

    @property
    def first(self) -> bool:
        """Whether it starts from no earlier stage."""
        return not (self.starts_from or self.judges)

    def telling(self, rows: Iterable[dict]) -> list[dict]:
        """Of the rows of its table those that the headline names, the most telling first."""
        rows = list(rows)
        found = (next((row for row in rows if row["metric"].startswith(start)), None)
                 for start in self.headline)
        return [row for row in found if row]


STAGES = {spec.name: spec for spec in (  # in the order of the pipeline
    StageSpec(
        "pretrain", "03_pretrain.ipynb", "Pretraining",
        settings=("model", "data", "pretrain", "seed"), data=("data.sources",),
        learns=(("data.sources", "text", ""),),
        recipe="modern_llm.training.pretrain:Pretraining", makes_generator=True,
        called="base", shown="pretrained",
        headline=("bits per byte", "above the floor"),
        counted=("data", "Pretraining text (the fingerprint changes when the data do)")),
    StageSpec(
        "sft", "04_sft.ipynb", "Instruction tuning (SFT)",
        settings=("data", "sft", "seed"), data=("sft.sources", "data.sources"),
        learns=(("sft.sources", "chats", ""), ("data.sources", "text", "sft.replay_fraction")),
        starts_from=("pretrain",), base=("pretrain",),
        recipe="modern_llm.training.sft:InstructionTuning", makes_generator=True,
        called="sft", shown="SFT",
        measured=("answers_sft.jsonl",),
        headline=("ends by itself and parses", "instruction exact match, SFT", "perplexity tax"),
        counted=("examples", "Instructions")),
    StageSpec(
        "dpo", "05_dpo.ipynb", "Preference optimisation (DPO)",
        settings=("data", "dpo", "seed"),
        data=("dpo.sources", "dpo.replay_sources", "data.sources"),
        learns=(("dpo.sources", "pairs", ""), ("dpo.replay_sources", "chats", "dpo.replay_weight")),
        starts_from=("sft",), base=("pretrain", "sft"),
        recipe="modern_llm.training.dpo:PreferenceTuning", work="modern_llm.config.work:of_dpo",
        makes_generator=True, called="dpo", shown="DPO",
        measured=("answers_after.jsonl", "held_out.jsonl", "answers_control.jsonl",
                  "held_out_control.jsonl"),
        headline=("preference accuracy, after", "implicit-reward accuracy", "perplexity tax"),
        counted=("pairs", "Preference pairs")),
    StageSpec(
        "grpo", "38_grpo.ipynb", "Reinforcement learning (GRPO)",
        settings=("data", "grpo", "seed"), data=("grpo.problems", "data.sources"),
        learns=(("grpo.problems", "problems", ""),),
        starts_from=("dpo", "sft"), base=("pretrain", "sft"), optional="grpo.with_all",
        recipe="modern_llm.training.grpo:RewardTraining", work="modern_llm.config.work:of_grpo",
        makes_generator=True, called="grpo", shown="GRPO",
        measured=("answers_after.jsonl", "samples_after.jsonl", "answers_control.jsonl",
                  "samples_control.jsonl"),
        headline=("greedy exact match, after", "after - control", "perplexity tax"),
        counted=("data", "Word problems, and those that fit the context")),
    StageSpec(
        "verifier", "06_verifier.ipynb", "Verifier",
        settings=("data", "verifier", "seed"), data=("verifier.problems",),
        learns=(("verifier.problems", "problems", ""),),
        starts_from=("dpo", "sft"), base=("pretrain", "sft"),
        recipe="modern_llm.training.verifier:VerifierTraining",
        work="modern_llm.config.work:of_verifier", called="verifier", shown="verifier",
        measured=("samples-own-greedy.jsonl", "samples-control-greedy.jsonl",
                  "samples-control.jsonl"),
        headline=("within-problem AUC", "weighted_vote@", "best_of_n@"),
        counted=("data", "The generator's own answers, on which the verifier learns")),
    StageSpec(
        "eval", "07_eval.ipynb", "Evaluation",
        settings=("data", "eval", "sft.sources", "dpo.sources", "seed"),
        data=("data.sources", "dpo.sources", "eval.problems", "eval.sentiment",
              "eval.protocol_sources"),
        judges=("pretrain", "sft", "dpo", "grpo", "verifier"), base=("pretrain", "sft"),
        work="modern_llm.evaluation.families:evaluation_work", section=True),
    StageSpec(
        "attention", "08_attention_viz.ipynb", "Attention", settings=("data", "seed"),
        starts_from=("grpo", "dpo", "sft", "pretrain"), base=("pretrain",),
        headline=("induction, best head", "nats saved by a repetition", "sink mass"),
        section=True),
    StageSpec("report", title="Report"),
)}


def stages_that(wanted: str) -> tuple[str, ...]:
    """The stages, in their order, that have this field: `stages_that("recipe")` are those that
    train.
    """
    return tuple(name for name, spec in STAGES.items() if getattr(spec, wanted))


def trained_on(stage: str, settings: dict) -> list[tuple[str, str]]:
    """The data sets that a stage trains on, each with the kind that it is read as.

    Args:
        settings: the sections of a config as plain values, those that the stage depends on at
            least.
    """
    def value(path: str) -> object:
        section, _, name = path.partition(".")
        return settings[section][name]

    found = []
    for path, kind, condition in STAGES[stage].learns:
        if not condition or value(condition):
            named = value(path)
            for name in [named] if isinstance(named, str) else named:
                found += ([(source, "text") for source in value("data.sources")] if name == "text"
                          else [(name, kind)])
    return list(dict.fromkeys(found))


def is_part_of_all(stage: str, config: object) -> bool:
    """Whether "all stages" of a `PipelineConfig` means this one too."""
    section, _, name = STAGES[stage].optional.partition(".")
    return not section or bool(getattr(getattr(config, section), name))


NOTEBOOKS = stages_that("notebook")  # those that are a notebook
ALWAYS = tuple(name for name in NOTEBOOKS if not STAGES[name].optional)  # part of "all stages"
TRAINED = stages_that("recipe")  # those that train
GENERATORS = stages_that("makes_generator")[::-1]  # the last one first
