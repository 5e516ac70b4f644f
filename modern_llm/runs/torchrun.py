"""How the processes of one run are started, and what the others do while rank 0 runs the stages.

Every rank is the same command, `modern-llm run …`, started by torchrun, by srun, or by srun
torchrun. Rank 0 plans and executes the stages as it does alone. The others wait; when a stage of
rank 0 is about to train, they call `train_stage` as its notebook does, and wait again. Imports no
torch at the top.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import sys

from modern_llm.config import ConfigError
from modern_llm.runs.launch import SAME_PACKAGE
from modern_llm.training.ranks import (
    TrainingEnded, address, broadcast_task, local_gpu, next_training, open_store, rank_info,
    wait_for_task,
)

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextlib.contextmanager
def launch_ranks(wanted: int):
    """Around the stages of `modern-llm run`: inside there is rank 0 only, with the others
    (`hardware.ranks=wanted` in all) behind it.

    Started alone, the process becomes torchrun for `wanted` copies of itself; started once on each
    node of a SLURM job, it becomes torchrun for its node's share of them. Leaves the program on
    every other rank.
    """
    # before torch is imported: DDP's advice, and every rank's sockets telling at length that
    # another one died
    if wanted > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    rank, size, _ = rank_info()
    if size == 1 and wanted > 1:
        sys.exit(torchrun(wanted))
    if (wanted > size and wanted % size == 0 and "RANK" not in os.environ
            and os.environ.get("SLURM_NNODES") == str(size)):
        sys.exit(torchrun(wanted // size, nodes=size, node=rank))
    if size > 1 and wanted != size and (rank or "RANK" in os.environ):
        raise ConfigError(f"hardware.ranks={wanted}, but {size} processes were started: say -p "
                          f"hardware.ranks={size}, or start {wanted}")
    if wanted == 1:
        yield
        return
    if rank:
        worker_loop()
        sys.exit()
    open_store()
    try:
        yield
    finally:
        broadcast_task(next_training(), None)


def torchrun(ranks: int, nodes: int = 1, node: int = 0) -> int:
    """This very command as so many ranks on this machine, one of several `nodes` that meet at
    `address()`; returns its exit code.

    Signals are passed on to rank 0, which stops; the ranks agree on that between two steps.
    """
    import psutil
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

    def pass_on(number: int, frame) -> None:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if child.environ().get("RANK") == "0":
                    child.send_signal(number)

    for number in STOPS:
        signal.signal(number, pass_on)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    meet = ["--standalone"]
    if nodes > 1:
        host, port = address()
        # seconds: nodes do not come up at the same moment
        meet = ["--nnodes", str(nodes), "--rdzv-backend", "c10d", "--rdzv-id",
                os.environ["SLURM_JOB_ID"], "--rdzv-endpoint", f"{host}:{port}", "--rdzv-conf",
                f"is_host={int(node == 0)},read_timeout=600"]
    words = [*meet, "--nproc-per-node", str(ranks), "--signals-to-handle", "SIGHUP", "--no-python",
             sys.executable, "-c",
             SAME_PACKAGE + "import json, os; from modern_llm.cli import main; "
                            "main(json.loads(os.environ['MODERN_LLM_WORDS']), 'modern-llm')"]
    # torchrun's parser would take --run for its own --run-path
    os.environ["MODERN_LLM_WORDS"] = json.dumps(sys.argv[1:])
    try:
        run.run(run.parse_args(words))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if rank:
            print(f"rank {rank} ended first, with exit code {failure.exitcode}; so all were ended",
                  file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except RendezvousConnectionError:
        # the first node has ended, and its exit code says why; srun takes the highest of all
        return 1
    finally:
        # srun ends the tasks of a step together: a word too late must not change the exit code
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)
    return 0


def worker_loop() -> None:
    """What every rank but the first does, until rank 0 has finished all stages."""
    rank = rank_info()[0]
    # only while it trains does a rank handle them; rank 0 ends it
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.environ["MPLBACKEND"] = "Agg"
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(local_gpu(torch.cuda.device_count()))
    from modern_llm.training.distributed import RankFailed

    for number in itertools.count():
        if (task := wait_for_task(number)) is None:
            return
        try:
            train_muted(task)
        except TrainingEnded:
            continue
        except RankFailed as error:
            sys.exit(f"rank {rank}: {str(error).splitlines()[0]}")
        except Exception as error:
            if getattr(error, "reported", False):  # rank 0 shows the traceback
                sys.exit(f"rank {rank}: {type(error).__name__}: {error}")
            raise


def train_muted(task: dict) -> None:
    """Train the stage that rank 0 has begun, without a word."""
    from modern_llm.runs.stage import begin_on_worker, train_stage

    with (open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere),
          contextlib.redirect_stderr(nowhere)):
        train_stage(begin_on_worker(task))
