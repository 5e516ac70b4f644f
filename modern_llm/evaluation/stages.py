"""The evaluation of a run's stages, side by side: models, pieces, items, contamination, ledger.

A plain module; what is measured is `families`, and chapter 07 shows what comes of it. `evaluate` is
the one call.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Protocol

import pandas as pd

from modern_llm.config import STAGES, PipelineConfig, to_dict
from modern_llm.data.chat import is_chat_model
from modern_llm.data.tokens import load_tokenizer
from modern_llm.evaluation.asking import Subject, baselines
from modern_llm.evaluation.contamination import run_overlap, training_sources
from modern_llm.evaluation.families import FAMILIES, SAMPLED
from modern_llm.evaluation.held_out import held_out_pages, scored_split
from modern_llm.evaluation.ledger import (
    cost_rows, ledger_rows, read_ledger, write_derived, write_ledger,
)
from modern_llm.evaluation.measuring import evaluation_items
from modern_llm.evaluation.overlap import clean_rows, overlap_summary
from modern_llm.evaluation.piece_cache import piece, same_settings
from modern_llm.evaluation.pieces import perplexity_rows
from modern_llm.evaluation.reranking import verifier_mistakes
from modern_llm.evaluation.written import problem_items
from modern_llm.files import cached_frame, read_json, write_json, write_text
from modern_llm.models.saving import load_model
from modern_llm.models.verifier import load_verifier
from modern_llm.training.training_state import inference_dtype
from modern_llm.training.verifier_scores import score_answers

CLEAN_COLUMNS = ["stage", "task", "metric", "subset", "value", "low", "high", "n", "protocol"]


def called(name: str) -> str:
    """The name in the tables of a stage, or of what else a model was given as."""
    return STAGES[name].called or name if name in STAGES else name


class EvaluatedRun(Protocol):
    """What the evaluation reads of a stage's run (`modern_llm.runs.record.StageRun`)."""

    config: PipelineConfig
    device: str
    folder: Path
    inputs: dict[str, Path]
    start: Path


class Evaluation:
    """The models of a run under test, what they are asked, and, once `evaluate` is done, what came
    of it.

    Attributes:
        folders: stage -> checkpoint, in the order of the pipeline.
        others: models from elsewhere; not_here: why one that was asked for is missing.
        generator: the last stage, which alone is sampled from.
        pieces: (stage, task) -> what the model did, item by item; seconds: what each took.
        item_table, overlap, clean, ledger, files, gains, mistakes, samples: what was made of the
            pieces.
    """

    item_table: pd.DataFrame
    overlap: pd.DataFrame | None  # None where the text that the stages learned from is not known
    clean: pd.DataFrame
    seconds: dict[tuple[str, str], float]
    ledger: pd.DataFrame
    files: dict[str, object]  # file name -> what it holds
    gains: pd.DataFrame
    mistakes: dict[str, list[dict]]  # of the verifier
    samples: dict[str, list[str]]  # some problems, with every stage's answers

    def __init__(self, run: EvaluatedRun):
        self.run, self.config, self.folder = run, run.config, run.folder
        self.tokenizer = load_tokenizer(run.start)
        self.folders = {called(name): folder for name, folder in run.inputs.items()
                        if name not in STAGES or STAGES[name].makes_generator}
        self.chats = {name: is_chat_model(folder, self.tokenizer)
                      for name, folder in self.folders.items()}
        self.others, self.not_here = baselines(self.config.eval.baselines, run.device)
        self.generator = list(self.folders)[-1]
        self.items = evaluation_items(self.config, self.tokenizer)
        self.pieces: dict[tuple[str, str], pd.DataFrame] = {}
        self._loaded: Subject | None = None

    @property
    def models(self) -> list[str]:
        """The stages that write, and the models from elsewhere."""
        return [*self.folders, *self.others]

    def subject(self, name: str) -> Subject:
        """A model under test, loaded when the first piece needs it; one at a time."""
        if name in self.others:
            return self.others[name]
        if self._loaded is None or self._loaded.stage != name:
            self._loaded, meta = None, self.folders[name] / "meta.json"
            imported = meta.is_file() and "imported" in read_json(meta)
            model = load_model(self.folders[name], self.run.device,
                               inference_dtype(self.run.config.hardware.inference_precision))
            self._loaded = Subject(name, model, self.tokenizer, self.chats[name],
                                   "\n\n" if imported else None)
        return self._loaded

    def asks(self, name: str, task: str) -> bool:
        """Whether this model is put to this task."""
        family = FAMILIES[task]
        if family.texts and not family.call("texts", self.items):
            return False
        return {"all": True, "stages": name not in self.others,
                "last": name == self.generator}[family.put_to]

    def how_asked(self, name: str) -> str:
        """How a stage is asked for problems and instructions, in words."""
        return Subject(name, None, None, self.chats.get(name, False)).protocol

    @property
    def verifier_samples(self) -> pd.DataFrame | None:
        """The last model's samples with the verifier's scores; None without a verifier."""
        return self.pieces.get(("verifier", SAMPLED))

    @property
    def protocols(self) -> dict[tuple[str, str], str]:
        """(stage, task) -> how it was measured, in words."""
        found = {(name, task): family.call("protocol", self.items, name, self.how_asked(name),
                                           self.generator)
                 for name in self.models for task, family in FAMILIES.items()}
        if self.verifier_samples is not None:
            found["verifier", SAMPLED] = FAMILIES[SAMPLED].call(
                "protocol", self.items, "verifier", "", self.generator)
        return found


