"""The command line: python -m bench."""

import argparse
import importlib.util
import math
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fused_cna
from bench import cases, first_call, jobs, networks, plot, report, routes
from bench.compare import compare_files, plot_compared, print_compared
from bench.measure import Budget, Run, Setting, first_line
from bench.networks import MODELS
from bench.provenance import device_name, differences, fused_path, load_average, provenance
from bench.result import Outcome, read_json, read_records, write_json
from fused_cna._progress import progress

OUT = Path(__file__).parent / "out"
BUSY, INTERRUPTED = 0.5, 130
CPU_SECONDS = 150.0
JOBS = {
    "models": "whole networks of torchvision and timm on photographs: eager, fused, frozen, compiled",
    "layers": "layers of real networks against every other route, with errors and the share of the roofline",
    "overhead": "host time of one call on a tiny input, against the three modules, and by parts",
    "first-call": "import, first call and new image size of networks in fresh processes; slow, so not in all",
    "pipeline": "models of Conv2dNormActivation alone, with a ConvNormAct in place of each as well",
    "depthwise": "layers of the suite depthwise",
    "grouped": "layers of the suite grouped",
    "compare": "two results, A.json and B.json: what got faster or slower; measures nothing",
}
SAME_AS = {"pipeline": "models", "depthwise": "layers", "grouped": "layers"}
ALL = ("models", "layers", "overhead")
# The part of a budget that a job leaves to those that follow it.
KEPT = {"models": 0.6, "layers": 0.1}
NO_MATPLOTLIB = "no plots: matplotlib is not installed here (pip install -r requirements/bench.txt)"
HELP = """\
--device: auto (default): the GPU if torch sees one, else the CPU
--dtype: with commas, of fp16, bf16, tf32, fp32 (default: fp16 on a GPU, fp32 on a CPU); tf32 and fp32 are \
float32 that a GPU multiplies so; jobs other than layers take the first
--batch: images at a time, with commas (default: layers 1,8,32,128 on a GPU, 1 on a CPU; models: see below)
--suite: which layers, with commas (default: default)
--model: which networks, with commas (default: all; for first-call resnet50 and mobilenet_v2)
--without: routes to leave out, with commas, as 'cuDNN graph', whose search takes seconds for a layer
--compile: the routes of torch.compile, which take most time (default: no for all and pipeline on a CPU)
--max-autotune: on a GPU, networks by max-autotune too, minutes for each
--out: where results go; files there are replaced (default: beside the file that is resumed or B.json, else \
bench/out/<device>-<date>)
--budget: start nothing more after this time, list what is left out (default: 150 for all on a CPU, else none)
--resume: results that are kept and not measured again; device, versions and sources must be the same
--any-device: let compare take files of two different devices
"""
FILES = """\
Writes results.json, or layers.json and so on for one job, so that jobs may share a folder; and layers.png,
suites.png, roofline.png and models.png, or compare.png.
Exit status: 0; 1 if a fused result was wrong or did not run; 2 if asked for what cannot be done;
130 if interrupted, after the tables of what was measured."""


