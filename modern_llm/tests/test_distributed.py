"""Several real processes make the run that one makes: the trainer itself, over gloo on this
machine.
"""

import dataclasses
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from modern_llm.config import ConfigError, HardwareConfig, PipelineConfig, TrainConfig
from modern_llm.tests.test_trainer import any_number, batches, lm_loss, save_weights, toy, trainer
from modern_llm.training import training_state
from modern_llm.training.checkpoints import RunFolder, load_checkpoint
from modern_llm.training.distributed import DataParallelLoss, RankFailed, World, on_ranks
from modern_llm.training.ranks import address, rank_info

CONFIG = TrainConfig(max_steps=12, batch_size=8, micro_batch_size=2, warmup_steps=3, ema_decay=0.9,
                     log_every=1, eval_every=6, checkpoint_every=4, lr=3e-3, muon_lr=5e-3,
                     keep_checkpoints=1, precision="fp32")


def run(folder, cfg=CONFIG, dropout=0.0, **options):
    """A function of a world: train in `folder`, return the history and how it ended."""
    def train(world: World):
        model = toy(seed=1, dropout=dropout)
        result = trainer(model, folder, cfg, world=world, save_model=save_weights,
                         evaluate=lambda m: {"loss": m.norm.weight.sum()}, **options).fit()
        return result.history, (result.step, result.stopped, result.tokens)

    return train


def losses(history: list[dict], name: str = "loss") -> list[float]:
    return [row[name] for row in history if row.get(name) is not None]


def saved(folder) -> dict:
    return torch.load(folder / "checkpoint" / "weights.pt")


@pytest.mark.parametrize("strategy, size, optimizer", [("ddp", 2, "muon"), ("fsdp", 2, "muon"),
                                                       ("fsdp", 2, "adamw"), ("ddp", 4, "adamw")])
def test_ranks_train_like_one_process(tmp_path, strategy, size, optimizer):
    """Micro-batches, clipping, averaged weights, validation: the same losses, and the same model
    saved.
    """
    cfg = dataclasses.replace(CONFIG, optimizer=optimizer, grad_clip=0.5)
    alone, ended = run(tmp_path / "alone", cfg)(World())
    found = on_ranks(run(tmp_path / "together", cfg), size, strategy)
    assert [f[1] for f in found] == [ended] * size == [(12, "finished", 12 * 48)] * size, found
    for name in ("loss", "nats", "grad_norm", "val_loss"):
        assert losses(found[0][0], name) == pytest.approx(
            losses(alone, name), rel=1e-6 if name != "grad_norm" else 1e-4), name
    assert max(losses(alone, "grad_norm")) > 0.5, "nothing was clipped"
    one, other = saved(tmp_path / "alone"), saved(tmp_path / "together")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)
    assert (not list((tmp_path / "together").glob(".*"))
            and (tmp_path / "together" / "checkpoints" / "step-000006").is_dir())


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path):
    """One process, two with divided weights, four with whole ones, one again: one file format, the
    losses of a run by itself.
    """
    straight, _ = run(tmp_path / "a")(World())
    for steps, size, strategy in ((3, 1, ""), (6, 2, "fsdp"), (9, 4, "ddp")):
        calls = iter(range(1, 100))
        part = run(tmp_path / "b", resume=True, should_stop=lambda: next(calls) == 3)
        found = on_ranks(part, size, strategy) if size > 1 else [part(World())]
        assert [f[1][:2] for f in found] == [(steps, "stopped")] * size, found
    history, ended = run(tmp_path / "b", resume=True)(World())
    assert ended == (12, "finished", 12 * 48)
    assert losses(history) == pytest.approx(losses(straight), rel=1e-6)


@pytest.mark.parametrize("strategy, size", [("ddp", 2), ("fsdp", 2), ("ddp", 4)])
def test_resume_with_as_many_ranks_is_exact(tmp_path, strategy, size):
    """With dropout, which each rank draws for itself; stopped by a signal to the second rank at any
    step.
    """
    stop_at = any_number("signal after step", 1, 11)
    calls = iter(range(1, 100))

    def signalled(world: World):
        stop = (lambda: world.rank == 1 and next(calls) == stop_at
                        and os.kill(os.getpid(), signal.SIGUSR1) and False)
        return run(tmp_path / "b", dropout=0.2, should_stop=stop)(world)[1]

    straight = on_ranks(run(tmp_path / "a", dropout=0.2), size, strategy)
    stopped = on_ranks(signalled, size, strategy)
    assert [s[:2] for s in stopped] == [(stop_at, "preempted")] * size, stopped
    resumed = on_ranks(run(tmp_path / "b", dropout=0.2, resume=True), size, strategy)
    one, other = (load_checkpoint(tmp_path / name / "checkpoint")[0] for name in "ab")
    assert all(torch.equal(one["module"][name], other["module"][name]) for name in one["module"])
    assert losses(straight[0][0]) == losses(resumed[0][0])
    alone, _ = run(tmp_path / "c", dropout=0.2)(World())
    assert losses(alone)[1:] != pytest.approx(losses(straight[0][0])[1:], rel=1e-4), (
        "dropout is expected to depend on the ranks")


