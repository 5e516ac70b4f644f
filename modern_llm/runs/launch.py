"""Executing a stage's notebook: papermill in a process of its own and, under it, a kernel of this
very interpreter. No torch.

Nothing that lies about on a user's machine comes between: another kernel named python3, files in
the working folder that are named like modules, startup files, a backend that wants a window, a home
that is full. The stage runs this interpreter and this package.
"""

from __future__ import annotations

import atexit
import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from modern_llm.files import CHECKOUT
from modern_llm.runs.scheduler import PREEMPTION_SIGNALS

# Of the user's, and not for a stage: what runs before it, what leaves its assertions out, what
# stops it to ask, what its figures look like.
DROPPED_VARIABLES = ("PYTHONSTARTUP", "PYTHONOPTIMIZE", "PYTHONINSPECT", "PYTHONWARNINGS",
                     "MATPLOTLIBRC")
STAGE_VARIABLES = {"PYTHONSAFEPATH": "1", "PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8",
                   "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
# jsonschema, when it finds this package, builds 39 grammars for a format that no notebook uses: two
# seconds of every start.
SLOW_AND_UNUSED = "rfc3987_syntax"
KERNEL_DIED = 138  # exit code, as of papermill's own command

# The beginning of every interpreter that runs the package for us: never from the working folder,
# and the package that this process runs.
SAME_PACKAGE = f"""
import sys
sys.path[:] = [place for place in sys.path if place]
import importlib.util
spec = importlib.util.spec_from_file_location("modern_llm", {str(CHECKOUT / "modern_llm" / "__init__.py")!a})
sys.modules["modern_llm"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["modern_llm"])
"""
# while a kernel or papermill imports there is no garbage either: see `collect_again`
_KERNEL = (SAME_PACKAGE + "import gc; gc.disable()\n"
           + "from ipykernel.kernelapp import launch_new_instance\nlaunch_new_instance()\n")
_PAPERMILL = (SAME_PACKAGE + "import gc; gc.disable()\n"
              + "from modern_llm.runs.launch import execute\nexecute(sys.argv[1])\n")

# A first small interpreter asks Linux to kill it when its parent dies, then becomes papermill; a
# kernel watches its own parent. A scheduler's warnings, which may be sent to every process of a
# job, are for the kernel: papermill would die and take it along.
_WITH_ITS_PARENT = f"""
import os, signal, sys
for number in {[int(number) for number in PREEMPTION_SIGNALS]}:
    signal.signal(number, signal.SIG_IGN)
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent died first")
os.execv(sys.executable, [sys.executable, "-c", {_PAPERMILL!r}, *sys.argv[2:]])
"""


def skip_last_collection() -> None:
    """At the end of this process the garbage collector does not go through the million objects of
    libraries: one to two seconds.
    """
    atexit.register(gc.freeze)


def collect_again() -> None:
    """Everything is imported: garbage is collected from here on, without looking at it again, nor
    at the end. Where a process of ours has not stopped that, nothing is done.
    """
    if not gc.isenabled():
        skip_last_collection()
        gc.freeze()
        gc.enable()


def stage_environment(**more: str) -> dict[str, str]:
    """This process's environment as a stage gets it, and `more`."""
    return ({name: value for name, value in os.environ.items() if name not in DROPPED_VARIABLES}
            | STAGE_VARIABLES | more)


def start_papermill(notebook: Path, output: Path, parameters: dict,
                    **environment: str) -> subprocess.Popen:
    """Execute a notebook in a process group of its own, which is killed when this process dies; its
    output is piped here.

    `environment` is added to that of a stage.
    """
    task = json.dumps({"notebook": str(notebook), "output": str(output), "parameters": parameters})
    command = [sys.executable, "-I", "-S", "-c", _WITH_ITS_PARENT, str(os.getpid()), task]
    # the kernel keeps a copy of it in the run
    kernel = stage_environment(MODERN_LLM_NOTEBOOK=str(output), **environment)
    # out of reach of the terminal's Ctrl-C
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, env=kernel, start_new_session=True)


# ---- in papermill's process ----------------------------------------------------------------------


def execute(task: str) -> None:
    """What the process of `start_papermill` does. Leaves the program with KERNEL_DIED if the kernel
    ended by itself.
    """
    sys.modules[SLOW_AND_UNUSED] = None
    import papermill
    from papermill.engines import papermill_engines

    collect_again()
    task = json.loads(task)
    logging.basicConfig(level="INFO", format="%(message)s")
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    papermill_engines.register("stage", _engine(task["output"]))
    # not in the home, which may be full, or hold startup files
    with tempfile.TemporaryDirectory(prefix="modern-llm-kernel-") as private:
        os.environ |= {"IPYTHONDIR": f"{private}/ipython",
                       "JUPYTER_RUNTIME_DIR": f"{private}/runtime"}
        # seconds: libraries come slowly from the file system of a cluster
        papermill.execute_notebook(task["notebook"], task["output"], task["parameters"],
                                   engine_name="stage", progress_bar=False, log_output=True,
                                   # saved every 30 s and at the end, not twice a cell: 5 s of a
                                   # long notebook
                                   request_save_on_cell_execute=False,
                                   start_timeout=600)


def _engine(output: str) -> type:
    """Papermill's engine with a kernel of this interpreter; of a kernel that dies, the page stays
    as far as it came.
    """
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from papermill.engines import NBClientEngine
    from papermill.iorw import write_ipynb

    words = [sys.executable, "-c", _KERNEL, "-f", "{connection_file}",
             "--InteractiveShellApp.ignore_cwd=True"]

    class OwnKernel(AsyncKernelManager):
        kernel_spec = KernelSpec(argv=words, display_name="python3", language="python")

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, **options):
            try:
                super().execute_managed_notebook(nb_man, kernel_name,
                                                 kernel_manager_class=OwnKernel, **options)
            except RuntimeError as error:  # of nbclient: the kernel, not a cell
                done = [cell for cell in nb_man.nb.cells
                        if cell.cell_type == "code" and cell.execution_count]
                if done:
                    write_ipynb(nb_man.nb, output)
                print(f"the kernel ({sys.executable}) ended by itself "
                      f"{f'after {len(done)} cells' if done else 'before the first cell'}, or was "
                      f"killed: {str(error).splitlines()[0]}. What it said last stands above",
                      file=sys.stderr, flush=True)
                sys.exit(KERNEL_DIED)

    return Engine
