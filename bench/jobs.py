"""The jobs of the bench, one after another: run, print, write."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fused_cna
from bench import layers, overhead, pipeline, plot, report
from bench.layer_list import layers_of
from bench.provenance import device_name, load_average, provenance
from bench.setting import Setting, fused_path

BUSY = 0.5


@dataclass(frozen=True)
class Outcome:
    """What a job adds to the JSON, and what was wrong with the fused results."""

    content: Any
    failures: list[str]


@dataclass(frozen=True)
class Job:
    """A part of the bench; `needs` are modules beyond torch that it imports."""

    summary: str
    run: Callable[[Setting, Console, Path], Outcome]
    needs: tuple[str, ...] = ()


def run(setting: Setting, jobs: Sequence[str], out: Path, arguments: Sequence[str], console: Console) -> int:
    """Run `jobs` in order; 1 if a fused result was wrong or did not run, else 0.

    The JSON is written after each job, so that nothing measured is lost if a later one fails.
    """
    path, load = fused_path(setting.device), load_average()
    torch.backends.cudnn.benchmark = True
    fused_cna.config.strict = path.kernels
    console.print(
        f"[bold]fused_cna {fused_cna.__version__}[/bold] on {device_name(setting.device)}, "
        f"{setting.dtype_name}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads",
        highlight=False,
    )
    console.print(path.line, highlight=False)
    if load is not None and load > BUSY * (os.cpu_count() or 1):
        console.print(
            f"[yellow]The load average is {load:.1f} on {os.cpu_count()} processors: other work is or was "
            "running, and these times are not to be trusted.[/yellow]",
            highlight=False,
        )
    content: dict[str, Any] = {"kernels": path.kernels, "fused_path": path.line, "skipped": {}}
    failures = []
    for name in jobs:
        reason = why_skip(JOBS[name], setting)
        if reason is not None:
            content["skipped"][name] = reason
            console.print(f"[yellow]{name} skipped:[/yellow] {reason}", highlight=False)
        else:
            outcome = attempt(name, setting, console, out)
            content[name] = outcome.content
            failures += outcome.failures
        report.write_json(
            out / "results.json", {"provenance": provenance(setting, arguments, load), **content}
        )
    for failure in failures:
        console.print(f"[red]WRONG or not run:[/red] {failure}", highlight=False)
    console.print(f"results: {out / 'results.json'}", highlight=False, soft_wrap=True)
    return 1 if failures else 0


def attempt(name: str, setting: Setting, console: Console, out: Path) -> Outcome:
    """Run one job. If it breaks off, its traceback is shown and it counts as a failure; others still run."""
    try:
        return JOBS[name].run(setting, console, out)
    except RuntimeError as error:
        console.print_exception()
        reason = f"{name} broke off: {type(error).__name__}: {error}"
        return Outcome({"broke_off": reason}, [reason])


def why_skip(job: Job, setting: Setting) -> str | None:
    """The reason why a job cannot run; None if it can."""
    missing = [module for module in job.needs if importlib.util.find_spec(module) is None]
    if missing:
        return f"it needs {', '.join(missing)}, not installed here"
    return (
        None if setting.budget.allows() else f"the budget of {setting.budget.seconds:g} s was spent before it"
    )


def run_pipeline(setting: Setting, console: Console, out: Path) -> Outcome:
    with report.progress(console, "pipeline", len(pipeline.NETWORKS)) as step:
        results = pipeline.run(setting, step)
    report.print_pipeline(console, results)
    left_out = list(pipeline.NETWORKS[len(results) :])
    if left_out:
        console.print(f"left out, the budget was spent: {', '.join(left_out)}")
    failures = [f"{result.network}: {result.failure}" for result in results if result.failure]
    return Outcome({"networks": [result.as_json() for result in results], "left_out": left_out}, failures)


def run_layers(setting: Setting, console: Console, out: Path) -> Outcome:
    with report.progress(console, "layers", 1 + len(layers_of(setting.suite))) as step:
        result = layers.run(setting, step)
    report.print_layers(console, result)
    if result.launches and importlib.util.find_spec("matplotlib") is None:
        console.print("[yellow]no plot:[/yellow] matplotlib is not installed here")
    elif result.launches:
        heading = f"fused_cna {fused_cna.__version__} on {device_name(setting.device)}, {setting.dtype_name}"
        batch = result.results[0].batch
        plot.plot_layers(
            out / "layers.png", result, f"{heading}, batch {batch}", fused_path(setting.device).line
        )
        console.print(f"plot: {out / 'layers.png'}", highlight=False, soft_wrap=True)
    return Outcome(result.as_json(), result.failures)


def run_overhead(setting: Setting, console: Console, out: Path) -> Outcome:
    with report.progress(console, "overhead", 1) as step:
        result = overhead.run(setting, step)
    report.print_overhead(console, result)
    return Outcome(result.as_json(), [])


JOBS = {
    "pipeline": Job(
        "torchvision networks on photographs: the same answers, and the time before and after the swap",
        run_pipeline,
        needs=("torchvision", "sklearn", "PIL"),
    ),
    "layers": Job(
        "layers of real networks against every other route, with errors and the share of the roofline",
        run_layers,
    ),
    "overhead": Job("host time of one call on a tiny input, against the three modules", run_overhead),
}