def test_ranks_draw_different_dropout(tmp_path):
    def first_mask(world: World):
        seen = []

        def loss_fn(model, batch):
            seen.append(model.drop(torch.ones(16)).tolist())
            return lm_loss(model, batch)

        cfg = dataclasses.replace(CONFIG, max_steps=1, keep_checkpoints=0)
        trainer(toy(dropout=0.5), tmp_path, cfg, loss_fn=loss_fn, world=world).fit()
        return seen[0]

    one, other = on_ranks(first_mask)
    assert one != other and {*one, *other} == {0.0, 2.0}


def failing(folder, number: int):
    """Train until the data of rank `number` raise."""
    def train(world: World):
        def data(step):
            if step == 3 and world.rank == number:
                raise ValueError("row 7 is empty")
            return batches(step)

        try:
            trainer(toy(), folder, CONFIG, data=data, world=world).fit()
        except (ValueError, RankFailed) as error:
            # the launcher's word must not make of this failure a preemption
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            return type(error).__name__, str(error), getattr(error, "reported", None)

    return train


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_failing_rank_ends_the_first_which_shows_its_traceback(tmp_path, strategy):
    (kind, message, _), = on_ranks(failing(tmp_path, 1), 2, strategy, survivors=1)
    assert (kind == "RankFailed" and "rank 1 of 2 failed" in message and "in data" in message
            and "row 7 is empty" in message)


def test_a_failing_first_rank_ends_the_others(tmp_path):
    first, second = on_ranks(failing(tmp_path, 0))
    assert first == ("ValueError", "row 7 is empty", True)
    assert second[0] == "RankFailed" and "rank 0 of 2 failed" in second[1]


def test_a_killed_rank_ends_the_others(tmp_path):
    def train(world: World):
        def data(step):
            if step == 3 and world.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return batches(step)

        trainer(toy(), tmp_path, CONFIG, data=data, world=world).fit()

    assert ("RankFailed: another rank is gone and left no message: it was killed"
            in str(on_ranks(train, survivors=1)[0]))


def test_no_gather_waits_for_files(tmp_path, monkeypatch):
    """NCCL would give up on rank 0 after ten minutes of writing: the others wait for it, as hosts
    do, before the next gather. Only a model's own files need one: not a checkpoint along the way,
    not validation.
    """
    events = []

    def note(name: str):
        events.append((name, time.monotonic()))

    def slow_files(model, folder):
        save_weights(model, folder)
        time.sleep(0.3)
        note("written")

    def gathering(*modules):
        note("gather")
        return gather_module(*modules)

    gather_module = training_state.gather_module
    monkeypatch.setattr(training_state, "gather_module", gathering)
    cfg = dataclasses.replace(CONFIG, max_steps=2, checkpoint_every=1, eval_every=1)

    def train(world: World):
        trainer(toy(), tmp_path, cfg, world=world, save_model=slow_files,
                evaluate=lambda m: {"loss": m.norm.weight.sum()}).fit()
        return events

    first, second = on_ranks(train, 2, "fsdp")
    kept, last = (at for name, at in first if name == "written")
    gathers = [at for name, at in second]
    # of the model kept half way, and of the last checkpoint
    assert len(gathers) == 2 and gathers[1] > kept and last > gathers[1]


def sharded_run(folder, **options):
    """A function of a world: train with FSDP, a checkpoint every second step; how it ended."""
    cfg = dataclasses.replace(CONFIG, max_steps=6, checkpoint_every=2, keep_checkpoints=0)

    def train(world: World):
        try:
            return run(folder, cfg, **options)(world)[0]
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    return train


