"""The trainer under bad luck: kills, full disks, damaged and hostile files, wrong batches, lost
runs.
"""

import dataclasses
import itertools
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from modern_llm.config import DataConfig, ModelConfig, TrainConfig
from modern_llm.data.corpus import load_corpus
from modern_llm.data.packing import PackedBatches
from modern_llm.data.tokens import make_tokenizer
from modern_llm.files import DamagedFolder, read_json, sha256, write_json
from modern_llm.models import packed
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.runs.preflight import can_compile
from modern_llm.training import optim
from modern_llm.training.checkpoints import load_checkpoint, read_metrics
from modern_llm.training.optim import (
    LossOutput, Muon, chunked_cross_entropy, lm_loss, lm_loss_for, make_optimizers,
)
from modern_llm.training.recording import TrainingDiverged
from modern_llm.training.train_step import compiler_options, prepare_module
from modern_llm.training.trainer import Trainer
from modern_llm.training.training_state import CheckpointError, TrainingState

CONFIG = TrainConfig(max_steps=14, batch_size=8, micro_batch_size=4, warmup_steps=3, ema_decay=0.9,
                     log_every=3, eval_every=4, checkpoint_every=5, lr=0.01, precision="fp32")


class Toy(nn.Module):
    def __init__(self, dropout: float = 0.1, width: int = 16):
        super().__init__()
        self.embed_tokens = nn.Embedding(32, width)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.drop, self.norm = nn.Dropout(dropout), nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, 32, bias=False)

    def hidden(self, input_ids, segment_ids=None):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = x + self.drop(F.silu(layer(x)))
        return self.norm(x), x.new_zeros(())


def toy(seed: int = 1, **options) -> Toy:
    torch.manual_seed(seed)
    return Toy(**options)


def batches(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 32, (8, 6), generator=generator)
    hide = torch.rand(8, 6, generator=generator) < 0.3
    return {"input_ids": ids, "labels": ((3 * ids + 1) % 32).masked_fill(hide, -100)}


def save_weights(model, folder):
    torch.save(model.state_dict(), folder / "weights.pt")


def trainer(model, folder, cfg=CONFIG, loss_fn=lm_loss, data=batches, **options) -> Trainer:
    return Trainer(model, loss_fn, data, cfg, folder, device="cpu", progress_bar=False, **options)


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b)
               for a, b in zip(first.state_dict().values(), second.state_dict().values()))


def noisy_validation(model):  # draws random numbers, as sampling does
    return {"loss": torch.rand(()).item() + random.random()}


def any_number(what: str, low: int, high: int) -> int:
    """A number from low to high - 1, another one every time; the output of a failed test names it.
    """
    number = random.Random(time.time_ns()).randrange(low, high)
    print(what, number)
    return number


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resume_is_exact(tmp_path, optimizer, precision):
    cfg = dataclasses.replace(CONFIG, optimizer=optimizer, precision=precision)
    straight, resumed = toy(), toy(seed=7)
    trainer(straight, tmp_path / "a", cfg, evaluate=noisy_validation, save_model=save_weights).fit()
    stop_at = any_number("stopped after step", 1, cfg.max_steps)
    calls = iter(range(1, 100))
    first = trainer(toy(), tmp_path / "b", cfg,
                    should_stop=lambda: next(calls) == stop_at, save_model=save_weights).fit()
    assert (first.step, first.stopped) == (stop_at, "stopped")
    second = (
        trainer(resumed, tmp_path / "b", cfg, seed=5, resume=True, save_model=save_weights).fit())
    assert (second.step, second.stopped) == (14, "finished")
    assert second.tokens == 14 * 48
    assert same(straight, resumed)
    weights = [torch.load(tmp_path / run / "checkpoint" / "weights.pt") for run in "ab"]
    # the averaged ones
    assert all(torch.equal(*pair) for pair in zip(*(w.values() for w in weights)))
    assert not all(torch.equal(a, b)
                   for a, b in zip(weights[0].values(), straight.state_dict().values()))


