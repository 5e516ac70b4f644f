"""`modern-llm bench --peers`: training steps, epochs of SFT and DPO, generation, tokenisation,
start-up, two ranks; each beside a program that does the same work, in turns.

A peer gets its best settings: fused AdamW, packing or precomputed references where it has them,
bfloat16 autocast where the processor multiplies faster in it, and outside of --quick whatever of
eager and compiled is faster after warming up.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch

from modern_llm.evaluation.peer_programs import (
    compare_generation, compare_ranks, compare_start, compare_tokens, has_data,
)
from modern_llm.evaluation.peer_training import (
    CPU, OURSELVES, SHAPES, Bench, compare_dpo, compare_sft, compare_steps,
)
from modern_llm.evaluation.peers import BenchTable, matrix_speed, version_of
from modern_llm.training.training_state import compute_dtype


@dataclass(frozen=True)
class PeerLine:
    """One comparison: its name, the peer's, the function and its arguments."""

    name: str
    peer: str
    compare: Callable[..., dict]
    settings: dict = field(default_factory=dict)
    package: str = ""  # to be installed


def peer_lines(quick: bool) -> list[PeerLine]:
    """All comparisons, those that matter most first."""
    lines = []
    rows = {"0.9M": 8, "5.8M": 4, "vocabulary 50,304": 4}
    for shape, number in {**rows, **({} if quick else {"width 768": 2})}.items():
        common = {"shape": shape, "rows": number}
        if shape != "width 768":
            lines.append(PeerLine(f"step {shape}, as shipped", "transformers", compare_steps,
                                  common | {"peer": "transformers", "best": False},
                                  "transformers"))
        lines += [PeerLine(f"step {shape}", peer, compare_steps, common | {"peer": peer}, package)
                  for peer, package in (("transformers", "transformers"), ("nanoGPT's recipe", ""),
                                        ("litgpt", "litgpt"))
                  if peer == "transformers" or not (quick and shape != "5.8M")]
    lines += [PeerLine(f"step {shape}", OURSELVES, compare_steps,
                       {"shape": shape, "rows": rows[shape], "peer": OURSELVES})
              for shape in ("0.9M", "5.8M")]
    shape, number = ("0.9M", 100) if quick else ("5.8M", 400)
    sft, dpo = (name if has_data(name) else "synthetic" for name in ("alpaca", "hh-rlhf"))
    wide = {"shape": f"{shape} chat", "rows": 8}
    lines += [
        PeerLine(f"SFT epoch, {sft}", "trl", compare_sft,
                 wide | {"number": 2 * number, "source": sft}, "trl"),
        PeerLine(f"DPO epoch, {dpo}", "trl", compare_dpo, wide | {"number": number, "source": dpo},
                 "trl")]
    lines += [PeerLine(f"generation {size}, batch {batch}", "transformers", compare_generation,
                       {"shape": size, "rows": batch, "new_tokens": new}, "transformers")
              for size, new in (("5.8M", 32), *(() if quick else (("135M", 32),)))
              for batch in (1, 16, 128)]
    lines += [PeerLine(f"tokenisation of {megabytes} MB", peer, compare_tokens,
                       {"peer": peer, "megabytes": megabytes}, peer.split(".")[0])
              for megabytes in ((4,) if quick else (64,))
              for peer in ("tokenizers", "datasets.map")]
    torch_alone = ["python", "-c", "import torch"]
    starts = [(["--help"], torch_alone, "torch"), (["status"], torch_alone, "torch"),
              (["presets", "local-cpu"], torch_alone, "torch"),
              (["--help"], ["transformers", "--help"], "transformers")]
    if not quick:
        starts += [(words, torch_alone, "torch") for words in (["sample", "--help"], ["datasets"])]
        starts += [(["--help"], [peer, "--help"], peer) for peer in ("litgpt", "trl", "lm-eval")]
    lines += [PeerLine(f"start of {' '.join(ours)}", " ".join(theirs), compare_start,
                       {"ours": ours, "theirs": theirs}, package)
              for ours, theirs, package in starts]
    return [*lines, PeerLine("2 ranks, 5.8M", "1 process", compare_ranks,
                             {"shape": "5.8M", "rows": 8})]