def test_a_kill_while_ranks_write_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    """That of step 4 is never finished; the run goes on from step 2, to the same weights."""
    settle = RunFolder.settle
    straight = on_ranks(sharded_run(tmp_path / "straight"), 2, "fsdp")[0]
    monkeypatch.setattr(RunFolder, "settle", lambda self, wait=True: (
        settle(self, wait) if self.writing and self.writing[2] == 2 else None))

    calls = iter(range(1, 100))
    found = on_ranks(sharded_run(tmp_path / "cut",
                                 should_stop=lambda: next(calls) == 5 and 1 / 0), 2, "fsdp")
    assert all("ZeroDivisionError" in each for each in found), found
    assert load_checkpoint(tmp_path / "cut" / "checkpoint")[1]["step"] == 2
    monkeypatch.undo()
    resumed = on_ranks(sharded_run(tmp_path / "cut", resume=True), 2, "fsdp")[0]
    assert losses(resumed) == losses(straight)
    one, other = (load_checkpoint(tmp_path / name / "checkpoint")[0]
                  for name in ("straight", "cut"))
    assert all(torch.equal(one["module"][name], other["module"][name]) for name in one["module"])
    assert not list((tmp_path / "cut").glob(".*"))


def test_a_rank_that_cannot_write_its_shards_says_so_on_all(tmp_path, monkeypatch):
    def write_data(self, plan, planner):
        if plan.storage_data["shard_index"] == 2:
            raise OSError(28, "No space left on device")
        return real(self, plan, planner)

    real = dcp.HuggingFaceStorageWriter.write_data
    on_ranks(sharded_run(tmp_path), 2, "fsdp")
    before = load_checkpoint(tmp_path / "checkpoint")[1]
    monkeypatch.setattr(dcp.HuggingFaceStorageWriter, "write_data", write_data)
    cfg = dataclasses.replace(CONFIG, max_steps=7, keep_checkpoints=0)

    def further(world: World):
        try:
            return run(tmp_path, cfg, resume=True)(world)
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    found = on_ranks(further, 2, "fsdp")
    assert all("a rank cannot write its shards" in each and "No space left" in each
               for each in found), found
    assert load_checkpoint(tmp_path / "checkpoint")[1] == before


def test_one_file_can_be_asked_for(tmp_path):
    """The state gathered on rank 0, the model's files in every checkpoint."""
    def train(world: World):
        world.sharded_checkpoints = False
        calls = iter(range(1, 100))
        return run(tmp_path, should_stop=lambda: next(calls) == 3)(world)[1]

    assert on_ranks(train, 2, "fsdp")[0][:2] == (3, "stopped")
    assert ({path.name for path in (tmp_path / "checkpoint").iterdir()}
            == {"meta.json", "training_state.pt", "weights.pt"})


def test_gradients_are_exchanged_after_the_last_micro_batch_only(tmp_path):
    def count(world: World):
        exchanged = []
        run_ = trainer(toy(), tmp_path / "run",
                       dataclasses.replace(CONFIG, max_steps=3), world=world)
        assert isinstance(run_.loss_fn, DataParallelLoss)

        def hook(state, bucket):
            exchanged.append(0)
            dist.all_reduce(bucket.buffer())
            future = torch.futures.Future()
            future.set_result(bucket.buffer() / world.size)
            return future

        run_.loss_fn.wrapped.register_comm_hook(None, hook)
        run_.fit()
        return len(exchanged)

    assert on_ranks(count) == [3, 3]  # one bucket, two micro-batches, three steps


def test_a_used_folder_and_a_wrong_batch_are_refused_on_all_ranks(tmp_path):
    run(tmp_path, dataclasses.replace(CONFIG, max_steps=1))(World())
    found = on_ranks(run(tmp_path))
    assert ("FileExistsError" in str(found[0]) and "FileExistsError" in str(found[1])
            and "RankFailed" in str(found[1]))
    assert ("batch_size=8 cannot be shared equally by 3 ranks"
            in str(on_ranks(run(tmp_path / "other"), 3)[0]))


def test_who_was_launched():
    assert rank_info({"RANK": "1", "WORLD_SIZE": "2", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0",
                      "SLURM_NTASKS": "1"}) == (1, 2, 0)
    assert (rank_info({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"})
            == (0, 1, 0)), ("a batch script")
    assert (address({"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1", "SLURM_JOB_ID": "20003"})
            == ("10.0.0.1", 20_003))
    assert (address({"MASTER_ADDR": "n1", "MASTER_PORT": "29500", "SLURM_JOB_ID": "3"})
            == ("n1", 29_500))


@pytest.mark.parametrize("hardware, message",
                         [({"ranks": 0}, "hardware.ranks=0 must be at least 1"),
                          ({"strategy": "fdsp"}, "did you mean 'fsdp'"),
                          ({"ranks": 3}, r"hardware.ranks=3 does not divide "
                                         r"pretrain.batch_size=32; use one of \[1, 2, 4")])
def test_settings_that_cannot_be(hardware, message):
    with pytest.raises(ConfigError, match=message):
        PipelineConfig(hardware=HardwareConfig(**hardware))
