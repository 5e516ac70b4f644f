"""Where two runs part: a planted change is found, in the step and tensor where it was planted, and
the verdict names its cause.
"""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from modern_llm.cli import main
from modern_llm.config import get_pipeline_preset, to_dict
from modern_llm.files import atomic_folder, read_json, write_json
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.saving import save_model
from modern_llm.runs.bisecting import bisect, compare_rows, model_order, relative
from modern_llm.tests.test_inference import SMALL as ONE_LAYER

CONFIG = to_dict(get_pipeline_preset("lesson"))
STEPS = range(1, 10)
SMALL = replace(ONE_LAYER, num_layers=2)


def rows(**more):
    return [{"step": step, "tokens": 100 * step, "lr": 1e-3, "loss": 6 / step,
             "val_loss": 7 / step if step % 3 == 0 else None, "tokens_per_s": 1.0, **more}
            for step in STEPS]


def write_rows(run, stage, table):
    (run / stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run `a` with two stages, the second with three kept checkpoints."""
    run = tmp_path_factory.mktemp("bisect") / "a"
    for stage in ("pretrain", "sft"):
        (run / stage).mkdir(parents=True)
        write_rows(run, stage, rows())
        write_json(run / stage / "params.json", {
            "stage": stage, "config": {name: CONFIG[name] for name in (stage, "data", "seed")},
            "inputs": {"pretrain": {"path": "x", "sha256": "0" * 64}} if stage == "sft" else {},
            "data_files": {"t/train.jsonl": {"source": "t", "path": "t", "sha256": "1" * 64}}})
    for step in (3, 6, 9):
        torch.manual_seed(step)
        place = "checkpoint" if step == 9 else f"checkpoints/step-{step:06d}"
        with atomic_folder(run / "sft" / place, {"step": step}) as folder:
            save_model(folder, ModernDecoderLM(SMALL))
    write_json(run / "run.json", {"config": CONFIG, "stages": {}, "threads": 1, "device": "cpu",
                                  "git_commit": "c0ffee", "versions": {"torch": "2.13.0"}})
    return run


@pytest.fixture
def pair(first, tmp_path):
    """Both folders of a run and its copy, to be changed."""
    for name in "ab":
        shutil.copytree(first, tmp_path / name)
    return tmp_path / "a", tmp_path / "b"


def change(path, *names, value):
    """Write another value at a place of a JSON file."""
    record = part = read_json(path)
    for name in names[:-1]:
        part = part[name]
    part[names[-1]] = value
    write_json(path, record)


def plant(folder, name, by, whole=True):
    """Add to one value of a tensor of a checkpoint; `whole` writes it as a stage does."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[5] += by
    if not whole:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    step = read_json(folder / "meta.json")["step"]
    with atomic_folder(folder, {"step": step}) as temporary:
        save_file(tensors, temporary / "model.safetensors", {"format": "pt"})


def test_a_copy_differs_in_nothing(pair):
    found = bisect(*pair)
    assert found["same"] and found["stage"] == "sft"
    assert found["verdict"] == ("nothing differs: equal to the last bit for 9 logged steps, to "
                                "step 9, and in the checkpoints of steps 3, 6, 9")


def test_speed_is_no_difference(pair):
    write_rows(pair[1], "sft", rows(tokens_per_s=2.0, mfu=0.3))
    assert bisect(*pair)["same"]


@pytest.mark.parametrize("by, said", [(1e-7, "rounding: a relative 2e-07"),
                                      (0.1, "more than rounding")])
def test_a_changed_metric_is_found_at_its_step(pair, by, said):
    table = rows()
    for row in table[6:]:  # it goes on, and grows
        row["loss"] *= 1 + by * (row["step"] - 5)
    write_rows(pair[1], "sft", table)
    change(pair[1] / "run.json", "threads", value=2)
    found = bisect(*pair)
    assert found["metrics"]["step"] == 7 and found["metrics"]["equal"] == 6
    column, = found["metrics"]["columns"]
    assert column["column"] == "loss" and column["a"] == 6 / 7
    assert column["relative"] == pytest.approx(2 * by / (1 + 2 * by), rel=1e-3)
    assert found["verdict"].startswith(
        "equal to the last bit for 6 logged steps, to step 6; they differ at step 7: " + said)
    assert "records differ in threads" in found["verdict"]


def test_a_changed_tensor_is_found_in_its_checkpoint(pair):
    name = "model.layers.1.self_attn.q_proj.weight"
    place = pair[1] / "sft" / "checkpoints" / "step-000006"
    largest = load_file(place / "model.safetensors")[name].abs().max().item()
    plant(place, name, largest * 1e-3)
    kept = bisect(*pair)["checkpoints"]
    assert (kept["step"], kept["equal"], kept["steps"]) == (6, [3], [3, 6, 9])
    tensor, = kept["tensors"]
    assert tensor["tensor"] == name and tensor["relative"] == pytest.approx(1e-3, rel=0.01)
    assert bisect(*pair)["verdict"].startswith(
        "the metrics are equal to the last bit for 9 logged steps, to step 9, and the weights of "
        "step 6 differ: more than rounding (1e-03, relative)")


def test_a_file_changed_afterwards_is_named(pair):
    place = pair[1] / "sft" / "checkpoint"
    plant(place, "model.norm.weight", 1e-6, whole=False)
    assert bisect(*pair)["verdict"].startswith(
        f"{place / 'model.safetensors'} was changed after it was written")


def test_tensors_come_in_the_order_of_the_model(pair):
    place = pair[1] / "sft" / "checkpoints" / "step-000003"
    names = list(load_file(place / "model.safetensors"))
    for name in names:
        plant(place, name, 1.0)
    found = [row["tensor"] for row in bisect(*pair)["checkpoints"]["tensors"]]
    assert sorted(found) == sorted(names) and found == sorted(names, key=model_order)
    assert found[0] == "model.embed_tokens.weight" and "model.norm.weight" in found[-2:]
    layers = [name.split(".")[2] for name in found if ".layers." in name]
    assert layers == sorted(layers) and found[1] == "model.layers.0.input_layernorm.weight"
    assert [name.split(".")[-2] for name in found if ".layers.0.self_attn" in name][:3] == [
        "q_proj", "k_proj", "v_proj"]


@pytest.mark.parametrize("names, value, said", [
    (("config", "seed"), 3, "another seed (0 and 3)"),
    (("config", "sft", "lr"), 0.5, "other settings: sft.lr"),
    (("inputs", "pretrain", "sha256"), "2" * 64, "they start from other weights"),
    (("data_files", "t/train.jsonl", "sha256"), "2" * 64, "they read other data: t/train.jsonl"),
    (("config", "sft", "micro_batch_size"), 3, "their records differ in sft.micro_batch_size")])
def test_the_verdict_names_the_cause(pair, names, value, said):
    write_rows(pair[1], "sft", [row | {"loss": row["loss"] * 1.25} for row in rows()])
    change(pair[1] / "sft" / "params.json", *names, value=value)
    said_so = bisect(*pair)["verdict"]
    assert said_so.startswith("they differ from the first logged step on, step 1: ")
    assert said in said_so


def test_a_setting_that_an_older_record_lacks_is_as_it_was(pair):
    record = read_json(pair[1] / "sft" / "params.json")
    assert record["config"]["sft"].pop("lora_rank") == 0
    write_json(pair[1] / "sft" / "params.json", record)
    assert bisect(*pair)["told"]["settings"] == {}


def test_the_same_weights_by_another_name_are_the_same_start(pair):
    change(pair[1] / "sft" / "params.json", "inputs",
           value={"checkpoint": {"path": "elsewhere", "sha256": "0" * 64}})
    assert bisect(*pair)["same"] and bisect(*pair)["told"]["start"] == {}


def test_rows_are_compared_where_both_have_them():
    one = {step: {"step": step, "loss": 1.0, "nats": 2.0} for step in (1, 2, 4)}
    other = {step: {"step": step, "loss": 1.0, "val_loss": 9.0} for step in (2, 3, 4)}
    assert compare_rows(one, other) == {"step": None, "columns": [], "equal": 2, "steps": 2,
                                        "until": 4}
    other[4]["loss"] = None
    found = compare_rows(one, other)
    assert found["step"] == 4 and found["columns"][0]["relative"] == math.inf
    assert relative(2.0, 3.0) == pytest.approx(1 / 3) and relative(0.0, -1e-9) == 1.0


# ---- the command ---------------------------------------------------------------------------------


def typed(pair, *words):
    return CliRunner().invoke(main, ["bisect", *words, "--output-dir", str(pair[0].parent)])


def test_the_command_says_all_of_it(pair):
    assert typed(pair, "a", "b").exit_code == 0
    write_rows(pair[1], "sft", rows()[:5] + [row | {"loss": 9.0} for row in rows()[5:]])
    plant(pair[1] / "sft" / "checkpoint", "model.embed_tokens.weight", 1.0)
    change(pair[1] / "sft" / "params.json", "config", "seed", value=1)
    done = typed(pair, "a", str(pair[1]))
    assert done.exit_code == 1
    assert "settings: seed 0 (not 1)" in done.output and "start: the same" in done.output
    assert "5 of 9 logged steps are equal, then step 6" in done.output
    assert ("checkpoints: step 9 differs in 1 tensor, most in model.embed_tokens.weight; equal of "
            "step 3, 6" in done.output)
    assert done.output.rstrip().endswith("at step 6: another seed (0 and 1)")
    done = typed(pair, "a", "b", "--json", "--stage", "pretrain")
    assert done.exit_code == 0 and json.loads(done.output)["metrics"]["equal"] == 9


def broken(pair, place, content):
    (pair[1] / "sft" / place).write_bytes(content)


@pytest.mark.parametrize("plan, words, said", [
    (None, ("a", "bb"), "no run 'bb'"),
    (None, ("a", "b", "--stage", "dpo"), "no metrics of dpo in common: a has pretrain, sft; b has "
                                         "pretrain, sft"),
    (lambda pair: [(pair[1] / stage / "metrics.jsonl").unlink() for stage in ("pretrain", "sft")],
     ("a", "b"), "b has none"),
    (lambda pair: write_rows(pair[1], "sft", [row | {"step": row["step"] + 50} for row in rows()]),
     ("a", "b"), "logged no step in common (a: 1, 2, 3, 4, 5 …; b: 51"),
    (lambda pair: broken(pair, "metrics.jsonl", b'{"step": 1}\n{"loss\n{}\n'), ("a", "b"),
     "metrics.jsonl, line 2, is no row with a step"),
    (lambda pair: broken(pair, "checkpoint/model.safetensors", b"1234"), ("a", "b"),
     "model.safetensors is truncated or damaged"),
    (lambda pair: broken(pair, "params.json", b"{"), ("a", "b"), "params.json is damaged")])
def test_what_cannot_be_compared_is_said_in_one_line(pair, plan, words, said):
    if plan:
        plan(pair)
    done = typed(pair, *words)
    assert done.exit_code in (1, 2) and said in done.output, done.output
    assert len(done.output.splitlines()) == 1 and done.output.startswith("Error: ")