KILLED = """
import os, sys
from pathlib import Path
from modern_llm.tests.test_trainer import lm_loss, world_model, world_trainer
def train(kill_at):
    passes = iter(range(1, 10**6))
    def loss_fn(model, batch):
        if next(passes) == kill_at:
            assert "torch._dynamo" not in sys.modules, "training imports torch's compiler: 3 s"
            os.kill(os.getpid(), 9)
        return lm_loss(model, batch)
    world_trainer(world_model(), Path(sys.argv[1]), loss_fn=loss_fn, resume=True).fit()
for kill_at in sys.argv[2:]:
    child = os.fork()
    if not child:
        train(int(kill_at))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def world_model() -> nn.Module:
    torch.manual_seed(1)
    return ModernDecoderLM(ModelConfig(vocab_size=512, width=32, num_layers=2, num_heads=2,
                                       num_kv_heads=1, ffn_width=64, dropout=0.2))


def world_trainer(model, folder, **options) -> Trainer:
    """The real model with dropout on packed documents, whose epochs have 3 steps, with Muon,
    micro-batches, averaged weights.
    """
    config = DataConfig(max_train_tokens=2_000, max_validation_tokens=500)
    packed = PackedBatches(
        load_corpus(config, make_tokenizer(config), progress=False)[0], 64, 8, seed=1)
    cfg = dataclasses.replace(CONFIG, max_steps=12, checkpoint_every=4)
    return trainer(model, folder, cfg, data=packed, save_model=save_weights, **options)


def test_resume_after_two_kills_9(tmp_path):
    """Killed in the forward pass of any micro-batch, twice: the weights of the run that was never
    killed.
    """
    straight, resumed = world_model(), world_model()
    world_trainer(straight, tmp_path / "a").fit()
    kill_at = (any_number("first killed in pass", 9, 24), any_number("then killed in pass", 1, 8))
    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "b"),
                              *map(str, kill_at)], capture_output=True, text=True, timeout=300)
    assert process.stdout.split() == 2 * [f"{-signal.SIGKILL}"], process.stderr
    assert load_checkpoint(tmp_path / "b" / "checkpoint")[1]["step"] in (4, 8)
    (tmp_path / "b" / ".checkpoint.12345678.tmp").mkdir()  # as a kill while writing leaves it
    result = world_trainer(resumed, tmp_path / "b", seed=3, resume=True).fit()
    steps = [row["step"] for row in result.history]
    assert same(straight, resumed) and steps == sorted(set(steps)) and result.step == 12
    averages = [torch.load(tmp_path / run / "checkpoint" / "weights.pt") for run in "ab"]
    assert all(torch.equal(*pair) for pair in zip(*(a.values() for a in averages)))
    assert not list((tmp_path / "b").glob(".*"))


@pytest.mark.parametrize("where", ["loss", "data", "validation", "signal"])
def test_interrupt_ends_cleanly_and_resumes_exactly(tmp_path, where):
    calls = {"loss": 0}

    def loss_fn(model, batch):
        calls["loss"] += 1
        out = lm_loss(model, batch)  # dropout has drawn its numbers
        if where == "loss" and calls["loss"] == 12:
            raise KeyboardInterrupt
        return out

    def data(step):
        if step == 6 and where == "data":
            raise KeyboardInterrupt
        if step == 6 and where == "signal":
            os.kill(os.getpid(), signal.SIGINT)
        return batches(step)

    def validation(model):
        if where == "validation":
            raise KeyboardInterrupt
        return {}

    handler = signal.getsignal(signal.SIGINT)
    result = trainer(toy(), tmp_path / "b", loss_fn=loss_fn, data=data, evaluate=validation).fit()
    assert result.stopped == "interrupted" and 0 < result.step < 14
    assert signal.getsignal(signal.SIGINT) is handler
    straight, resumed = toy(), toy(seed=4)
    trainer(straight, tmp_path / "a").fit()
    trainer(resumed, tmp_path / "b", resume=True).fit()
    assert same(straight, resumed)


@pytest.mark.parametrize(
    "how, status", [("SIGTERM", "preempted"), ("SIGUSR1", "preempted"), ("STOP", "stopped"),
                    ("STOP that says preempted", "preempted"), ("SLURM_JOB_END_TIME", "preempted")])
def test_scheduler_stops(tmp_path, monkeypatch, how, status):
    def should_stop():
        if how.startswith("STOP"):
            (tmp_path / "STOP").write_text("preempted\n" if "says" in how else "")
        elif how.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, how))
        time.sleep(0.01)
        return False

    if how == "SLURM_JOB_END_TIME":
        monkeypatch.setenv(how, str(int(time.time() + 59)))
    result = trainer(toy(), tmp_path, should_stop=should_stop).fit()
    assert result.stopped == status and result.step <= 2
    assert load_checkpoint(tmp_path / "checkpoint")[1]["step"] == result.step
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + 3600)))
    assert trainer(toy(), tmp_path, resume=True).fit().stopped == "finished"


def test_minutes(tmp_path, monkeypatch):
    """Half a second by a clock that a busy machine does not slow: 5 ms from one look to the next.
    """
    looks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: 0.005 * next(looks))
    cfg = dataclasses.replace(CONFIG, max_steps=10**6, max_minutes=1 / 120, log_every=1,
                              final_lr_fraction=0.0)
    result = trainer(toy(), tmp_path, cfg).fit()
    assert result.stopped == "max_minutes" and 0.5 <= result.seconds < 0.6
    rates = [row["lr"] for row in result.history]
    assert rates[-1] < 0.5 * max(rates)


def test_slow_first_steps_do_not_shorten_the_warmup(tmp_path):
    cfg = dataclasses.replace(CONFIG, max_steps=10**3, max_minutes=1 / 60, warmup_steps=4,
                              decay_fraction=0.2, log_every=1)

    def data(step):
        time.sleep(0.4 * (step == 0))  # as compilation would
        return batches(step)

    rates = [row["lr"] / cfg.lr
             for row in trainer(toy(), tmp_path, cfg, data=data).fit().history[:4]]
    assert rates == pytest.approx([0.125, 0.375, 0.625, 0.875])


def test_full_disk_leaves_the_old_checkpoint_and_the_run(tmp_path, monkeypatch):
    full = [False]
    write = torch.save

    def save(*args):
        if full[0]:
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        write(*args)

    monkeypatch.setattr(torch, "save", save)
    model = toy()
    run = trainer(model, tmp_path / "b",
                  data=lambda step: (full.__setitem__(0, step >= 8), batches(step))[1])
    with pytest.raises(CheckpointError, match="step 10: cannot write"):
        run.fit()
    assert load_checkpoint(tmp_path / "b" / "checkpoint")[1]["step"] == 5
    assert not list((tmp_path / "b").glob(".*"))
    run.batches, full[0] = batches, False
    assert run.fit().stopped == "finished"  # goes on where it was
    straight = toy()
    trainer(straight, tmp_path / "a").fit()
    assert same(model, straight)


def test_full_disk_while_logging_names_the_file_and_leaves_it_readable(tmp_path, monkeypatch):
    def half(path, *args, **options):
        if not str(path).endswith("metrics.jsonl") or not full[0]:
            return open(path, *args, **options)
        with open(path, "a") as file:
            file.write('{"step": ')
        raise OSError(28, "No space left on device")

    full = [False]
    monkeypatch.setattr("modern_llm.training.checkpoints.open", half, raising=False)
    run = trainer(toy(), tmp_path,
                  data=lambda step: (full.__setitem__(0, step >= 8), batches(step))[1])
    with pytest.raises(CheckpointError,
                       match=r"cannot write .*metrics.jsonl: No space left.*resume=True"):
        run.fit()
    full[0] = False
    result = trainer(toy(), tmp_path, resume=True).fit()
    assert (result.step, result.stopped) == (14, "finished")


def test_a_device_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="device='cuda:99' is not available here; there is: .*cpu"):
        Trainer(toy(), lm_loss, batches, CONFIG, tmp_path / "run", device="cuda:99")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root writes everywhere")
def test_unwritable_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError):
        trainer(toy(), tmp_path / "run")


@pytest.mark.parametrize("name", ["training_state.pt", "weights.pt", "meta.json"])
@pytest.mark.parametrize("damage", ["bit", "cut", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_former_one_used(tmp_path, capsys, name, damage):
    calls = iter(range(1, 100))
    trainer(toy(), tmp_path, save_model=save_weights, should_stop=lambda: next(calls) == 12).fit()
    spoil(tmp_path / "checkpoint" / name, damage)
    second = trainer(toy(seed=2), tmp_path, save_model=save_weights, resume=True)
    said = capsys.readouterr().err
    assert (name in said and "Going on from" in said and "(step 10)" in said
            and second.state.step == 10)
    assert (tmp_path / "checkpoint.damaged").is_dir()
    assert second.fit().step == 14
    assert [load_checkpoint(tmp_path / place)[1]["step"]
            for place in ("checkpoint", "checkpoint.previous")] == [14, 10]


def spoil(path: Path, damage: str) -> None:
    """Flip any bit of a file, cut it anywhere, or delete it."""
    content = bytearray(path.read_bytes())
    position = any_number(f"{path.name}, damaged at byte", 0, len(content))
    content[position] ^= 1 << any_number("bit", 0, 8)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content if damage == "bit" else content[:position])


def test_two_damaged_checkpoints_are_named_and_left_alone(tmp_path):
    trainer(toy(), tmp_path).fit()
    for place in ("checkpoint", "checkpoint.previous"):
        spoil(tmp_path / place / "training_state.pt", "cut")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(DamagedFolder, match=r"checkpoint/training_state.pt "
                                            r".*previous/training_state.pt .*nothing was changed"):
        trainer(toy(), tmp_path, resume=True)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("plain_pickle", [True, False])
def test_hostile_checkpoint_runs_nothing(tmp_path, plain_pickle):
    trainer(toy(), tmp_path, dataclasses.replace(CONFIG, max_steps=5)).fit()
    path, target = tmp_path / "checkpoint" / "training_state.pt", tmp_path / "was-here"
    (path.write_bytes(pickle.dumps(Hostile(target))) if plain_pickle
     else torch.save({"module": Hostile(target)}, path))
    meta = read_json(path.with_name("meta.json"))
    meta["sha256"] = {"training_state.pt": sha256(path)}
    write_json(path.with_name("meta.json"), meta)
    with pytest.raises(DamagedFolder, match="refused"):
        trainer(toy(), tmp_path, resume=True)
    assert not target.exists()


def test_other_model_or_used_folder_is_refused(tmp_path):
    trainer(toy(), tmp_path).fit()
    with pytest.raises(FileExistsError, match="resume=True"):
        trainer(toy(), tmp_path)
    with pytest.raises(CheckpointError, match="another model"):
        trainer(toy(width=8), tmp_path, resume=True)
    with pytest.raises(CheckpointError):
        trainer(toy(), tmp_path, dataclasses.replace(CONFIG, optimizer="adamw"), resume=True)


def test_non_finite_loss_is_never_saved(tmp_path):
    def loss_fn(model, batch):
        out = lm_loss(model, batch)
        calls.append(0)
        return LossOutput(out.total * (float("nan") if len(calls) > 14 else 1.0), out.count)

    calls = []
    with pytest.raises(TrainingDiverged, match=r"by step 8: .*checkpoint \(step 5\)"):
        trainer(toy(), tmp_path, dataclasses.replace(CONFIG, log_every=8), loss_fn).fit()
    state, meta = load_checkpoint(tmp_path / "checkpoint")
    assert meta["step"] == 5 and all(value.isfinite().all() for value in state["module"].values())
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["loss"] is None


def test_wrong_batches_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"batches\(3\).*batch_size=8"):
        trainer(toy(), tmp_path,
                data=lambda step: {k: v[: 8 - (step == 3)] for k, v in batches(step).items()}).fit()


def test_fully_masked_batch_changes_nothing_but_decay(tmp_path):
    def data(step):
        batch = batches(step)
        return {**batch, "labels": torch.full_like(batch["labels"], -100)}

    model, before = toy(), toy()
    trainer(model, tmp_path, dataclasses.replace(CONFIG, weight_decay=0.0), data=data).fit()
    assert same(model, before)


def test_accumulation_changes_only_rounding(tmp_path):
    models = []
    for size in (1, 2, 8):
        models.append(toy(dropout=0.0))
        trainer(models[-1], tmp_path / str(size),
                dataclasses.replace(CONFIG, micro_batch_size=size, optimizer="adamw")).fit()
    for model in models[1:]:
        for a, b in zip(models[0].parameters(), model.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_kept_checkpoints_are_evenly_spaced(tmp_path):
    cfg = dataclasses.replace(CONFIG, max_steps=16)
    trainer(toy(), tmp_path, cfg, save_model=save_weights).fit()
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-000004", "step-000008", "step-000012"]
    assert not list((tmp_path / "checkpoints").rglob("training_state.pt"))


def test_a_lower_learning_rate_holds_after_resume(tmp_path):
    trainer(toy(), tmp_path, dataclasses.replace(CONFIG, max_steps=5)).fit()
    run = trainer(toy(), tmp_path, dataclasses.replace(CONFIG, lr=1e-5, muon_lr=1e-4), resume=True)
    run.fit()
    assert ([group["peak_lr"] for o in run.state.optimizers for group in o.param_groups]
            == [1e-4, 1e-5, 1e-5])


class Halved(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) / 2


def test_compiled_blocks_keep_their_names(tmp_path, monkeypatch):
    """Every block is compiled, steps run through the compiled graphs, and names and losses are
    those of a plain run.
    """
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    # no C++ compiler is asked
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    cfg = dataclasses.replace(CONFIG, max_steps=3, log_every=1)
    plain, model = (toy(dropout=0.0) for _ in range(2))
    for each in (plain, model):
        # torch compiles no bare nn.Linear
        each.layers = nn.ModuleList(Halved(layer) for layer in each.layers)
    names = list(model.state_dict())
    wanted = trainer(plain, tmp_path / "plain", cfg).fit().history
    run = trainer(model, tmp_path / "compiled", dataclasses.replace(cfg, compile=True))
    assert all(block._compiled_call_impl is not None for block in model.layers) and not graphs
    found = run.fit().history
    assert (graphs and [row["loss"] for row in found]
                       == pytest.approx([row["loss"] for row in wanted], rel=1e-5))
    assert list(model.state_dict()) == names == list(plain.state_dict())


def test_frozen_and_tied_parameters():
    model = toy()
    model.lm_head.weight = model.embed_tokens.weight
    model.layers[0].weight.requires_grad_(False)
    optimizers = make_optimizers(model, CONFIG)
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters())) - 1
    assert isinstance(optimizers[0], Muon) and len(optimizers[0].param_groups[0]["params"]) == 1
    with pytest.raises(ValueError, match="nothing to train"):
        make_optimizers(model.requires_grad_(False), CONFIG)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_cross_entropy_scales_with_upstream(dtype, compiled, monkeypatch):
    # traced by the compiler, which generates no code here
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.manual_seed(0)
    hidden = torch.randn(13, 8, dtype=dtype, requires_grad=True)
    weight, labels = (torch.randn(40, 8, dtype=dtype, requires_grad=True),
                      torch.randint(0, 40, (13,)))
    full = F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum") * 3
    chunked = chunked_cross_entropy(hidden, weight, labels, 4, compiled=compiled) * 3
    tolerance = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=0.05, atol=0.1)
    torch.testing.assert_close(chunked, full, **tolerance)
    for a, b in zip(torch.autograd.grad(chunked, (hidden, weight)),
                    torch.autograd.grad(full, (hidden, weight))):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.thorough
@pytest.mark.skipif(not can_compile(), reason="no C++ compiler, or no headers of Python")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_for_this_processor_it_gives_the_same_gradients(precision):
    """By torch's real compiler: packed rows, and a number of labels that is another every time."""
    cfg = ModelConfig(vocab_size=64, context_length=32, width=64, num_layers=2, num_heads=2,
                      num_kv_heads=1, ffn_width=96, zero_init_outputs=False)
    found = {}
    for compiled in (False, True):
        train = dataclasses.replace(CONFIG, precision=precision, compile=compiled)
        torch.manual_seed(0)
        model = ModernDecoderLM(cfg)
        prepare_module(model, train)
        state, generator = TrainingState(model, train, torch.device("cpu")), random.Random(0)
        for hidden in range(12):
            ids = torch.randint(0, 64, (4, 32), generator=torch.Generator().manual_seed(hidden))
            labels = ids.roll(-1, 1)
            labels.view(-1)[generator.sample(range(128), hidden)] = -100
            segments = torch.arange(32).ge(generator.randrange(1, 32)).long().expand(4, -1)
            with state.autocast():
                loss = lm_loss_for(train)(model, {"input_ids": ids, "labels": labels,
                                                  "segment_ids": segments})
            assert int(loss.count) == 128 - hidden
            loss.total.backward()
        found[compiled] = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert found[True].isfinite().all()
    distance = (found[True] - found[False]).norm() / found[False].norm()
    assert distance < (1e-4 if precision == "fp32" else 2e-2), distance


