"""What machines are like: the peak of a GPU, the partitions of a cluster. A cluster is one file,
`clusters/NAME.toml`, of this package or of the user's own folder. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from modern_llm.config.checks import ConfigError, nearest, require
from modern_llm.config.overrides import override
from modern_llm.files import CHECKOUT, IN_CHECKOUT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHIPPED = Path(__file__).parent / "clusters"
# dense 16-bit FLOP/s of a whole GPU, from its makers' data sheet, by the name in its device name
PEAK_FLOPS = {"GH200": 989e12, "H200 NVL": 836e12, "H200": 989e12, "H100 PCIe": 756e12,
              "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class Partition:
    """A partition's nodes, as `[partitions.NAME]` of a cluster's file says."""

    gpu: str = ""  # a name with a known peak; "" = none, or one that nobody knows
    gpus: int | None = None  # of a node
    hours: float | None = None  # of the longest job
    up_to_gb: float | None = None  # presets that need so much GPU memory or less are sent here

    def __post_init__(self):
        for name in ("gpus", "hours", "up_to_gb"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}={value!r} must be over 0")


@dataclass(frozen=True)
class Cluster:
    """What is true of a cluster and of no other, as its file says."""

    description: str = ""
    modules: str = ""  # what `module load` is given by slurm/environment.sh, between spaces
    options: tuple[str, ...] = ()  # of sbatch, for every job; {gpus} is how many GPUs of a node
    peaks: dict[str, float] = field(default_factory=dict)  # of GPUs that PEAK_FLOPS lacks
    partitions: dict[str, Partition] = field(default_factory=dict)

    def partition_for(self, memory: float) -> str | None:
        """The partition for a preset that needs a GPU with so many GB: the smallest that will do,
        else the largest; None if the file sends presets nowhere.
        """
        sized = sorted((p.up_to_gb, name) for name, p in self.partitions.items() if p.up_to_gb)
        return next((name for up_to, name in sized if memory <= up_to),
                    sized[-1][1] if sized else None)


def cluster_files() -> dict[str, Path]:
    """The file of every cluster by its name: the user's own (in `$MODERN_LLM_CLUSTERS`, else in
    `clusters/` of the checkout), which win, and those of this package.
    """
    checkout = CHECKOUT if IN_CHECKOUT else Path.cwd()
    own = Path(os.environ.get("MODERN_LLM_CLUSTERS") or checkout / "clusters")
    found = {path.stem: path for folder in (SHIPPED, own) for path in folder.glob("*.toml")}
    return dict(sorted(found.items()))


def get_cluster(name: str) -> Cluster:
    """The cluster of that name. ConfigError for an unknown one, and for what is wrong in its file.
    """
    files = cluster_files()
    require(name in files, f"unknown cluster {name!r}{nearest(name, files)}. A cluster is a file "
                           "NAME.toml in clusters/, or in the folder $MODERN_LLM_CLUSTERS")
    place = str(files[name])
    try:
        values = tomllib.loads(files[name].read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{place} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not valid TOML: {error}") from error
    peaks, partitions = (_table(values, key, place) for key in ("peaks", "partitions"))
    for gpu, peak in peaks.items():
        require(type(peak) in (int, float) and 0 < peak < float("inf"),
                f"{place}: peaks.{gpu}={peak!r} must be a number of FLOP/s, such as 312e12")
        require(peak == PEAK_FLOPS.get(gpu, peak),
                f"{place}: peaks.{gpu}={peak:g}, but {gpu} has {PEAK_FLOPS.get(gpu, 0):g} "
                "everywhere: leave it out")
    known = {**PEAK_FLOPS, **peaks}
    made = {}
    for key, table in partitions.items():
        where = f"{place}: partitions.{key}"
        require(isinstance(table, dict), f"{where}={table!r} must be a table [partitions.{key}]")
        try:
            made[key] = override(Partition(), table, where)
        except ConfigError as error:
            raise error if where in str(error) else ConfigError(f"{where}.{error}") from error
        gpu = made[key].gpu
        require(not gpu or gpu in known, f"{where}.gpu={gpu!r} has no known peak"
                f"{nearest(gpu, known)}. Give its dense 16-bit FLOP/s under [peaks]")
    return replace(override(Cluster(), values, place), peaks=peaks, partitions=made)


def _table(values: dict, key: str, place: str) -> dict:
    """Take a table out of the values of a file; an empty one if it is not there."""
    table = values.pop(key, {})
    require(isinstance(table, dict), f"{place}: {key}={table!r} must be a table [{key}]")
    return table


def find_cluster(name: str | None = None, partition: str | None = None) -> Cluster:
    """The cluster that is meant: the one named, here or in `$MODERN_LLM_CLUSTER`, or `$TACC_SYSTEM`
    if it has a file; else one that has the partition; else Lonestar6.
    """
    files, system = cluster_files(), os.environ.get("TACC_SYSTEM")
    if name := name or os.environ.get("MODERN_LLM_CLUSTER") or (system if system in files else ""):
        return get_cluster(name)
    known = [get_cluster(each) for each in dict.fromkeys(["ls6", *files])]
    return next((each for each in known if partition in each.partitions), known[0])


def gpu_peaks() -> dict[str, float]:
    """Dense 16-bit FLOP/s of every GPU that this package or a cluster's file knows, longer names
    first, so that an H100 NVL is not taken for an H100.
    """
    peaks = dict(PEAK_FLOPS)
    for name in cluster_files():
        with contextlib.suppress(ConfigError):  # `submit` says what is wrong with a file
            peaks.update(get_cluster(name).peaks)
    return dict(sorted(peaks.items(), key=lambda item: -len(item[0])))