def evaluate(run: EvaluatedRun) -> Evaluation:
    """Measure every stage of the run and the models from elsewhere on the same items, and write
    pieces, items, answers, contamination, ledger and all that is derived from it.

    A piece that is on disk already is not made again. ValueError if it was made with other
    settings.
    """
    found = Evaluation(run)
    measure(found)
    found.item_table = items = ledger_items(found)
    write_text(run.folder / "items.csv", items.to_csv(index=False))
    write_text(run.folder / "answers.jsonl",
               told_answers(found).to_json(orient="records", lines=True, force_ascii=False))
    contamination(found)
    found.mistakes, found.samples = keep_mistakes(found), shown_samples(found)
    found.seconds = {key: float(table.seconds.iloc[0]) for key, table in found.pieces.items()}
    write_ledger(run.folder, ledger_rows(items, found.protocols, found.seconds,
                                         comparisons(found), further_rows(found)))
    found.files, found.ledger = write_derived(run.folder), read_ledger(run.folder)
    found.gains = found.files["stage_gains.csv"]
    if found.config.eval.baselines:
        measured = {name: found.files[f"{name}_eval.json"]["tasks"]
                    for name in [found.generator, *found.others]}
        write_json(run.folder / "baseline_comparison.json",
                   {"models": measured, "not available here": found.not_here})
    return found


def measure(of: Evaluation) -> None:
    """Make each piece that is not on disk yet; the verifier scores the last model's samples."""
    settings = {name: value for name, value in to_dict(of.config.eval).items()
                if name != "batch_rows"}
    same_settings(of.folder, {**settings, "seed": of.config.seed,
                              "data": list(of.config.data.sources),
                              "pairs": list(of.config.dpo.sources)})
    for name, (task, family) in itertools.product(of.models, FAMILIES.items()):
        if of.asks(name, task):
            of.pieces[name, task] = piece(of.folder, name, task,
                                          lambda: family.call("measure", of.items,
                                                              of.subject(name)))
    if "verifier" in of.run.inputs:
        of.pieces["verifier", SAMPLED] = piece(of.folder, "verifier", SAMPLED,
                                               lambda: scored_samples(of))


def scored_samples(of: Evaluation) -> pd.DataFrame:
    """The last model's samples, each with the verifier's score."""
    drawn = of.pieces[of.generator, SAMPLED]
    verifier = load_verifier(of.run.inputs["verifier"], of.run.device)
    problems = [of.items.problems[i] for i in drawn.problem]
    return drawn.assign(score=score_answers(verifier, of.tokenizer, problems, drawn.text)).drop(
        columns="seconds")


