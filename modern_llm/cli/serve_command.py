"""The command that serves a run's models: `serve`. Imports no torch before it loads one."""

from __future__ import annotations

import importlib.util
import os

import click

from modern_llm.cli.common import one_line_errors


@click.command()
@click.option("--run", "run_name", metavar="NAME", help="A run: its folder under runs/.")
@click.option("--stage", "stages", metavar="STAGE", multiple=True,
              help="Serve this stage alone: pretrain, sft, dpo or grpo; as often as needed. "
                   "Default: all that are there.")
@click.option("--checkpoint", metavar="PATH",
              help="A checkpoint, stage or run folder, instead of --run.")
@click.option("--output-dir", metavar="DIR",
              help="Where runs are kept, instead of runs/ (or $MODERN_LLM_RUNS).")
@click.option("--host", default="127.0.0.1", show_default=True,
              help="Where to listen; another than this machine needs an API key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True,
              help="0 takes a free one.")
@click.option("--batch", "rows", type=click.IntRange(min=1), default=32, show_default=True,
              help="Answers that one model writes together.")
@click.option("--requests", type=click.IntRange(min=1), default=64, show_default=True,
              help="Under way or waiting; more are told to come again (429).")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=1024, show_default=True,
              help="That a request may ask for, and gets if it says nothing.")
@click.option("--seconds", type=click.FloatRange(min=1, max=86400), default=120, show_default=True,
              help="Of a request; an answer is cut short then.")
@click.option("--device", default="auto", show_default=True,
              help="cpu, cuda, mps, or the best there is.")
def serve(run_name, stages, checkpoint, output_dir, host, port, device, **limits) -> None:
    """Serve the models of a run to programs that speak OpenAI's interface, and a page to chat with
    them, stage beside stage.

    Each stage is a model of that name, loaded when it is first asked; requests that come together
    are answered together, and a request with a seed gets the same text, but for rounding, alone or
    in company. On the page stands the score of the run's verifier beside an answer, and what each
    token was written from. Ctrl-C ends it.

    Where the environment has MODERN_LLM_API_KEY, requests must bring that key; only then can
    --host be another than this machine. It speaks plain HTTP: across a network, put a proxy with
    TLS before it, or come through ssh -L 8000:localhost:8000.

    \b
    pip install 'modern_llm[serve]'
    modern-llm serve --run local-smoke                  open http://127.0.0.1:8000/
    modern-llm serve --run local-smoke --stage sft --stage dpo --port 9000
    MODERN_LLM_API_KEY=... modern-llm serve --run local-smoke --host 0.0.0.0
    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
        -d '{"model": "sft", "messages": [{"role": "user", "content": "What is 3 plus 4?"}]}'
    """
    from modern_llm.messages import StageError
    from modern_llm.serving.places import KEY, check_place, listening

    with one_line_errors():
        if missing := [name for name in ("starlette", "uvicorn")
                       if importlib.util.find_spec(name) is None]:
            raise StageError(f"serve needs {' and '.join(missing)}, which the extra `serve` "
                             "brings: pip install 'modern_llm[serve]'")
        key = os.environ.get(KEY) or None
        check_place(host, key)
        listener = listening(host, port)
        from modern_llm.serving.server import serve as serve_until_told
        from modern_llm.serving.service import Service
        from modern_llm.serving.worker import Limits, Worker, served_models
        from modern_llm.training.training_state import pick_device

        models, judge = served_models(run_name, stages, checkpoint, output_dir)
        worker = Worker(pick_device(device), Limits(**limits), judge)
        serve_until_told(Service(run_name or str(checkpoint), models, worker, key), listener)
