"""A cluster is one file: what it says reaches the lines for sbatch, the modules and the estimate,
and what is wrong in it is named.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from modern_llm.cli import main
from modern_llm.config import ConfigError, get_pipeline_preset
from modern_llm.config.machines import (
    PEAK_FLOPS, SHIPPED, cluster_files, find_cluster, get_cluster, gpu_peaks,
)

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = """# what is true of this cluster only
description = "an example"
modules = "cuda python/3.12"  # both
options = ["--gpus-per-node={gpus}", "--qos=normal"]

[peaks]
B200 = 2250e12

[partitions.short]
gpu = "A100"
gpus = 4
hours = 1.5
up_to_gb = 40

[partitions.long]
gpu = "B200"
gpus = 8
hours = 3
up_to_gb = 180
"""


@pytest.fixture
def clusters(tmp_path, monkeypatch):
    """A folder of the user's with one cluster, on a machine that is none, without SLURM."""
    folder = tmp_path / "my clusters"
    folder.mkdir()
    (folder / "example.toml").write_text(EXAMPLE)
    for name in ("MODERN_LLM_CLUSTER", "TACC_SYSTEM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MODERN_LLM_CLUSTERS", str(folder))
    monkeypatch.setenv("MODERN_LLM_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    return folder


def lines(*words: str, code: int = 0) -> str:
    """What `modern-llm submit --dry-run` prints."""
    done = CliRunner().invoke(main, ["submit", "--dry-run", *words])
    assert done.exit_code == code, done.output
    return done.output


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_cluster_says_everything(path):
    cluster = get_cluster(path.stem)
    assert cluster.description and cluster.modules and cluster.partitions
    assert not cluster.peaks and all(p.gpu in PEAK_FLOPS and p.gpus and p.hours
                                     for p in cluster.partitions.values())


@pytest.mark.parametrize("cluster, preset, partition", [
    ("ls6", "tacc-smoke", "gpu-a100-dev"), ("ls6", "tacc-a100", "gpu-a100"),
    ("ls6", "tacc-h100", "gpu-h100"), ("vista", "tacc-smoke", "gh-dev"),
    ("vista", "tacc-a100", "gh"), ("vista", "tacc-h100", "gh"),
    ("example", "tacc-a100", "short"), ("example", "tacc-h100", "long")])
def test_a_preset_goes_to_the_smallest_partition_that_will_do(clusters, cluster, preset, partition):
    memory = get_pipeline_preset(preset).hardware.min_gpu_memory_gb
    assert get_cluster(cluster).partition_for(memory) == partition
    text = lines("--preset", preset, "--stage", "pretrain", "--cluster", cluster)
    assert f" --partition={partition} " in text and f"MODERN_LLM_CLUSTER={cluster}\n" in text


def test_a_new_cluster_is_one_file(clusters):
    """Its limits, options and peaks are in the lines and the estimate; every job is told of it."""
    text = lines("--preset", "tacc-h100", "--cluster", "example", "--gpus", "8")
    shown = re.findall(r"sbatch .*", text)
    assert len(shown) == 5 and all("--qos=normal" in line for line in shown)
    assert ["--gpus-per-node=8 " in line for line in shown] == [True] * 4 + [False]
    assert "--gpus-per-node=1 " in shown[4] and "30% of 2250 TFLOP/s (8 × B200)" in text
    assert "--time=03:00:00" in lines("--preset", "tacc-h100", "--cluster", "example")
    assert f"export MODERN_LLM_CLUSTERS={clusters}" not in text  # sbatch hands on what is absolute


def test_which_cluster_is_meant(clusters, monkeypatch):
    assert list(cluster_files()) == ["example", "ls6", "vista"]
    assert find_cluster() == get_cluster("ls6") == find_cluster(partition="nowhere")
    assert find_cluster(partition="gh") == get_cluster("vista")
    monkeypatch.setenv("TACC_SYSTEM", "a system without a file")
    assert find_cluster() == get_cluster("ls6")
    monkeypatch.setenv("TACC_SYSTEM", "vista")
    assert find_cluster(partition="gpu-a100") == get_cluster("vista")
    monkeypatch.setenv("MODERN_LLM_CLUSTER", "example")
    assert find_cluster() == get_cluster("example") and find_cluster("ls6") == get_cluster("ls6")
    (clusters / "ls6.toml").write_text('description = "mine"')
    assert get_cluster("ls6").description == "mine"


def test_peaks_are_in_one_place_and_a_file_may_add_to_them(clusters):
    from modern_llm.training.recording import peak_flops

    assert gpu_peaks() == PEAK_FLOPS | {"B200": 2250e12}
    assert peak_flops("NVIDIA B200") == 2250e12 and peak_flops("NVIDIA B2000") is None
    (clusters / "other.toml").write_text('[peaks]\n"B200 (early)" = 1e15')
    assert peak_flops("NVIDIA B200") == 2250e12
    (clusters / "broken.toml").write_text("[peaks")  # of a cluster that nobody asked for
    assert peak_flops("NVIDIA B200") == 2250e12 and peak_flops("") is None


def test_help_names_the_clusters():
    text = subprocess.run([sys.executable, "-c",
                           "from modern_llm.cli import main; main()", "submit", "--help"],
                          capture_output=True, text=True, check=True).stdout
    assert re.search(r"clusters/:\s+ls6,\s+vista\.", text)


@pytest.mark.fault("messages")
def test_an_unknown_cluster_names_the_nearest(clusters, monkeypatch):
    text = lines("--cluster", "exampel", code=2)
    assert "unknown cluster 'exampel'; did you mean 'example'?" in text and "NAME.toml" in text
    monkeypatch.setenv("MODERN_LLM_CLUSTER", "nowhere")
    assert "unknown cluster 'nowhere'; valid: example, ls6, vista" in lines(code=2)


@pytest.mark.fault("messages")
def test_more_gpus_than_a_node_has(clusters):
    text = lines("--preset", "tacc-a100", "--cluster", "example", "--gpus", "8", code=2)
    assert "--gpus=8: a node of short has 4; for more, say --nodes" in text


@pytest.mark.fault("messages")
@pytest.mark.parametrize("text, message", [
    ("modules =", "is not valid TOML"), ("a = 1\na = 2", "is not valid TOML"),
    (b"description = '\xff'", "is not valid TOML"),
    ("modul = 'x'", "modul is not a setting of Cluster; did you mean 'modules'"),
    ("modules = ['x']", r"modules=\['x'\] is list, should be str"),
    ("options = '-x'", "options='-x' is str, should be a list"),
    ("partitions = 3", r"partitions=3 must be a table \[partitions\]"),
    ("[partitions]\nx = 3", r"partitions.x=3 must be a table \[partitions.x\]"),
    ("[partitions.x]\ngpu = 'A10'",
     "partitions.x.gpu='A10' has no known peak; did you mean 'A100'"),
    ("[partitions.x]\ngpus = '3'", "partitions.x.gpus='3' is str, should be int"),
    ("[partitions.x]\ngpus = 0", "partitions.x.gpus=0 must be over 0"),
    ("[partitions.x]\nhours = -1", "partitions.x.hours=-1.0 must be over 0"),
    ("[partitions.x]\nhour = 1", "partitions.x.hour is not a setting of Partition; did you mean"),
    ("[peaks]\nX = 'fast'", "peaks.X='fast' must be a number of FLOP/s"),
    ("[peaks]\nX = true", "peaks.X=True must be a number of FLOP/s"),
    ("[peaks]\nX = inf", "peaks.X=inf must be a number of FLOP/s"),
    ("[peaks]\nX = 0", "peaks.X=0 must be a number of FLOP/s"),
    ("[peaks]\nA100 = 1e15", r"peaks.A100=1e\+15, but A100 has 3.12e\+14 everywhere: leave it out"),
])
def test_what_is_wrong_in_a_file_is_named(clusters, text, message):
    path = clusters / "bad.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=re.escape(str(path)) + ".*" + message):
        get_cluster("bad")


@pytest.mark.parametrize("environment, loaded", [
    ({"TACC_SYSTEM": "vista"}, "load gcc cuda python3"), ({}, ""),
    ({"TACC_SYSTEM": "frontera"}, ""), ({"MODERN_LLM_CLUSTER": "example"}, "load cuda python/3.12"),
    ({"TACC_SYSTEM": "ls6", "MODERN_LLM_CLUSTER": "example"}, "load cuda python/3.12")])
def test_modules_are_loaded_as_the_file_says(clusters, environment, loaded):
    said = subprocess.run(["/bin/bash", "-euc", 'module() { echo "$*"; }; set +u; '
                           "source slurm/environment.sh; set -u"],
                          cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, **environment, "PATH": os.defpath})
    assert (said.stdout.strip(), said.stderr, said.returncode) == (loaded, "", 0)