def ledger_items(of: Evaluation) -> pd.DataFrame:
    """Every piece as items of the ledger.

    The stage "verifier" is the last model with its samples voted on, each vote weighted by the
    verifier's score; its exact match stands beside the model's greedy one on the same problems.
    """
    found = [rows for (name, task), table in of.pieces.items()
             for rows in FAMILIES[task].call("items", of.items, name, table)]
    found += [problem_items(name, SAMPLED, of.pieces[name, "problems"], of.items.sampled)
              for name in of.models]
    return pd.concat(found, ignore_index=True)


def told_answers(of: Evaluation) -> pd.DataFrame:
    """What was asked, expected and answered, by stage, task and item; of the problems that are
    sampled from the greedy answers, too.
    """
    found = [FAMILIES[task].call("answers", of.items, name, table).assign(stage=name, task=task)
             for (name, task), table in of.pieces.items() if FAMILIES[task].answers]
    for name in of.models:
        table = of.pieces[name, "problems"]
        greedy = FAMILIES["problems"].call("answers", of.items, name,
                                           table[table.problem.isin(of.items.sampled)])
        found.append(greedy.assign(answer="[greedy] " + greedy.answer, stage=name, task=SAMPLED))
    table = pd.concat(found, ignore_index=True).sort_values(["task", "item"], kind="stable")
    return table[["stage", "task", "item", "prompt", "expected", "answer"]]


# ---- was it in the training text? ----------------------------------------------------------------


def overlap_sets(of: Evaluation) -> dict[str, list[str]]:
    """The text of every evaluation set, by name; of the protocols' sources, the pages that were
    scored.
    """
    sets = {name: family.call("texts", of.items) for name, family in FAMILIES.items()
            if family.texts}
    for source in of.items.texts:
        scored = -1
        for name in of.models:
            table = of.pieces[name, "protocols"]
            pages = table.document[(table.source == source) & (table.protocol == "T1")]
            scored = max(scored, int(pages.max()))
        pages = held_out_pages(source, scored_split(source), of.config.data.world_seed)
        sets[f"text {source}"] = list(itertools.islice(pages, scored + 1))
    return {name: texts for name, texts in sets.items() if texts}


def contamination(of: Evaluation) -> None:
    """Look the n-grams of every set up in what the stages were trained on, and score the items
    without any again; `of.overlap` is None where that text is not known.
    """
    trained = [name for name in of.run.inputs if name != "checkpoint"]
    settings, found, of.overlap = of.config.eval, None, None
    if trained and settings.overlap_words:
        found = cached_frame(
            of.folder / "pieces" / "overlap.jsonl",
            lambda: run_overlap(overlap_sets(of), training_sources(of.config, trained),
                                settings.overlap_documents, of.config.data.world_seed,
                                of.config.seed, progress=True, n=settings.overlap_words))
        of.overlap = overlap_summary(found)
        write_text(of.folder / "contamination.csv", of.overlap.to_csv(index=False))
    set_of = {("protocols", f"nats per token T1, {source}"): f"text {source}"
              for source in of.items.texts}
    keys = zip(of.item_table.task, of.item_table.metric)
    compared = of.item_table[[key in set_of or FAMILIES[key[0]].leads(key[1]) for key in keys]]
    rows = [] if found is None else clean_rows(compared, found, set_of)
    of.clean = pd.DataFrame(rows, columns=CLEAN_COLUMNS)
    write_text(of.folder / "clean_scores.csv", of.clean.to_csv(index=False))


# ---- the ledger ----------------------------------------------------------------------------------