def machine_facts(quick: bool) -> dict[str, object]:
    """What the rows are true of."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        text = Path("/proc/cpuinfo").read_text()
        name = text.split("model name")[1].split("\n")[0].strip("\t: ")
    return {"mode": "quick" if quick else "full", "machine": f"{name}, {os.cpu_count()} cores",
            "threads": torch.get_num_threads(), "torch": torch.__version__}


def bench_peers(folder: str | Path, quick: bool = False, say: Callable[[str], None] = print,
                lines: list[PeerLine] | None = None) -> BenchTable:
    """Measure every line that `folder/benchmarks.csv` does not have yet; draw `benchmarks.png`.

    Raises:
        StageError: the table is of another machine, thread count, torch or mode.
    """
    table, bench = BenchTable(Path(folder) / "benchmarks.csv", machine_facts(quick)), Bench(quick)
    bench.shapes = SHAPES | {f"{name} chat": replace(SHAPES[name], vocab_size=2048)
                             for name in ("0.9M", "5.8M")}
    for name in ("fp32", "bf16"):  # not only once: a resumed table is compared with today's peak
        sizes = (1024, 2048) if name == "fp32" else (512,)
        bench.peaks[name] = matrix_speed(compute_dtype(name, CPU), sizes)
    if bench.bf16:
        bench.peaks["bf16"] = matrix_speed(torch.bfloat16)
    say(", ".join(f"{name} {peak / 1e9:,.0f} GFLOP/s" for name, peak in bench.peaks.items()))
    for name, peak in bench.peaks.items():
        if not table.has(f"matrix {name}", "the limit"):
            table.add({"line": f"matrix {name}", "peer": "the limit", "status": "ok",
                       "unit": "GFLOP", "units": peak / 1e9, "ours_s": 1.0})
    for line in peer_lines(quick) if lines is None else lines:
        version = version_of(line.package) if line.package else None
        if table.has(line.name, line.peer):
            continue
        started, row = time.perf_counter(), {"line": line.name, "peer": line.peer}
        if line.package and version is None:
            row["status"] = f"not installed: pip install {line.package}"
        else:
            try:
                row |= {"status": "ok", **line.compare(bench, **line.settings)}
                row["peer_settings"] = "; ".join(filter(None, (
                    version and f"{line.package} {version}", row["peer_settings"])))
            except Exception as error:
                said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                row["status"] = f"failed: {said}"
            torch.compiler.reset()
        row["seconds"] = time.perf_counter() - started
        table.add(row)
        say(sentence(row))
    draw(pd.read_csv(table.path), Path(folder) / "benchmarks.png")
    return table


def sentence(row: dict) -> str:
    """A row in words, for whoever waits for it."""
    said = row["status"] if row["status"] != "ok" else (
        f"{row['ratio']:.2f} × as fast ({row['ratio_low']:.2f}–{row['ratio_high']:.2f}, "
        f"{row['pairs']} pairs)")
    return f"{row['line']} | {row['peer']}: {said}, {row['seconds']:.0f} s"


SPOKEN = ["line", "against", "ratio", "ours", "peer", "of the limit", "peer's", "GB", "peer's GB"]


def spoken_table(table: pd.DataFrame, lines: str = "") -> pd.DataFrame:
    """The comparisons as a page shows them: rates, the ratio with its range, shares of the limit,
    memory. `lines` = how their names begin.
    """
    found = table[table.line.str.startswith(lines) & (table.peer != "the limit")]
    number = lambda value, form: form.format(value) if pd.notna(value) else "–"
    rate = lambda value, unit: number(
        value, ("{:,.0f} " if value >= 100 else "{:.3g} ") + f"{unit}/s")
    return pd.DataFrame([{
        "line": row.line, "against": row.peer,
        "ratio": (f"{row.ratio:.2f} ({row.ratio_low:.2f}–{row.ratio_high:.2f})"
                  if row.status == "ok" else row.status),
        "ours": rate(row.units / row.ours_s, row.unit),
        "peer": rate(row.units / row.peer_s, row.unit),
        "of the limit": number(row.ours_of_limit, "{:.0%}"),
        "peer's": number(row.peer_of_limit, "{:.0%}"),
        "GB": number(row.ours_gb, "{:.2f}"), "peer's GB": number(row.peer_gb, "{:.2f}"),
    } for row in found.itertuples()], columns=SPOKEN).set_index("line")


def draw(table: pd.DataFrame, path: Path | None = None):
    """Ratios with their ranges, a bar for each comparison; saved and closed if a path is given."""
    import matplotlib.pyplot as plt

    from modern_llm.figures import figure, small_png

    found = table[(table.status == "ok") & table.ratio.notna()][::-1]
    fig, ax = figure(7.5, 0.8 + 0.22 * len(found))
    names = found.line + " | " + found.peer
    ax.barh(names, found.ratio, error_kw={"lw": 1},
            xerr=[found.ratio - found.ratio_low, found.ratio_high - found.ratio])
    ax.axvline(1, color="black", lw=1)
    ax.set(xscale="log", xlabel="times as fast as the peer (median and range of pairs)")
    if path:
        path.write_bytes(small_png(fig))
        plt.close(fig)
        return None
    return fig
