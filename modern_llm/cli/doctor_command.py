"""The command about the machine: `doctor`. Imports no torch before it looks for it."""

from __future__ import annotations

import json
import sys
import textwrap

import click

from modern_llm.cli.common import as_table, one_line_errors


@click.command()
@click.option("--quick", is_flag=True, help="Measure no matrix products; times are then guesses.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for programs.")
def doctor(quick, as_json) -> None:
    """Say what this machine is, what each preset can do here, and what to do about what is missing.

    Python and torch, devices with the speed of a large matrix product (fp32 and bf16, a second
    each), attention kernels, memory and disk, data sets, SLURM, extras. Of a preset: the memory
    that its largest stage needs, by the estimate that `run` trusts, beside what is free; whether
    its data are here; about how long it takes, by the estimate of `submit` (30% of the product's
    speed, or of a GPU's data sheet). Nothing is written or downloaded. The exit code is 0 if
    local-smoke can run here.

    \b
    modern-llm doctor
    modern-llm doctor --quick                      in seconds
    modern-llm doctor --json > machine.json        what to send along with a question
    """
    from modern_llm.cli.machine import examine

    with one_line_errors():
        found = examine(quick, lambda text: click.echo(text, err=True))
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        for name, text in facts(found["machine"]):
            click.echo(textwrap.fill(f"{name:12}{text}", 100, subsequent_indent=" " * 12,
                                     break_long_words=False, break_on_hyphens=False))
        if found["presets"]:
            click.echo("\n" + as_table([shown(row) for row in found["presets"]]))
        lines = [*found["problems"], *remedies(found["presets"])]
        click.echo("".join("\n" + textwrap.fill(
            f"* {line}", 100, subsequent_indent="  ", break_long_words=False,
            break_on_hyphens=False) for line in lines), nl=bool(lines))
        click.echo("\nlocal-smoke can run: modern-llm run" if found["ok"]
                   else "\nlocal-smoke cannot run here; what is in the way stands above")
    sys.exit(not found["ok"])


def shown(row: dict) -> dict:
    """A preset as a row of the table."""
    minutes = row["minutes"]
    time = ("-" if minutes is None else f"about {minutes:.0f} min" if minutes < 90
            else f"about {minutes / 60:,.0f} h")
    return {"preset": row["preset"], "runs here": "yes" if row["runs"] else "no",
            "memory": f"{row['needs_gb']:.1f}" + ("" if any(
                problem["kind"] == "device" for problem in row["problems"])
                else f" of {row['free_gb']:.1f}") + " GB",
            "data": (f"{len(row['missing'])} missing" if row["missing"]
                     else f"{len(row['to_download'])} to download" if row["to_download"]
                     else "here"), "time": time}


def remedies(presets: list[dict]) -> list[str]:
    """A line for every problem of the presets, with all that have it; data that are missing for any
    of them stand in one line.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for row in presets:
        for problem in row["problems"]:
            if problem["kind"] == "data":
                missing = dict.fromkeys(name for one in presets for name in one["missing"])
                problem = problem | {"what": f"not here: {', '.join(missing)}"}
            groups.setdefault((problem["what"], problem["remedy"]), []).append(row["preset"])
    return [f"{', '.join(names)}: {what}; {remedy}" for (what, remedy), names in groups.items()]


def facts(machine: dict) -> list[tuple[str, str]]:
    """The facts about a machine in words, each under its heading."""
    torch, compiles = machine["torch"], machine["compiles"]
    said = [("python", f"{machine['python']}, {machine['platform']}")]
    said.append(("torch", f"{torch['version']}, built for {torch['built_for']}, "
                          f"{torch['threads']} threads" if "error" not in torch
                 else "cannot be imported"))
    said.append(("processor", f"{machine['processor']}, {machine['cores']} cores, "
                              f"{'with' if machine['bf16_units'] else 'without'} bfloat16 units; "
                              f"torch {'can' if compiles else 'cannot'} compile for it"))
    said += [(one["device"], f"{one['name']}"
              + (f", {one['gb']:.0f} GB, compute capability {one['capability']}, "
                 f"{'with' if one['bf16'] else 'without'} bfloat16" if "gb" in one else ""))
             for one in torch["devices"]]
    if not machine["flops"] and "error" not in torch:
        said.append(("products", "not measured; "
                     f"{machine['assumed_flops'] / 1e9:.0f} GFLOP/s assumed on processors"))
    said += [("products", f"{device}: fp32 {speed['float32'] / 1e9:,.0f}, bf16 "
                          f"{speed['bfloat16'] / 1e9:,.0f} GFLOP/s")
             for device, speed in machine["flops"].items()]
    said += [("attention", f"{device}: {', '.join(kernels) or 'none'}")
             for device, kernels in machine["attention"].items()]
    if machine["free_memory_gb"] is not None:
        said.append(("memory", f"{machine['free_memory_gb']:.1f} GB free"))
    said.append(("disk", f"{machine['free_disk_gb']:.1f} GB free for {machine['runs_folder']}"))
    places: dict[str, list[str]] = {}
    for name, place in machine["datasets"].items():
        places.setdefault(place or "not here", []).append(name)
    said.append(("data", "; ".join([f"MODERN_LLM_DATA is {machine['MODERN_LLM_DATA'] or 'not set'}",
                                    *(f"{place}: {', '.join(names)}"
                                      for place, names in places.items())])))
    slurm = [name for name, path in machine["slurm"].items() if path]
    said.append(("SLURM", (f"{', '.join(slurm)} here"
                           + f"; partitions: {', '.join(machine['partitions'])}"
                           * bool(machine["partitions"])) if slurm else "not here"))
    here = [name for name, found in machine["extras"].items() if not found["missing"]]
    said.append(("extras", f"here: {', '.join(here) or 'none'}"))
    said += [(f"[{name}]", f"lacks {', '.join(found['missing'])}: {found['install']}")
             for name, found in machine["extras"].items() if found["missing"]]
    return said