@pytest.mark.parametrize("line", ['modules = "gcc/12 cuda"', "modules = 'gcc/12 cuda'  # both",
                                  '  modules\t=\t"gcc/12 cuda"\r'])
def test_modules_are_read_alike_by_both_that_read_them(clusters, line):
    (clusters / "own.toml").write_bytes(f"description = 'ours'\n{line}\n".encode())
    assert get_cluster("own").modules == "gcc/12 cuda"
    said = subprocess.run(["/bin/bash", "-euc", 'module() { echo "$*"; }; '
                           "source slurm/environment.sh"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "MODERN_LLM_CLUSTER": "own", "PATH": os.defpath})
    assert (said.stdout, said.stderr) == ("load gcc/12 cuda\n", "")


@pytest.mark.parametrize("preset, name", [
    ("tacc-a100", "tacc-a100"), ("tacc", "tacc-h100"), ("configs/tacc_a100.json", "tacc-a100"),
    ("slurm/smoke.json", "smoke")])
def test_a_job_file_names_a_run_as_its_preset_does(preset, name):
    function = re.search(r"^preset_name\(\).*$", (ROOT / "slurm/job.sh").read_text(), re.M)[0]
    said = subprocess.run(
        ["/bin/bash", "-euo", "pipefail", "-c", f"{function}; preset_name {preset}"], cwd=ROOT,
        capture_output=True, text=True,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.defpath}"})
    assert (said.stdout, said.returncode) == (name + "\n", 0)
