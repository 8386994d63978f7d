"""The jobs of the bench, one after another: run, print, write."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fused_cna
from bench import first_call, layers, models, overhead, pipeline, plot, report
from bench.compare import load_rows
from bench.host_parts import print_parts
from bench.layer_report import layers_summary, print_layers
from bench.layer_result import LayerResult
from bench.model_plot import plot_models
from bench.model_report import models_summary, print_models
from bench.model_result import ModelResult
from bench.provenance import device_name, differences, load_average, provenance
from bench.roofline import Ceilings
from bench.setting import Setting, fused_path
from bench.terminal import HAS_RICH, Console
from fused_cna._progress import progress

BUSY = 0.5
INTERRUPTED = 130
KEPT_FOR_NETWORKS = 0.5
KEPT_FOR_OTHERS = 0.1
NO_RICH = "rich is not installed here: plain text instead (pip install -r requirements/bench.txt)"
NO_MATPLOTLIB = (
    "no plots: matplotlib is not installed here (pip install -r requirements/bench.txt); all numbers are in "
    "the JSON file"
)


class ResumeError(ValueError):
    """A file that was asked to be resumed and cannot be."""


@dataclass(frozen=True)
class Earlier:
    """What a run that is resumed had measured."""

    rows: tuple[LayerResult, ...] = ()
    models: tuple[ModelResult, ...] = ()
    ceilings: dict[str, Ceilings] | None = None
    content: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Session:
    """What a job is given: `save` writes its unfinished content, so that a run that is killed leaves it.

    `later` are the jobs that are still to come.
    """

    setting: Setting
    console: Console
    out: Path
    earlier: Earlier
    save: Callable[[Any], None]
    later: tuple[str, ...] = ()

    @property
    def keep(self) -> float:
        """The seconds of a budget that the later jobs shall have."""
        if not self.later:
            return 0.0
        kept = KEPT_FOR_NETWORKS if "models" in self.later else KEPT_FOR_OTHERS
        return kept * (self.setting.budget.seconds or 0.0)


@dataclass(frozen=True)
class Outcome:
    """What a job adds to the JSON and to the summary, and what was wrong with the fused results."""

    content: Any
    failures: list[str]
    summary: Sequence[str] = ()


@dataclass(frozen=True)
class Job:
    """A part of the bench; `needs` are modules beyond torch that it imports, `in_all` whether all has it."""

    summary: str
    run: Callable[[Session], Outcome]
    needs: tuple[str, ...] = ()
    in_all: bool = True


def run(
    setting: Setting,
    jobs: Sequence[str],
    out: Path,
    arguments: Sequence[str],
    console: Console,
    resume: Path | None = None,
) -> int:
    """Run `jobs` in order; 1 if a fused result was wrong or did not run, else 0; 130 if it was interrupted.

    The JSON is written after each job and during long ones, so that nothing measured is lost. Who interrupts
    a run gets the tables of what it has measured.

    Raises:
        ResumeError: `resume` cannot be continued here; before anything is measured or written.
    """
    path, load = fused_path(setting.device), load_average()
    torch.backends.cudnn.benchmark = True
    fused_cna.config.strict = path.kernels
    said = provenance(setting, arguments, load)
    earlier = Earlier() if resume is None else read_earlier(resume, said)
    _introduce(setting, console, path.line, load)
    content: dict[str, Any] = {"kernels": path.kernels, "fused_path": path.line, "skipped": {}}
    content |= earlier.content
    results = out / (f"{jobs[0]}.json" if len(jobs) == 1 else "results.json")

    def write() -> None:
        report.write_json(results, {"provenance": provenance(setting, arguments, load), **content})

    failures: list[str] = []
    summary: list[str] = []
    for index, name in enumerate(jobs):
        reason = why_skip(JOBS[name], setting)
        if reason is not None:
            content["skipped"][name] = reason
            console.print(f"[yellow]{name} skipped:[/yellow] {reason}", highlight=False)
        else:

            def save(unfinished: Any, job: str = name) -> None:
                content[job] = unfinished
                write()

            later = tuple(jobs[index + 1 :])
            outcome = attempt(name, Session(setting, console, out, earlier, save, later))
            if "broke_off" in outcome.content:
                content[name] = content.get(name, {}) | outcome.content
            else:
                content[name] = outcome.content
            failures += outcome.failures
            summary += outcome.summary
        write()
    report.print_summary(console, summary, failures)
    console.print(f"results: {results}", highlight=False, soft_wrap=True)
    return INTERRUPTED if setting.budget.interrupted else 1 if failures else 0


def read_earlier(path: Path, now: dict[str, Any]) -> Earlier:
    """What a result holds of layers and networks; ResumeError if it cannot stand beside what is new."""
    try:
        measured = load_rows(path)
    except ValueError as error:
        raise ResumeError(str(error)) from error
    different = differences(measured.provenance, now)
    if different:
        raise ResumeError(
            f"{path} cannot be resumed here, because rows of one result must be comparable, and these differ "
            f"(file and now): {'; '.join(different)}"
        )
    content = report.read_json(path)
    kept: dict[str, Any] = {job: content[job] for job in ("models", "layers") if job in content}
    ceilings = {
        precision: Ceilings(**values)
        for precision, values in content.get("layers", {}).get("ceilings", {}).items()
    }
    return Earlier(tuple(measured.layers), tuple(measured.networks), ceilings, kept)


def _introduce(setting: Setting, console: Console, fused_line: str, load: float | None) -> None:
    names = ", ".join(precision.name for precision in setting.precisions)
    console.print(
        f"[bold]fused_cna {fused_cna.__version__}[/bold] on {device_name(setting.device)}, "
        f"{names}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads",
        highlight=False,
    )
    console.print(fused_line, highlight=False)
    if not HAS_RICH:
        console.print(NO_RICH)
    if load is not None and load > BUSY * (os.cpu_count() or 1):
        console.print(
            f"[yellow]The load average is {load:.1f} on {os.cpu_count()} processors: other work is or was "
            "running, and these times are not to be trusted.[/yellow]",
            highlight=False,
        )


def attempt(name: str, session: Session) -> Outcome:
    """Run one job. If it breaks off, its traceback is shown and it counts as a failure; others still run."""
    try:
        return JOBS[name].run(session)
    except KeyboardInterrupt:
        session.setting.budget.interrupted = True
        return Outcome({"broke_off": session.setting.budget.why_not}, [])
    except RuntimeError as error:
        session.console.print_exception()
        reason = f"{name} broke off: {type(error).__name__}: {error}"
        return Outcome({"broke_off": reason}, [reason])


def why_skip(job: Job, setting: Setting) -> str | None:
    """The reason why a job cannot run; None if it can."""
    missing = [module for module in job.needs if importlib.util.find_spec(module) is None]
    if missing:
        return f"it needs {', '.join(missing)}, not installed here"
    return None if setting.budget.allows() else f"{setting.budget.why_not} before it"


def run_pipeline(session: Session) -> Outcome:
    setting, console = session.setting, session.console
    with progress("pipeline", len(pipeline.NETWORKS), shown=True) as step, setting.precision.applied():
        results = pipeline.run(setting, step)
    left_out = list(pipeline.NETWORKS[len(results) :])
    if left_out:
        console.print(f"left out, {setting.budget.why_not}: {', '.join(left_out)}")
    failures = [f"{result.network}: {result.failure}" for result in results if result.failure]
    content = {"networks": [result.as_json() for result in results], "left_out": left_out}
    return Outcome(content, failures, report.pipeline_summary(results))


def run_layers(session: Session) -> Outcome:
    setting, console, earlier = session.setting, session.console, session.earlier
    with progress("layers", layers.most_steps(setting), shown=True) as step:
        result = layers.run(
            setting,
            step,
            earlier=earlier.rows,
            earlier_ceilings=earlier.ceilings,
            keep=session.keep,
            save=lambda unfinished: session.save(unfinished.as_json()),
        )
    session.save(result.as_json())
    print_layers(console, result)
    if result.launches:
        draw(session, lambda heading, note: plot.plot_all(session.out, result, heading, note))
    return Outcome(result.as_json(), result.failures, layers_summary(result))


def run_models(session: Session) -> Outcome:
    setting, console = session.setting, session.console
    with progress("models", models.most_steps(setting), shown=True) as step, setting.precision.applied():
        result = models.run(
            setting,
            step,
            earlier=session.earlier.models,
            keep=session.keep,
            save=lambda unfinished: session.save(unfinished.as_json()),
        )
    session.save(result.as_json())
    print_models(console, result)
    if result.launches:
        draw(
            session,
            lambda heading, note: [plot_models(session.out / "models.png", result, heading, note)],
        )
    return Outcome(result.as_json(), result.failures, models_summary(result))


def draw(session: Session, plots: Callable[[str, str], list[Path]]) -> None:
    """What `plots` writes for a heading and a note, or a line that says why there is nothing.

    Nothing for a run that was interrupted, as whoever did it may not wait.
    """
    if session.setting.budget.interrupted:
        return
    if importlib.util.find_spec("matplotlib") is None:
        session.console.print(f"[yellow]{NO_MATPLOTLIB}[/yellow]", highlight=False)
        return
    device = session.setting.device
    heading = f"fused_cna {fused_cna.__version__} on {device_name(device)}"
    for path in plots(heading, fused_path(device).line):
        session.console.print(f"plot: {path}", highlight=False, soft_wrap=True)


def run_overhead(session: Session) -> Outcome:
    with progress("overhead", 2, shown=True) as step, session.setting.precision.applied():
        result = overhead.run(session.setting, step)
    print_parts(session.console, result.parts)
    return Outcome(result.as_json(), [], report.overhead_summary(result))


def run_first_call(session: Session) -> Outcome:
    setting, cases = session.setting, first_call.cases(session.setting)
    with progress("first-call", first_call.most_steps(setting), shown=True) as step:
        results = first_call.run(setting, step)
    first_call.print_results(session.console, results)
    done = {(one.network, one.route) for one in results}
    left_out = [", ".join(case) for case in cases if case not in done]
    if left_out:
        session.console.print(f"left out, {setting.budget.why_not}: {'; '.join(left_out)}")
    failed = [one for one in results if one.failure]
    for one in failed:
        session.console.print(f"{one.network}, {one.route} failed: {one.failure}", markup=False)
    failures = [f"{one.network}: {one.failure}" for one in failed if one.route == "fused"]
    content = {"results": [one.as_json() for one in results], "left_out": left_out}
    return Outcome(content, failures, first_call.summary_of(results))


# The most telling first: a budget, or whoever interrupts a run, takes from the end.
JOBS = {
    "layers": Job(
        "layers of real networks against every other route, with errors and the share of the roofline",
        run_layers,
    ),
    "models": Job(
        "whole networks of torchvision and timm: fused against eager, folded and torch.compile",
        run_models,
    ),
    "pipeline": Job(
        "torchvision networks on photographs: the same answers, and the time before and after the swap",
        run_pipeline,
        needs=("torchvision", "sklearn", "PIL"),
    ),
    "overhead": Job(
        "host time of one call on a tiny input, against the three modules, and by parts", run_overhead
    ),
    "first-call": Job(
        "import, first call and new image size of networks in fresh processes; slow, so not part of all",
        run_first_call,
        needs=("torchvision",),
        in_all=False,
    ),
}