def comparisons(of: Evaluation) -> list[tuple]:
    """Which differences the ledger holds besides those between stages, as the arguments of
    `difference_row`.
    """
    last, most = of.generator, of.items.sizes[-1]
    found = [((name, "problems, calculator", "exact match"), (name, "problems", "exact match"),
              "no calculator") for name in of.models]
    if of.verifier_samples is not None:
        vote = ("verifier", SAMPLED, f"weighted_vote@{most}")
        found += [(vote, (last, SAMPLED, "exact match"), "greedy"),
                  (("verifier", SAMPLED, f"best_of_n@{most}"), (last, SAMPLED, f"random@{most}"),
                   f"random@{most}")]
        found += [(vote, (last, SAMPLED, f"{method}@{most}"), f"{method}@{most}")
                  for method in ("log_prob", "calculator", "majority")]
    found += [((last, task, family.compared), (name, task, family.compared), name)
              for name in of.others for task, family in FAMILIES.items() if family.compared]
    return found


def further_rows(of: Evaluation) -> list[dict]:
    """Rows that are no means over items: perplexities, protocols, sentiment by demonstrations,
    costs.
    """
    rows = perplexity_rows({name: of.pieces[name, "perplexity"] for name in of.folders})
    for name, (task, family) in itertools.product(of.models, FAMILIES.items()):
        if family.rows and (name, task) in of.pieces:
            rows += family.call("rows", of.items, name, of.pieces[name, task])
    return rows + cost_rows(spent(of.run), of.run.device)


def spent(run: EvaluatedRun) -> dict[str, dict]:
    """Minutes and tokens of the stages of this run that trained the models under test."""
    run_folder, found = run.folder.parent, {}
    stages = read_json(run_folder / "run.json")["stages"]
    for name, folder in run.inputs.items():
        if folder.parent.parent == run_folder and "seconds" in stages.get(name, {}):
            tokens = read_json(folder.parent / "results.json").get("tokens")
            found[called(name)] = {"minutes": stages[name]["seconds"] / 60,
                                   **({"tokens": tokens} if tokens else {})}
    return found


# ---- the record ----------------------------------------------------------------------------------


def shown_samples(of: Evaluation, count: int = 3) -> dict[str, list[str]]:
    """Some problems with their gold answers and every stage's greedy ones."""
    sampled, problems = of.items.sampled, of.items.problems
    picked = ([sampled[i * len(sampled) // count] for i in range(count)]
              if len(sampled) >= count else list(range(min(count, len(problems)))))
    shown = {"problem": [problems[i].question for i in picked],
             "gold": [problems[i].answer for i in picked]}
    for name in of.folders:
        texts = of.pieces[name, "problems"].set_index("problem").text
        shown[name] = [texts[i].strip() for i in picked]
    return shown


def keep_mistakes(of: Evaluation) -> dict[str, list[dict]]:
    """Where the verifier errs most, kept as verifier_mistakes.json; empty without a verifier."""
    if of.verifier_samples is None:
        return {}
    mistakes = verifier_mistakes(of.verifier_samples, of.items.problems)
    write_json(of.folder / "verifier_mistakes.json", mistakes)
    return mistakes


def is_headline(row: dict, most: int) -> bool:
    """Whether the record shows this row of the ledger first."""
    return row["task"] in FAMILIES and FAMILIES[row["task"]].leads(row["metric"], most)


def record(of: Evaluation) -> dict:
    """The results of the stage, for results.json."""
    rows = [row for row in of.ledger.to_dict("records") if is_headline(row, of.items.sizes[-1])]
    measured = ("value", "low", "high", "n", "protocol")
    return {
        "table": [{"metric": f"{row['stage']}: {row['task']}, {row['metric']}",
                   **{name: row[name] for name in measured}} for row in rows],
        "gains": of.gains.astype(object).where(of.gains.notna(), None).to_dict("records"),
        "stages": list(dict.fromkeys(name for name, _ in of.pieces)),
        "files": sorted([*of.files, "ledger.csv", "items.csv", "answers.jsonl"]),
        "samples": of.samples,
        "seconds_by_piece": {f"{name}: {task}": value
                             for (name, task), value in of.seconds.items()},
        "eval_seconds": round(sum(of.seconds.values()), 1)}
