"""``python -m tests.gpu first OUT``: see ``tests/gpu/calls.py`` for the calls."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tests.gpu.calls import CALLS
from tests.gpu.run import run_call


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    made.add_argument("call", choices=CALLS)
    made.add_argument("out", type=Path, help="folder for the JSON and the log")
    made.add_argument("--before", type=Path, help="JSON of the call before (default: OUT/first.json)")
    made.add_argument("--seconds", type=float, help="for the whole call (default: its own limit)")
    made.add_argument("--steps", metavar="NAMES", help="only these of its steps, with commas")
    made.add_argument(
        "--more",
        nargs=2,
        action="append",
        default=[],
        metavar=("STEP", "ARGUMENTS"),
        help="of a step's command",
    )
    options = made.parse_args(arguments)
    call = CALLS[options.call]
    steps = {step.name: step for step in call.steps}
    for name in options.steps.split(",") if options.steps else ():
        if name not in steps:
            made.error(f"{options.call} has no step {name!r}, only {', '.join(steps)}")
    chosen = options.steps.split(",") if options.steps else list(steps)
    for name, arguments in options.more:
        steps[name] = replace(steps[name], command=(*steps[name].command, *shlex.split(arguments)))
    call = replace(
        call,
        steps=tuple(step for name, step in steps.items() if name in chosen),
        seconds=options.seconds or call.seconds,
    )
    before = options.before or options.out / "first.json"
    return run_call(options.call, call, options.out, before.resolve())


if __name__ == "__main__":
    # However it ends, it ends its step first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
