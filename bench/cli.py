"""The command line: python -m bench."""

import argparse
import math
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console

from bench.jobs import JOBS, run
from bench.layer_list import SUITES
from bench.provenance import device_name
from bench.setting import DTYPES, Budget, Setting, default_effort

OUT = Path(__file__).parent / "out"
WIDTH_IN_FILES = 120


def parser() -> argparse.ArgumentParser:
    """Every option with its default and what it allows."""
    jobs = "\n".join(f"  {name:<9} {job.summary}" for name, job in JOBS.items())
    suites = "\n".join(f"  {name:<9} {text}" for name, text in SUITES.items())
    made = argparse.ArgumentParser(
        prog="python -m bench",
        description="Compare fused_cna with what PyTorch does without it.\n\n"
        f"jobs (all, in this order, if none is named):\n{jobs}",
        epilog=f"suites of layers:\n{suites}\n\n"
        "Writes results.json and layers.png. Exit status: 0; 1 if a fused result was wrong or did not run.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "job", nargs="?", choices=("all", *JOBS), default="all", help="what to run (default: all)"
    )
    made.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto (default) takes the GPU if torch sees one, else the CPU",
    )
    made.add_argument(
        "--dtype", choices=tuple(DTYPES), help="storage type (default: float16 on a GPU, float32 on a CPU)"
    )
    made.add_argument(
        "--batch",
        type=_positive_integer,
        metavar="N",
        help="images at a time, 1 or more (default: 32 on a GPU; on a CPU 4 for networks and 1 for layers)",
    )
    made.add_argument(
        "--suite", choices=tuple(SUITES), default="default", help="which layers, see below (default: default)"
    )
    made.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where results go, created if missing (default: bench/out/<device>-<date>)",
    )
    made.add_argument(
        "--budget",
        type=_positive_seconds,
        metavar="SECONDS",
        help="start nothing more after this time, above 0; what is left out is listed (default: no limit)",
    )
    return made


def _positive_integer(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of images, 1 or more, got {text!r}")
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
    if options.device == "cuda" and not torch.cuda.is_available():
        made.error(
            f"argument --device: torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU here; "
            "allowed here: auto, cpu"
        )
    setting = setting_of(options)
    out = options.out or OUT / default_folder(setting.device, datetime.now())
    jobs = tuple(JOBS) if options.job == "all" else (options.job,)
    return run(setting, jobs, out, arguments, console())


def console() -> Console:
    """As wide as the terminal; wide enough for the tables where the output goes to a file."""
    made = Console()
    return made if made.is_terminal else Console(width=WIDTH_IN_FILES)


def setting_of(options: argparse.Namespace) -> Setting:
    """The defaults that depend on the device, filled in."""
    gpu = options.device == "cuda" or (options.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    return Setting(
        device=device,
        dtype=DTYPES[options.dtype or ("float16" if gpu else "float32")],
        suite=options.suite,
        batch=options.batch,
        effort=default_effort(device),
        budget=Budget(options.budget),
        seed=0,
    )


def default_folder(device: torch.device, now: datetime) -> str:
    """'cpu-20260131-235959', or the GPU's name in place of 'cpu'."""
    name = "cpu" if device.type == "cpu" else device_name(device).replace(" ", "-").lower()
    return f"{name}-{now:%Y%m%d-%H%M%S}"
