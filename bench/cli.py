"""The command line: python -m bench."""

import argparse
import importlib.util
import math
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import torch

from bench import compare, first_call
from bench.jobs import JOBS, NO_MATPLOTLIB, ResumeError, run
from bench.model_cases import CPU_BATCHES, GPU_BATCHES, MODELS
from bench.networks import NETWORKS
from bench.provenance import device_name
from bench.rows import ORDER_RULE, SUITES
from bench.setting import LAYER_BATCHES, PRECISIONS, Budget, Setting, default_effort
from bench.terminal import Console, make_console

OUT = Path(__file__).parent / "out"
ALL_BATCHES = ",".join(str(batch) for batch in LAYER_BATCHES)
GPU_TEXT, CPU_TEXT = (" and ".join(map(str, batches)) for batches in (GPU_BATCHES, CPU_BATCHES))
MODELS_RULE = (
    "On a CPU the networks with a goal come first, at the batch of the goal, then the others at batch 1, "
    "then the first ones at their other batch. Under a budget all that need no compiler come before any "
    "that do. Without one, a CPU compiles only the networks with a goal and those named by --model, as this "
    "is slow."
)
Value = TypeVar("Value")


def parser() -> argparse.ArgumentParser:
    """Every option with its default and what it allows."""
    jobs = "\n".join(f"  {name:<10} {job.summary}" for name, job in JOBS.items())
    suites = "\n".join(f"  {name:<16} {text}" for name, text in SUITES.items())
    networks = "\n".join(f"  {name:<18} {model.summary}" for name, model in MODELS.items())
    made = argparse.ArgumentParser(
        prog="python -m bench",
        description="Compare fused_cna with what PyTorch does without it.\n\n"
        f"jobs (all but first-call, in this order, if none is named):\n{jobs}",
        epilog=f"suites of layers:\n{suites}\n  {'networks':<16} all networks of this list\n\n"
        f"networks of the job models, in this order:\n{networks}\n{_wrapped(MODELS_RULE)}\n\n"
        f"order of the layers, which decides what a budget leaves out:\n{_wrapped(ORDER_RULE)}\n\n"
        "Writes results.json, or layers.json and so on for one job, so that jobs may share a folder; and "
        "layers.png,\nsuites.png, roofline.png and models.png. --compare writes compare.png.\n"
        "Exit status: 0; 1 if a fused result was wrong or did not run; 2 if asked for what cannot be done;\n"
        "130 if interrupted, after the tables of what was measured.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "job", nargs="?", choices=("all", *JOBS), default="all", help="what to run (default: all)"
    )
    _add_what_to_measure(made)
    made.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where results go, created if missing; files there are replaced (default: the folder of "
        "the file that is resumed or of the second that is compared, else bench/out/<device>-<date>)",
    )
    made.add_argument(
        "--budget",
        type=_positive_seconds,
        metavar="SECONDS",
        help="start nothing more after this time, above 0; layers and networks go most telling first, see "
        "below, and what is left out is listed (default: no limit)",
    )
    made.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="results whose layers and networks are kept and not measured again; device, versions and "
        "sources must be the same. Nothing is resumed unless asked for",
    )
    made.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("A.json", "B.json"),
        help="measure nothing; print and plot which layers and networks got faster or slower from A to B",
    )
    made.add_argument(
        "--any-device", action="store_true", help="let --compare take files of two different devices"
    )
    return made