@pytest.mark.thorough
@pytest.mark.skipif(not can_compile(), reason="no C++ compiler, or no headers of Python")
def test_compiled_in_bfloat16_attention_in_two_groups_has_the_same_gradients(monkeypatch):
    """The gradient of the keys turns round a matrix for each group of rows in one kernel, which is
    what `compiler_options` is for: without them a third of it is garbage where GCC 12 compiles.
    """
    monkeypatch.setattr(packed, "SCORES_AT_ONCE", 2 * 64 * 64)
    attention = packed.ProductAttention.of(64, None)

    def gradients(attend):
        inputs = [torch.randn(2, 2, 64, 64, generator=torch.Generator().manual_seed(seed))
                  .bfloat16().requires_grad_() for seed in range(3)]
        attend(*inputs).float().square().sum().backward()
        return [values.grad.float() for values in inputs]

    options = compiler_options(dataclasses.replace(CONFIG, precision="bf16"), torch.device("cpu"))
    compiled = torch.compile(lambda q, k, v: attention(q, k, v), options=options)
    for plain, found in zip(gradients(attention), gradients(compiled)):
        torch.testing.assert_close(found, plain, rtol=2e-2, atol=2e-2 * plain.abs().max().item())


def test_losses_in_bfloat16_keep_to_few_shapes_and_to_their_value(monkeypatch):
    """oneDNN keeps a kernel of every shape it has met, so the labelled rows are filled up."""
    seen, chunk = [], optim.cross_entropy_chunk
    monkeypatch.setattr(optim, "cross_entropy_chunk",
                        lambda hidden, *rest: seen.append(len(hidden)) or chunk(hidden, *rest))
    torch.manual_seed(0)
    hidden, weight = (torch.randn(size, 32, requires_grad=True) for size in (700, 40))
    for labelled in (1, 5, 255, 256, 257, 700):
        labels = torch.randint(0, 40, (700,))
        labels[torch.randperm(700)[labelled:]] = -100
        with torch.autocast("cpu", torch.bfloat16):
            nats = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=4096)
        exact = chunked_cross_entropy(hidden, weight, labels, chunk_tokens=4096)
        gradients = [torch.autograd.grad(loss, (hidden, weight)) for loss in (nats, exact)]
        assert nats.item() == pytest.approx(exact.item(), rel=0.01)
        for ours, wanted in zip(*gradients):
            assert (ours - wanted).norm() < 0.02 * wanted.norm()
    assert seen[::2] == [256, 256, 256, 256, 512, 700] and seen[1::2] == [1, 5, 255, 256, 257, 700]
