#!/usr/bin/env python3
"""What a change is worth: a training step of this checkout against that of another one.

    git worktree add /tmp/before HEAD~1
    python scripts/step_ratio.py /tmp/before --preset local-smoke --steps 24

Two processes take turns on the same random rows, so that a slow minute of the machine meets both.
Printed: user CPU time of this one over the other's, median [quartiles] over the steps, and how far
their losses ever lay apart.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
ONE_STEP = '''
import sys, time
sys.path.insert(0, sys.argv[1])
from dataclasses import replace

import torch

from modern_llm.config import get_pipeline_preset
from modern_llm.models.decoder import ModernDecoderLM
from modern_llm.training.optim import lm_loss
from modern_llm.training.train_step import optimizer_step
from modern_llm.training.training_state import TrainingState

preset, stage, document, rows, context, threads = sys.argv[2], sys.argv[3], *map(int, sys.argv[4:])
torch.set_num_threads(threads)
torch.manual_seed(0)
config = get_pipeline_preset(preset)
cfg = replace(config.model, context_length=context or config.model.context_length)
train = getattr(config, stage)
train = replace(train, batch_size=rows or train.batch_size, micro_batch_size=None)
state = TrainingState(ModernDecoderLM(cfg), train, torch.device("cpu"))
drawn = torch.Generator().manual_seed(1)
shape = train.batch_size, cfg.context_length
for _ in sys.stdin:
    ids = torch.randint(0, cfg.vocab_size, (shape[0], shape[1] + 1), generator=drawn)
    batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
    if document:
        batch["segment_ids"] = (torch.rand(shape, generator=drawn) < 1 / document).cumsum(-1) + 1
    started = time.process_time()
    out, _ = optimizer_step(state, lm_loss, batch, train, 1.0)
    print(time.process_time() - started, (out.total / out.count).item(), flush=True)
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="the checkout to compare with")
    parser.add_argument("--preset", default="local-smoke")
    parser.add_argument("--stage", default="pretrain")
    parser.add_argument("--document", type=int, default=0,
                        help="mean tokens of the documents packed into a row; 0: whole rows")
    parser.add_argument("--rows", type=int, default=0, help="0: the preset's batch")
    parser.add_argument("--context", type=int, default=0, help="0: the preset's")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=24, help="after two that warm up")
    given = parser.parse_args()
    if not (given.other / "modern_llm" / "__init__.py").is_file():
        parser.error(f"{given.other} is no checkout: there is no modern_llm/ in it")
    words = [given.preset, given.stage,
             *map(str, (given.document, given.rows, given.context, given.threads))]
    pair = [subprocess.Popen([sys.executable, "-c", ONE_STEP, place, *words], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for place in (HERE, given.other.resolve())]
    seconds, apart = [], 0.0
    for step in range(given.steps + 2):
        found = {}
        for process in pair if step % 2 else pair[::-1]:
            process.stdin.write("\n")
            process.stdin.flush()
            found[process] = tuple(map(float, process.stdout.readline().split()))
        (ours, loss), (theirs, other_loss) = (found[process] for process in pair)
        apart = max(apart, abs(loss - other_loss))
        seconds.append((ours, theirs))
    for process in pair:
        process.stdin.close()
        process.wait()
    ratios = [ours / theirs for ours, theirs in seconds[2:]]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"{' '.join(words)}: {middle:.2f} [{low:.2f}, {high:.2f}] of "
          f"{statistics.median(theirs for _, theirs in seconds[2:]):.3f} s, {given.steps} steps; "
          f"losses at most {apart:.1e} apart")


if __name__ == "__main__":
    main()