def _add_what_to_measure(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto (default) takes the GPU if torch sees one, else the CPU",
    )
    made.add_argument(
        "--dtype",
        type=_list_of(_one_of(PRECISIONS, "dtype")),
        metavar="NAMES",
        help=f"one or more of {', '.join(PRECISIONS)}, with commas; tf32 and fp32 are float32 that every "
        "route on a GPU multiplies so (default: fp16 on a GPU, fp32 on a CPU; jobs other than layers take "
        "the first)",
    )
    made.add_argument(
        "--batch",
        type=_list_of(_positive_integer),
        metavar="NUMBERS",
        help=f"images at a time, each 1 or more, with commas (default: for layers {ALL_BATCHES} on a GPU "
        f"and 1 on a CPU; for models {GPU_TEXT} on a GPU and {CPU_TEXT} on a CPU, see below; for pipeline "
        "32 and 4). pipeline takes the first",
    )
    made.add_argument(
        "--suite",
        type=_list_of(_suites),
        metavar="NAMES",
        default=("default",),
        help="which layers, with commas, see below (default: default)",
    )
    made.add_argument(
        "--model",
        type=_list_of(_one_of(MODELS, "network")),
        metavar="NAMES",
        help="which networks the jobs models and first-call take, with commas, see below (default: all, and "
        f"for first-call {' and '.join(first_call.NETWORKS)})",
    )
    compiled = made.add_mutually_exclusive_group()
    compiled.add_argument(
        "--no-compile",
        action="store_true",
        help="leave out the networks that torch.compile makes, which takes most of the time",
    )
    compiled.add_argument(
        "--max-autotune",
        action="store_true",
        help="on a GPU, also time networks that torch.compile tuned at length, minutes for each",
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 96, initial_indent="  ", subsequent_indent="  ")


def _list_of(parse: Callable[[str], Value | tuple[Value, ...]]) -> Callable[[str], tuple[Value, ...]]:
    """Items with commas between them, each once, in the order given."""

    def parse_all(text: str) -> tuple[Value, ...]:
        found: list[Value] = []
        for item in text.split(","):
            parsed = parse(item.strip())
            found += parsed if isinstance(parsed, tuple) else (parsed,)
        return tuple(dict.fromkeys(found))

    return parse_all


def _one_of(known: Mapping[str, object], what: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"unknown {what} {text!r} (choose from {', '.join(known)})")
        return text

    return parse


def _suites(text: str) -> tuple[str, ...]:
    if text == "networks":
        return tuple(NETWORKS)
    return (_one_of({**SUITES, "networks": ""}, "suite")(text),)


def _positive_integer(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected whole numbers of images, 1 or more, got {text!r}")
    return int(text)


def _positive_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run the jobs, print, write; the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    made = parser()
    options = made.parse_args(arguments)
    console = make_console()
    if options.compare:
        try:
            return compare_results(*options.compare, options.out, options.any_device, console)
        except ValueError as error:
            made.error(f"argument --compare: {error}")
    if options.any_device:
        made.error("argument --any-device: goes with --compare A.json B.json")
    if options.device == "cuda" and not torch.cuda.is_available():
        made.error(
            f"argument --device: torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU here; "
            "allowed here: auto, cpu"
        )
    setting = setting_of(options)
    beside = None if options.resume is None else options.resume.parent
    out = options.out or beside or OUT / default_folder(setting.device, datetime.now())
    jobs = tuple(name for name, job in JOBS.items() if job.in_all) if options.job == "all" else (options.job,)
    try:
        return run(setting, jobs, out, arguments, console, options.resume)
    except ResumeError as error:
        made.error(f"argument --resume: {error}")


def compare_results(before: Path, after: Path, out: Path | None, any_device: bool, console: Console) -> int:
    """Print and plot two results; ValueError if they cannot be compared."""
    compared = compare.compare_files(before, after, any_device=any_device)
    compare.print_compared(console, compared)
    if importlib.util.find_spec("matplotlib") is None:
        console.print(f"[yellow]{NO_MATPLOTLIB}[/yellow]", highlight=False)
        return 0
    path = (out or after.parent) / "compare.png"
    compare.plot_compared(path, compared, f"{before} -> {after}")
    console.print(f"plot: {path}", highlight=False, soft_wrap=True)
    return 0


def setting_of(options: argparse.Namespace) -> Setting:
    """The defaults that depend on the device, filled in."""
    gpu = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    names = options.dtype or (("fp16",) if gpu else ("fp32",))
    return Setting(
        device=device,
        precisions=tuple(PRECISIONS[name] for name in names),
        suites=options.suite,
        batches=options.batch or (),
        effort=default_effort(device),
        budget=Budget(options.budget),
        seed=0,
        networks=options.model or (),
        compiled=not options.no_compile,
        max_autotune=options.max_autotune,
    )


def default_folder(device: torch.device, now: datetime) -> str:
    """'cpu-20260131-235959', or the GPU's name in place of 'cpu'."""
    name = "cpu" if device.type == "cpu" else device_name(device).replace(" ", "-").lower()
    return f"{name}-{now:%Y%m%d-%H%M%S}"
