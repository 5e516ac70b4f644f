"""What depends on the machine and can be tried without it: names of devices, fake GPUs, ranks, a
device without float64, shares of a peak.
"""

import math
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from modern_llm.cli import main
from modern_llm.config import (
    ConfigError, DPOConfig, HardwareConfig, ModelConfig, PipelineConfig, TrainConfig,
    VerifierConfig,
)
from modern_llm.config import get_pipeline_preset
from modern_llm.data.tokens import make_tokenizer, save_tokenizer
from modern_llm.messages import StageError
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.models.saving import save_model
from modern_llm.models.verifier import VerifierModel, small_encoder
from modern_llm.runs.parameters import resolve
from modern_llm.runs.preflight import preflight
from modern_llm.training import distributed
from modern_llm.training.distributed import World, check_one_gpu_per_rank, on_ranks
from modern_llm.training.dpo import dpo_loss
from modern_llm.training.optim import lm_loss
from modern_llm.training.ranks import local_gpu
from modern_llm.training.recording import peak_flops
from modern_llm.training.train_step import micro_batches, optimizer_step
from modern_llm.training.trainer import Trainer
from modern_llm.training.training_state import TrainingState, pick_device
from modern_llm.training.verifier import verifier_loss

NO_NAMES = ["tpu", "CPU", "gpu", "GPU", "meta", "cuda:-1", "cuda:", "cuda:x", "cuda:1.0", "cuda:01",
            "cuda:99999999999999999999", "cuda0", "cpu:1", "mps:1", "auto:0", " cpu", "cpu ",
            "cpu\n", "", "xpu", "cuda:\u0661", "/dev/nvidia0", "device", "None"]


@pytest.fixture
def fake_gpus(monkeypatch):
    """A machine that seems to have so many GPUs; returns the list of those that were chosen."""
    def pretend(count: int) -> list:
        chosen = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        return chosen

    return pretend


# ---- names of devices ----------------------------------------------------------------------------


@pytest.mark.fault("messages")
@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name_of_a_device(name):
    with pytest.raises(ConfigError,
                       match=r"device='.*' is unknown: say auto .*cpu.*mps.*cuda:1 for the second"):
        pick_device(name)
    with pytest.raises(ConfigError, match="hardware.device='"):
        HardwareConfig(device=name)


@pytest.mark.fault("messages")
@pytest.mark.parametrize(
    "name, gpus, found",
    [("cuda:7", 0, None), ("cuda", 0, None), ("cuda:0", 0, None),
     ("mps", 0, None), ("mps:0", 0, None), ("cuda:7", 4, None), ("cuda:4", 4, None),
     ("cuda:3", 4, "cuda:3"), ("cuda", 4, "cuda"), ("auto", 4, "cuda"),
     ("auto", 0, "cpu"), ("cpu", 4, "cpu"), ("cpu:0", 0, "cpu:0")])
