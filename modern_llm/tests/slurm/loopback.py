"""A real SLURM on this machine: one controller and a few nodes on the loopback, in a folder of
their own.

    python modern_llm/tests/slurm/loopback.py start /tmp/cluster prints the line to export; then
    sbatch, squeue, … work python modern_llm/tests/slurm/loopback.py stop /tmp/cluster

Needs slurmctld and slurmd (Debian and Ubuntu: apt-get install slurm-wlm), no root, no configuration
of theirs.
"""

from __future__ import annotations

import getpass
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

SBIN = os.pathsep.join(["/usr/sbin", "/sbin", "/usr/local/sbin"])  # not on everybody's PATH


def program(name: str) -> str | None:
    """Where a SLURM program is, or None."""
    return shutil.which(name, path=os.environ.get("PATH", "") + os.pathsep + SBIN)


def missing() -> list[str]:
    """The programs that a cluster and its users need and that are not here."""
    return [name for name in ("slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "sinfo",
                              "scancel", "srun") if not program(name)]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def write_conf(folder: Path, nodes: int, cores: int) -> Path:
    """Make the cluster's folder and its slurm.conf."""
    (folder / "state").mkdir(parents=True, exist_ok=True)
    controller, *ports = free_ports(nodes + 1)
    lines = []
    for number, port in enumerate(ports, 1):
        (folder / f"spool-n{number}").mkdir(exist_ok=True)
        lines.append(f"NodeName=n{number} NodeHostname={platform.node()} NodeAddr=127.0.0.1 "
                     f"Port={port} CPUs={cores} RealMemory=16000 State=UNKNOWN")
    text = Path(__file__).with_name("slurm.conf.in").read_text(encoding="utf-8")
    for name, value in {"FOLDER": folder, "USER": getpass.getuser(), "CONTROLLER_PORT": controller,
                        "NODES": "\n".join(lines)}.items():
        text = text.replace(f"@{name}@", str(value))
    (folder / "slurm.conf").write_text(text, encoding="utf-8")
    return folder / "slurm.conf"


def start(folder: Path, nodes: int = 2, cores: int = 4) -> Path:
    """Bring a cluster up in a new folder and wait until its nodes are idle; returns the path for
    SLURM_CONF.
    """
    conf = write_conf(folder.resolve(), nodes, cores)
    env = os.environ | {"SLURM_CONF": str(conf)}
    daemons = [[program("slurmctld"), "-f", conf],
               *([program("slurmd"), "-f", conf, "-N", f"n{number}"]
                 for number in range(1, nodes + 1))]
    failed = any(subprocess.run(words, env=env).returncode for words in daemons)
    deadline = time.time() + 30
    while not failed and time.time() < deadline:
        seen = subprocess.run([program("sinfo"), "-h", "-N", "-p", "main", "-o", "%T"], env=env,
                              capture_output=True, text=True)
        if seen.stdout.split() == ["idle"] * nodes:
            return conf
        time.sleep(0.2)
    logs = "\n".join(path.read_text(errors="replace")[-2000:]
                     for path in sorted(folder.glob("*.log")))
    stop(folder)
    raise RuntimeError(f"the cluster in {folder} did not come up:\n{logs}")


def stop(folder: Path) -> None:
    """Cancel what is left, then end the daemons by the process numbers they wrote down."""
    env = os.environ | {"SLURM_CONF": str(folder.resolve() / "slurm.conf")}
    pids = list(folder.glob("*.pid"))
    if any(path.stem == "slurmctld" for path in pids):
        subprocess.run([program("scancel"), "--user", getpass.getuser()], env=env,
                       capture_output=True)
        for _ in range(100):
            if not subprocess.run([program("squeue"), "-h"], env=env,
                                  capture_output=True).stdout.strip():
                break
            time.sleep(0.2)
    for path in pids:
        try:
            os.kill(int(path.read_text()), signal.SIGTERM)
        except (ProcessLookupError, FileNotFoundError):
            continue
    for _ in range(100):  # each daemon removes its file as it ends
        if not list(folder.glob("*.pid")):
            return
        time.sleep(0.1)
    raise RuntimeError(f"still running: {[path.name for path in folder.glob('*.pid')]} in {folder}")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("start", "stop"):
        sys.exit(__doc__)
    if absent := missing():
        sys.exit(f"not here: {', '.join(absent)}; apt-get install slurm-wlm")
    if sys.argv[1] == "start":
        print(f"export SLURM_CONF={start(Path(sys.argv[2]))}")
    else:
        stop(Path(sys.argv[2]))
