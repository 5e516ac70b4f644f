"""Several processes, one run: who this one is, where all meet, and the store in which rank 0 leaves
word for the others.

Imports no torch at the top.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from datetime import timedelta

# of ranks with each other: rank 0 may draw samples for hours; the launcher ends what has died
PATIENCE = timedelta(days=1)
# of a GPU with the others in the middle of a step: one of them is lost
NCCL_PATIENCE = timedelta(minutes=10)


class TrainingEnded(Exception):
    """Raised behind the training of a stage on every rank but the first: what follows is rank 0's
    alone.
    """


def rank_info(environment: Mapping[str, str] = os.environ) -> tuple[int, int, int]:
    """(rank, number of ranks, rank on this machine) as torchrun or srun told this process; (0,
    1, 0) if neither did.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE",
                 "LOCAL_RANK" if environment.get("LOCAL_RANK") else "SLURM_LOCALID")
    elif "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        # a batch script itself is no step of srun
        names = "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"
    else:
        return 0, 1, 0
    rank, size, local_rank = (int(environment.get(name) or 0) for name in names)
    return rank, size, local_rank


def local_gpu(count: int, environment: Mapping[str, str] = os.environ) -> int:
    """The number of this rank's own GPU among the `count` that are visible to it.

    Where all ranks of a machine see all its GPUs, that is the rank's number on this machine; where
    each sees its own only, as with srun --gpus-per-task, it is one of those.
    """
    return rank_info(environment)[2] % count


def address(environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Where the ranks meet: MASTER_ADDR and MASTER_PORT (torchrun sets them), else the host srun
    was called on and a port of the job's own.
    """
    host = (environment.get("MASTER_ADDR")
            or environment.get("SLURM_LAUNCH_NODE_IPADDR") or "127.0.0.1")
    return host, int(environment.get("MASTER_PORT")
                     or 20_000 + int(environment.get("SLURM_JOB_ID", 0)) % 20_000)


@functools.cache
def open_store():
    """The key-value store that all ranks see: torchrun's, else one that the first process of rank 0
    keeps.
    """
    from torch.distributed import PrefixStore, TCPStore

    rank, _, _ = rank_info()
    kept_by_another = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host, port = address()
    store = TCPStore(host, port, is_master=rank == 0 and not kept_by_another,
                     wait_for_workers=False, timeout=PATIENCE)
    if rank == 0:
        # for the kernels that this process starts
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    return PrefixStore("modern_llm", store)


def next_training() -> int:
    """The number of the training that rank 0 is about to broadcast."""
    return open_store().add("trainings", 1) - 1


def broadcast_task(number: int, task: dict | None) -> None:
    """Broadcast to the other ranks, through the store, what to run next; None ends them."""
    open_store().set(f"task/{number}", json.dumps(task))


def wait_for_task(number: int) -> dict | None:
    """Wait for what rank 0 broadcast under this number, and return it."""
    store = open_store()
    store.wait([f"task/{number}"], PATIENCE)
    return json.loads(store.get(f"task/{number}"))