def parser() -> argparse.ArgumentParser:
    """Every option with its default and what it allows."""

    def listed(title: str, rows: Mapping[str, str], rule: str = "") -> str:
        lines = [title, *(f"  {name:<18} {text}" for name, text in rows.items())]
        return "\n".join([*lines, *textwrap.wrap(rule, 96, initial_indent="  ", subsequent_indent="  ")])

    route_names = dict.fromkeys(one.name for one in (*routes.NETWORK_ROUTES, *routes.LAYER_ROUTES))
    kinds = {name: model.kind for name, model in MODELS.items()}
    suites = cases.SUITES | {"networks": "all networks of this list"}
    epilog = [
        listed("suites of layers:", suites, cases.ORDER_RULE),
        listed("networks:", kinds, networks.CASES_RULE),
        listed("routes:", {}, ", ".join(route_names)),
        FILES,
    ]
    made = argparse.ArgumentParser(
        prog="python -m bench",
        description=listed("Compare fused_cna with what PyTorch and cuDNN do without it. Jobs:", JOBS),
        epilog="\n\n".join(epilog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names, flag, folder = {"metavar": "NAMES"}, {"action": "store_true"}, {"type": Path, "metavar": "FOLDER"}
    options: dict[str, dict[str, Any]] = {
        "--device": {"choices": ("auto", "cpu", "cuda"), "default": "auto"},
        "--dtype": {"type": _names(cases.PRECISIONS, "dtype"), **names},
        "--batch": {"type": _batches, "metavar": "NUMBERS"},
        "--suite": {"type": _names(suites, "suite"), **names},
        "--model": {"type": _names(MODELS, "network"), **names},
        "--without": {"type": _names(route_names, "route"), "default": (), **names},
        "--compile": {"action": argparse.BooleanOptionalAction},
        "--max-autotune": flag,
        "--out": folder,
        "--budget": {"type": _seconds, "metavar": "SECONDS"},
        "--resume": folder | {"metavar": "FILE"},
        "--any-device": flag,
    }
    texts = dict(line.split(": ", 1) for line in HELP.splitlines())
    jobs_help = f"what to run (default: all: {', '.join(ALL)})"
    made.add_argument("job", nargs="?", choices=("all", *JOBS), default="all", help=jobs_help)
    made.add_argument("files", nargs="*", type=Path, metavar="FILE", help="A.json and B.json of compare")
    for name, how in options.items():
        made.add_argument(name, help=texts[name], **how)
    return made


def _names(known: Iterable[str], what: str) -> Callable[[str], tuple[str, ...]]:
    """Of those that are known, with commas between them, each once, in the order given."""
    allowed = tuple(known)

    def parse(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(item.strip() for item in text.split(",")))
        for wrong in (name for name in found if name not in allowed):
            raise argparse.ArgumentTypeError(f"unknown {what} {wrong!r} (choose from {', '.join(allowed)})")
        return found

    return parse


def _batches(text: str) -> tuple[int, ...]:
    if not all(item.strip().isdecimal() and int(item) > 0 for item in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected whole numbers of images, 1 or more, got {text!r}")
    return tuple(dict.fromkeys(int(item) for item in text.split(",")))


def _seconds(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return float(text)


def setting_of(options: argparse.Namespace) -> Setting:
    """The defaults that depend on the device and on the job, filled in."""
    gpu = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    everything, job, batches, names = (
        options.job == "all",
        options.job,
        options.batch or (),
        options.model or (),
    )
    if job == "pipeline":
        batches = batches or ((32,) if gpu else (4,))
        names = names or tuple(name for name, model in MODELS.items() if model.modules)
    suites = options.suite or ((job,) if job in cases.SWEPT else ("default",))
    compiled = gpu or job not in ("all", "pipeline")
    cpu_effort = {"rounds": 9, "layer_seconds": 1.0, "network_seconds": 8.0}
    return Setting(
        device=torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu"),
        precisions=tuple(
            cases.PRECISIONS[name] for name in options.dtype or (("fp16",) if gpu else ("fp32",))
        ),
        budget=Budget(options.budget or (CPU_SECONDS if everything and not gpu else None)),
        suites=tuple(one for name in suites for one in (cases.NETWORKS if name == "networks" else (name,))),
        batches=batches,
        networks=names,
        without=options.without,
        compiled=compiled if options.compile is None else options.compile,
        max_autotune=options.max_autotune,
        few=everything,
        **({} if gpu else cpu_effort),  # type: ignore[arg-type]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run the jobs, print, write; the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    made = parser()
    options = made.parse_intermixed_args(arguments)
    console = report.make_console()
    if len(options.files) != 2 * (options.job == "compare"):
        made.error("argument FILE: compare takes two, A.json and B.json, and no other job takes any")
    if options.any_device and options.job != "compare":
        made.error("argument --any-device: goes with compare A.json B.json")
    if options.device == "cuda" and not torch.cuda.is_available():
        sees = f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU here"
        made.error(f"argument --device: {sees}; allowed here: auto, cpu")
    try:
        if options.job == "compare":
            return compare(*options.files, options.out, options.any_device, console)
        setting = setting_of(options)
        name = device_name(setting.device).replace(" ", "-").lower() if setting.gpu else "cpu"
        beside = options.resume.parent if options.resume else OUT / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
        taken = ALL if options.job == "all" else (options.job,)
        return run(setting, taken, options.out or beside, arguments, console, options.resume)
    except ValueError as error:
        made.error(str(error))


def compare(before: Path, after: Path, out: Path | None, any_device: bool, console: Console) -> int:
    """Print and plot two results; ValueError if they cannot be compared."""
    compared = compare_files(before, after, any_device=any_device)
    print_compared(console, compared)
    path = (out or after.parent) / "compare.png"
    draw(console, lambda: [plot_compared(path, compared, f"{before} -> {after}")])
    return 0


def draw(console: Console, plots: Callable[[], list[Path]]) -> None:
    """What `plots` writes, or a line that says why there is nothing."""
    there = importlib.util.find_spec("matplotlib") is not None
    report.say(console, [f"plot: {path}" for path in plots()] if there else [NO_MATPLOTLIB])


def run(
    setting: Setting,
    taken: Sequence[str],
    out: Path,
    arguments: Sequence[str],
    console: Console,
    resume: Path | None = None,
) -> int:
    """Run jobs in order; 1 if a fused result was wrong or did not run, else 0; 130 if it was interrupted.

    The JSON is written after each job and during long ones, so that nothing measured is lost. Who interrupts
    a run gets the tables of what it has measured. ValueError if `resume` cannot be continued here.
    """
    (kernels, fused_line), load = fused_path(setting.device), load_average()
    torch.backends.cudnn.benchmark = True
    fused_cna.config.strict = kernels
    said = partial(provenance, setting.device, arguments, load, setting.seed)
    outcomes = {} if resume is None else read_earlier(resume, said())
    name, names = device_name(setting.device), ", ".join(one.name for one in setting.precisions)
    heading = f"fused_cna {fused_cna.__version__} on {name}, {names}, torch {torch.__version__}"
    report.say(console, [f"{heading}, {torch.get_num_threads()} threads", fused_line])
    if load is not None and load > BUSY * (os.cpu_count() or 1):
        report.say(console, [f"The load average is {load:.1f}: do not trust these times."], "yellow")
    skipped: dict[str, str] = {}
    results = out / f"{taken[0] if len(taken) == 1 else 'results'}.json"

    def save() -> None:
        found = {job: outcome.as_json() for job, outcome in outcomes.items()}
        content = {"kernels": kernels, "fused_path": fused_line, "skipped": skipped, **found}
        write_json(results, {"provenance": said(), **content})

    summary: list[str] = []
    for job in (SAME_AS.get(asked, asked) for asked in taken):
        if not setting.budget.allows():
            skipped[job] = f"{setting.budget.why_not} before it"
            report.say(console, [f"{job} skipped: {skipped[job]}"], "yellow")
            continue
        work, steps, show, sum_up, plots = WORK[job]
        outcome = outcomes.setdefault(job, Outcome())
        keep = KEPT.get(job, 0.0) * (setting.budget.seconds or 0.0) if len(taken) > 1 else 0.0
        try:
            with progress(job, steps(setting), shown=True) as step:
                work(Run(setting, outcome, step, keep, save))
        except KeyboardInterrupt:
            setting.budget.interrupted = True
        except RuntimeError as error:
            console.print_exception()
            outcome.broke_off.append(f"{job} broke off: {first_line(error)}")
        save()
        show(console, outcome)
        summary += sum_up(outcome)
        if plots and outcome.launches and not setting.budget.interrupted:
            draw(console, partial(plots, out, outcome, f"{heading}. {fused_line}"))
    save()
    failures = [failure for outcome in outcomes.values() for failure in outcome.failures]
    report.print_summary(console, summary, failures)
    report.say(console, [f"results: {results}"])
    return INTERRUPTED if setting.budget.interrupted else 1 if failures else 0


def read_earlier(path: Path, now: dict[str, Any]) -> dict[str, Outcome]:
    """What a result holds of layers and networks; ValueError if it cannot stand beside what is new."""
    content = read_json(path)
    different = "; ".join(differences(content["provenance"], now))
    if different:
        raise ValueError(
            f"{path} cannot be resumed here, because rows of one result must be comparable, and these differ "
            f"(file and now): {different}"
        )
    read = read_records(path, content)
    ceilings = content.get("layers", {}).get("ceilings", {})
    return {job: Outcome(rows, len(rows), ceilings=ceilings) for job, rows in read.items() if rows}


def _processes(setting: Setting) -> int:
    return len(first_call.cases(setting))


# What a job does, its steps at most, what prints it, sums it up and draws it.
WORK: dict[str, tuple[Any, ...]] = {
    "models": (
        *(jobs.run_networks, jobs.network_steps),
        *(report.print_networks, report.networks_summary, plot.plot_networks),
    ),
    "layers": (
        *(jobs.run_layers, jobs.layer_steps),
        *(report.print_layers, report.layers_summary, plot.plot_layers),
    ),
    "overhead": (jobs.run_overhead, lambda _: 2, report.print_overhead, report.overhead_summary, None),
    "first-call": (first_call.run, _processes, report.print_first_calls, report.first_calls_summary, None),
}

if __name__ == "__main__":
    # A shell lets what it runs in the background ignore interrupts, and so would the bench.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