def test_a_device_is_there_or_those_that_are_there_are_named(fake_gpus, name, gpus, found):
    chosen = fake_gpus(gpus)
    if found:
        assert str(pick_device(name)) == found and chosen == [3] * (found == "cuda:3")
    else:
        there = r"cuda, cpu \(cuda:0 to cuda:3\)" if gpus else "cpu"
        with pytest.raises(ConfigError,
                           match=f"device='{name}' is not available here; there is: {there}$"):
            pick_device(name)
        assert not chosen


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny base model."""
    config, folder = get_pipeline_preset("local-smoke"), tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer(config.data)
    save_model(folder, ModernDecoderLM(ModelConfig(width=16, num_layers=1, num_heads=2,
                                                   num_kv_heads=1, ffn_width=16)))
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.mark.fault("messages")
@pytest.mark.parametrize("command", [["sample", "--prompt", "a"], ["check-inference"]])
@pytest.mark.parametrize("name", ["tpu", "gpu", "CPU", "cuda:-1", "cuda:7", "mps", "meta", ""])
def test_commands_say_it_on_one_line(checkpoint, command, name):
    result = CliRunner().invoke(main, [*command, "--checkpoint", str(checkpoint), "--device", name])
    assert result.exit_code not in (0, 1) and isinstance(result.exception, SystemExit), (
        result.exception)
    assert (f"device={name!r} is " in result.output and "cpu" in result.output
            and "Traceback" not in result.output)


@pytest.mark.fault("messages")
@pytest.mark.parametrize("name", ["tpu", "gpu", "CPU", "cuda:-1", "meta", "cuda:x"])
def test_a_run_is_refused_before_anything_is_written(tmp_path, name):
    result = CliRunner().invoke(main, ["run", "--stage", "pretrain", "--output-dir",
                                       str(tmp_path), "-p", f"device={name}"])
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit), result.exception
    assert f"device={name!r} is " in result.output and "Traceback" not in result.output


# ---- every stage, every strategy -----------------------------------------------------------------

MODEL = ModelConfig(vocab_size=40, context_length=16, width=16, num_layers=2, num_heads=2,
                    num_kv_heads=1, ffn_width=24, zero_init_outputs=False, balance_loss_weight=0.0,
                    router_z_loss_weight=0.0)  # the router's losses are means over a micro-batch
MODELS = {"tied": MODEL, "untied": replace(MODEL, tie_embeddings=False),
          "sinks": replace(MODEL, use_attention_sinks=True),
          "experts": replace(MODEL, num_experts=4, experts_per_token=1, tie_embeddings=False)}
STEPS = dict(max_steps=2, batch_size=12, micro_batch_size=4, lr=1e-3, muon_lr=1e-3, warmup_steps=0,
             keep_checkpoints=0, precision="fp32", ema_decay=0.5)
VERIFIERS = {"verifier": {}, "verifier without surprise": {"surprise": False},
             "verifier, no language": {"lm_weight": 0.0}, "verifier, encoder": {"kind": "encoder"},
             "verifier, encoder of a whole model": {"kind": "encoder"}}
STAGES = ["pretrain", "pretrain, recomputed", "dpo", "dpo with replay", *VERIFIERS]


def rows_of(step: int, rows: int = 12, width: int = 16) -> dict[str, torch.Tensor]:
    """Rows of two documents each, of which every third token is trained or judged."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(1, 40, (rows, width), generator=generator)
    segments = torch.arange(width).ge(width // 2).long().expand(rows, -1) + 1
    labels = ids.roll(-1, 1).masked_fill(torch.rand(rows, width, generator=generator) < 0.6, -100)
    return {"input_ids": ids, "labels": labels, "segment_ids": segments}


def stage_of(name: str, cfg: ModelConfig):
    """The module of a stage, its loss, its batches and its settings."""
    torch.manual_seed(3)
    model, train = (ModernDecoderLM(cfg),
                    TrainConfig(**STEPS, gradient_checkpointing="recomputed" in name))
    if name.startswith("pretrain"):
        return model, partial(lm_loss, chunk_tokens=20), rows_of, train
    if name.startswith("dpo"):
        train = DPOConfig(**STEPS, replay_weight=0.5 * ("replay" in name), sft_weight=0.1)

        def pairs(step: int) -> dict[str, torch.Tensor]:
            found = {f"{side}_{key}": value for number, side in enumerate(("chosen", "rejected"))
                     for key, value in rows_of(10 * step + number).items() if key != "segment_ids"}
            found |= {f"reference_{side}": torch.full((12,), -20.0)
                      for side in ("chosen", "rejected")}
            return found | {f"replay_{key}": value
                            for key, value in rows_of(10 * step + 2).items() if train.replay_weight}

        return model, partial(dpo_loss, cfg=train), pairs, train
    train = VerifierConfig(**STEPS, head_dropout=0.0, **VERIFIERS[name])
    verifier = VerifierModel(small_encoder(cfg) if name.endswith("encoder") else model, train)
    torch.nn.init.normal_(verifier.head.weight, std=0.1)

    def answers(step: int) -> dict[str, torch.Tensor]:
        batch = rows_of(step)
        inside = (torch.arange(16) % 8 > 3).long().expand(12, -1)
        right = (batch["input_ids"].sum(1, keepdim=True) % 2).expand(-1, 16).float()
        return {"input_ids": batch["input_ids"], "segment_ids": batch["segment_ids"],
                "answers": inside, "weights": inside / 8.0, "targets": right}

    return verifier, partial(verifier_loss, lm_weight=train.lm_weight), answers, train


def trained(name: str, model: str, folder, world: World) -> dict[str, torch.Tensor]:
    """The weights that two steps of a stage leave in its checkpoint."""
    module, loss, batches, train = stage_of(name, MODELS[model])
    run = Trainer(module, loss, batches, train, folder, device="cpu", world=world,
                  progress_bar=False, save_model=lambda m, place: torch.save(
                      m.state_dict(), place / "weights.pt"), evaluate=lambda m: {"loss": 0.0})
    run.fit()
    world.all_reduce_max(0)
    return torch.load(folder / "checkpoint" / "weights.pt")


class StrictDDP(distributed.DistributedDataParallel):
    """As on a GPU: every trained parameter must get a gradient."""

    def __init__(self, *args, **options):
        super().__init__(*args, **{**options, "find_unused_parameters": False})


@pytest.mark.fault("ranks")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", STAGES)
def test_what_is_trained_gets_a_gradient(name, model):
    """In every micro-batch: a parameter that a loss never reaches stops DDP on a GPU."""
    module, loss, batches, train = stage_of(name, MODELS[model])
    for part in micro_batches(batches(0), 5):
        module.zero_grad(set_to_none=True)
        loss(module, part).total.backward()
        assert [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None] == []
    frozen = [n for n, p in module.named_parameters() if not p.requires_grad]
    assert (frozen
            == ["model.lm_head.weight"] * ("encoder" in name and not MODELS[model].tie_embeddings))


CASES = [("pretrain", "experts"), ("pretrain, recomputed", "sinks"), ("dpo with replay", "untied"),
         ("verifier", "tied"), ("verifier", "untied"), ("verifier, encoder", "untied")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The weights of one process."""
    return {case: trained(*case, tmp_path_factory.mktemp("alone"), World()) for case in CASES}


@pytest.fixture(scope="module", params=["ddp on a GPU", "fsdp"])
def together(alone, request, tmp_path_factory):
    """The weights of two ranks, or what went wrong; all cases by the same two processes."""
    place = tmp_path_factory.mktemp("together")

    def all_cases(world: World) -> dict:
        done: dict = {}
        distributed.DistributedDataParallel = StrictDDP
        for name, model in CASES:
            try:
                weights = trained(name, model, place / f"{name}-{model}", world)
                done[name, model] = {key: value.numpy() for key, value in weights.items()}
            except Exception as error:
                done[name, model] = f"{type(error).__name__}: {error}"
                break  # the other rank may wait for this one
        return done

    return on_ranks(all_cases, strategy=request.param.split()[0])[0]


@pytest.mark.fault("ranks")
@pytest.mark.parametrize("name, model", CASES)
def test_every_stage_trains_alike_on_two_ranks(alone, together, name, model):
    """One process with three passes of four rows, two ranks with two of three: the same weights
    after two steps.
    """
    one, two = alone[name, model], together.get((name, model), "a case before this one failed")
    assert not isinstance(two, str), two
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(torch.from_numpy(two[key]),
                                   one[key], rtol=1e-3, atol=1e-4, msg=key)


# ---- a GPU for every rank ------------------------------------------------------------------------


@pytest.mark.fault("ranks")
@pytest.mark.parametrize(
    "environment, gpus, own",
    [({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, 4, 1),  # torchrun, four to a machine
     ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_LOCALID": "0",
       "SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}, 4, 1),  # srun torchrun
     # srun, all GPUs visible
     ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "3"}, 4, 3),
     # --gpus-per-task=1
     ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "3"}, 1, 0),
     # --gpus-per-task=2
     ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "3"}, 2, 1),
     # CUDA_VISIBLE_DEVICES set by hand for each
     ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}, 1, 0),
     # RANK and WORLD_SIZE exported by hand in a step of srun
     ({"RANK": "2", "WORLD_SIZE": "4", "SLURM_LOCALID": "2"}, 4, 2),
     ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "", "SLURM_LOCALID": ""}, 4, 0),
     ({}, 4, 0)])
def test_which_gpu_is_a_ranks_own(fake_gpus, monkeypatch, environment, gpus, own):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "SLURM_PROCID",
                 "SLURM_NTASKS", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
        if name in environment:
            monkeypatch.setenv(name, environment[name])
    chosen = fake_gpus(gpus)
    assert local_gpu(gpus) == own
    assert World(3, 4).place(torch.device("cuda")) == torch.device("cuda", own) and chosen == [own]
    assert World().place(torch.device("cuda:2")) == torch.device("cuda:2") and chosen == [own]
    assert World(3, 4).place(torch.device("cpu")) == torch.device("cpu") and chosen == [own]


@pytest.mark.fault("ranks")
@pytest.mark.parametrize("device", ["cuda:0", "cuda:1", "mps", "mps:0"])
def test_several_ranks_are_not_put_on_one_device(fake_gpus, device, tmp_path):
    chosen = fake_gpus(2)
    with pytest.raises(ConfigError, match="2 ranks need a GPU each, or device=cpu; "
                                          f"device='{device}' is a single one"):
        World(1, 2).place(torch.device(device))
    with pytest.raises(ConfigError, match=f"hardware.device='{device}' is a single device, "
                                          "hardware.ranks=2 need one each"):
        PipelineConfig(hardware=HardwareConfig(device=device, ranks=2))
    result = CliRunner().invoke(main, ["run", "--stage", "pretrain", "--output-dir", str(tmp_path),
                                       "-p", f"device={device}", "-p", "hardware.ranks=2"])
    assert (result.exit_code == 2 and "is a single device" in result.output and not chosen
            and not list(tmp_path.iterdir()))
    assert PipelineConfig(hardware=HardwareConfig(device="cuda", ranks=2)).hardware.ranks == 2
    assert PipelineConfig(hardware=HardwareConfig(device=device)).hardware.device == device


@pytest.mark.fault("ranks")
@pytest.mark.parametrize(
    "gpus, message",
    [("abcd", None), ("abcb", r"ranks 1 and 3 are on one GPU \(.*, GPU b\): start at most as many"),
     ("aaaa", "ranks 0 and 1 are")])
def test_a_gpu_of_two_ranks_is_named_on_all_of_them(gpus, message):
    """More ranks than GPUs: told apart by the GPU's identity, since with one visible GPU each all
    of them are cuda:0.
    """
    store = dist.HashStore()

    def meet(rank: int) -> str:
        try:
            check_one_gpu_per_rank(store, rank, len(gpus), gpus[rank])
        except ConfigError as error:
            return str(error)

    with ThreadPoolExecutor(len(gpus)) as pool:
        said = list(pool.map(meet, range(len(gpus))))
    assert len(set(said)) == 1 and (re.search(message, said[0]) if message else said[0] is None)


@pytest.mark.fault("ranks")
def test_more_ranks_than_gpus_are_refused_before_the_data_are_read(fake_gpus, monkeypatch):
    fake_gpus(2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**12, 10**12))
    config = resolve(
        "pretrain", {"preset": "lesson", "overrides": "hardware.device=cuda hardware.ranks=4"})
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(StageError, match="4 ranks on this machine need a GPU each, and there are "
                                         "2: say hardware.ranks=2, or device=cpu"):
        preflight(config, "pretrain")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert preflight(config, "pretrain")[1] == "cuda"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_gpu_waits_minutes_and_a_host_a_day(monkeypatch, device):
    """A rank that is lost in the middle of a step is noticed; one that samples for hours is not
    taken for lost.
    """
    groups = []
    for name in ("next_training", "broadcast_task", "wait_for_task", "check_one_gpu_per_rank"):
        monkeypatch.setattr(distributed, name, lambda *values: 0)
    monkeypatch.setattr(distributed, "open_store", dist.HashStore)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout, **others:
                        groups.append((backend, timeout.total_seconds())))
    monkeypatch.setattr(dist, "new_group", lambda backend, timeout:
                        groups.append((backend, timeout.total_seconds())) or "hosts")
    monkeypatch.setattr(World, "trainings", 0)
    monkeypatch.setattr(World, "hosts", None)
    World(0, 2).join(torch.device(device))
    assert groups == ([("cpu:gloo,cuda:nccl", 600), ("gloo", 86_400)] if device == "cuda"
                      else [("gloo", 86_400)])
    assert World(0, 2).hosts == ("hosts" if device == "cuda" else None)


@pytest.mark.parametrize(
    "given, found", [({}, "expandable_segments:True"), ({"PYTORCH_ALLOC_CONF": "a:1"}, "a:1"),
                     ({"PYTORCH_CUDA_ALLOC_CONF": "a:1"}, None)])
def test_gpu_memory_grows_in_place_unless_one_chose(given, found):
    clean = {k: v for k, v in os.environ.items() if not k.endswith("ALLOC_CONF")}
    code = "import modern_llm, os; print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    said = subprocess.run([sys.executable, "-c", code], env={**clean, **given}, text=True,
                          capture_output=True, check=True).stdout
    assert said.strip() == str(found)


def test_a_row_says_how_long_batches_were_waited_for(tmp_path):
    module, loss, batches, train = stage_of("pretrain", MODEL)

    def slow(step: int) -> dict:
        time.sleep(0.05)
        return batches(step)

    run = Trainer(module, loss, slow, replace(train, max_steps=4, log_every=1), tmp_path,
                  device="cpu", progress_bar=False)
    rows = run.fit().history
    assert 0.03 < rows[0]["data_wait_s"] and all(row["data_wait_s"] >= 0 for row in rows)
    assert [row["peak_memory_gb"] for row in rows] == [None] * 4  # of a GPU


# ---- micro-batches -------------------------------------------------------------------------------


@pytest.mark.fault("ranks")
@settings(max_examples=200, deadline=None, derandomize=True)
@given(rows=st.integers(1, 130), size=st.integers(1, 140))
def test_a_batch_is_read_in_as_few_passes_as_can_be(rows, size):
    batch = {"input_ids": torch.arange(2 * rows).view(rows, 2), "labels": torch.arange(rows)}
    parts = list(micro_batches(batch, size))
    lengths = [len(part["labels"]) for part in parts]
    assert (len(parts) == math.ceil(rows / size) and max(lengths) <= size
            and max(lengths) - min(lengths) <= 1)
    assert all(torch.equal(torch.cat([part[name] for part in parts]), batch[name])
               for name in batch)


@pytest.mark.fault("ranks")
@pytest.mark.parametrize(
    "batch, micro, ranks, passes",
    [(60, 12, 4, 2), (60, 12, 1, 5), (60, 20, 4, 1), (60, 60, 4, 1), (36, 12, 2, 2),
     (30, 15, 6, 1), (70, 10, 2, 4), (62, 31, 2, 1), (62, 2, 2, 16), (12, 1, 3, 4)])
def test_the_passes_of_a_rank_make_the_step_of_one_pass(batch, micro, ranks, passes):
    rows = rows_of(1, batch // ranks)
    seen, weights = [], []
    for size in (micro, batch):
        torch.manual_seed(0)
        cfg = TrainConfig(batch_size=batch, micro_batch_size=size, precision="fp32",
                          optimizer="adamw", lr=1e-3)
        state = TrainingState(ModernDecoderLM(MODEL), cfg, torch.device("cpu"))
        counted = lambda module, part: (seen.append(len(part["labels"])), lm_loss(module, part))[1]
        out, norm = optimizer_step(state, counted, rows, cfg, 1.0)
        weights.append((out.total, out.count, norm, *state.module.parameters()))
    assert len(seen) == passes + 1 and seen[-1] == batch // ranks
    for one, other in zip(*weights):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


# ---- the share of the peak -----------------------------------------------------------------------


@pytest.mark.fault("counts")
@pytest.mark.parametrize(
    "name, peak",
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
     ("NVIDIA H200", 989e12), ("NVIDIA H200 NVL", 836e12), ("NVIDIA GH200 480GB", 989e12),
     ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA A100-PCIE-40GB", 312e12),
     ("NVIDIA A100 80GB PCIe", 312e12), ("A100", 312e12),
     ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
     ("GRID A100-10C", None), ("NVIDIA RTX A1000", None), ("NVIDIA RTX A1000 Laptop GPU", None),
     ("NVIDIA A100X", None), ("NVIDIA H20", None), ("NVIDIA H800", None),
     ("NVIDIA A10", None), ("Tesla V100-SXM2-16GB", None), ("NVIDIA GeForce RTX 3060", None),
     ("AMD Instinct MI300X", None), ("", None), ("x86_64", None)])
def test_peaks_of_whole_gpus(name, peak):
    assert (peak_flops(name) == peak_flops(name, torch.float16) == peak
            and peak_flops(name, torch.float32) is None)


def mfu_of(world: World, folder, ranks_peak: float = 1e9) -> list[dict]:
    """The rows of four steps on a device whose peak seems to be known."""
    module, loss, batches, train = stage_of("pretrain", MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modern_llm.training.recording.peak_flops", lambda name, dtype: ranks_peak)
        run = Trainer(module, loss, batches, replace(train, max_steps=4, log_every=1), folder,
                      device="cpu", world=world, progress_bar=False, flops_per_token=1e6)
        return run.fit().history


@pytest.mark.fault("counts")
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_share_of_the_peak_is_that_of_all_ranks(tmp_path, ranks):
    """Tokens of all ranks per second, over the peaks of all ranks."""
    history = (on_ranks(lambda world: mfu_of(world, tmp_path), ranks)[0] if ranks > 1
               else mfu_of(World(), tmp_path))
    assert isinstance(history, list) and len(history) == 4, history
    for row in history:
        assert row["mfu"] == pytest.approx(row["tokens_per_s"] * 1e6 / (1e9 * ranks), rel=1e-9)
    assert [row["tokens"] for row in history] == [12 * 16 * step for step in (1, 2, 3, 4)]


def test_no_peak_no_share(tmp_path):
    module, loss, batches, train = stage_of("pretrain", MODEL)
    history = Trainer(module, loss, batches, train, tmp_path, device="cpu", progress_bar=False,
                      flops_per_token=1e6).fit().history
    assert [row["mfu"] for row in history] == [None] * len(history)
