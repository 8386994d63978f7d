"""Builds the simulator with g++, each file only when it or something that it includes has changed.

Everything lands in build/simt/ in the tree. A lock makes it safe to call from several processes at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.locks import locked

ROOT = Path(__file__).resolve().parents[2]
SIMT = ROOT / "tests" / "simt"
CSRC = ROOT / "csrc"
FOLDER = ROOT / "build" / "simt"
PROCESSES = os.cpu_count() or 1


@dataclass(frozen=True)
class Variant:
    """A set of flags that everything in one library is compiled with."""

    name: str
    compile_flags: tuple[str, ...]
    link_flags: tuple[str, ...] = ()


SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")

PLAIN = Variant("plain", ("-O2", "-g1"), ("-shared",))
SANITIZED = Variant("sanitized", ("-O0", "-g1", *SANITIZE), (*SANITIZE, "-rdynamic"))
COVERAGE = Variant("coverage", ("-O0", "-g1", "--coverage"), ("-shared", "--coverage"))

# Files that are worth another level of optimisation than their variant's.
OPTIMISATION = dict.fromkeys(("multiply_add.cpp", "multiply_matrices.cpp", "warpgroup.cpp"), ("-O3",))


@dataclass(frozen=True)
class Target:
    """A library or program: its file name, its variant and its sources."""

    name: str
    variant: Variant
    sources: tuple[Path, ...]

    @property
    def path(self) -> Path:
        return FOLDER / self.variant.name / self.name


def targets() -> dict[str, Target]:
    """Everything that can be built, by the name that `build` takes."""
    switch = {name: SIMT / "src" / f"context_{name}.cpp" for name in ("x86_64", "ucontext")}
    fastest = switch["x86_64" if platform.machine() == "x86_64" else "ucontext"]
    core = [path for path in sorted((SIMT / "src").glob("*.cpp")) if path not in switch.values()]
    host = SIMT / "host"
    # all of csrc/ that needs neither torch nor Python
    plan = [path for path in sorted((CSRC / "plan").glob("*.cpp")) if path.stem not in ("module", "python")]
    kernels = [*sorted((CSRC / "kernels").rglob("*.cpp")), *sorted((CSRC / "kernels").rglob("*.cu"))]
    operator = [*plan, *kernels, host / "conv.cpp", host / "tensor_maps.cpp"]
    tests = [
        *sorted((SIMT / "kernels").glob("*.cu")),
        host / "test_kernels.cpp",
        host / "tensor_maps.cpp",
    ]
    conv, own_kernels = (fastest, *core, *operator), (fastest, *core, *tests)
    return {
        "conv": Target("libsimt_conv.so", PLAIN, conv),
        "kernels": Target("libsimt_kernels.so", PLAIN, own_kernels),
        "kernels_ucontext": Target("libsimt_kernels_ucontext.so", PLAIN, (switch["ucontext"], *core, *tests)),
        "conv_coverage": Target("libsimt_conv.so", COVERAGE, conv),
        "conv_sanitized": Target("simt_conv", SANITIZED, (*conv, host / "conv_main.cpp")),
        "kernels_sanitized": Target(
            "simt_kernels", SANITIZED, (*own_kernels, host / "test_kernels_main.cpp")
        ),
    }


def build(name: str, say: Callable[[str], None] = lambda line: None) -> Path:
    """Brings one target up to date and returns its path.

    Args:
        name: a key of `targets()`.
        say: is told each command as it ends, and what was up to date.

    Raises:
        RuntimeError: the compiler refused; the message holds its whole output.
    """
    target = targets()[name]
    with locked(FOLDER / "lock"):
        with ThreadPoolExecutor(PROCESSES) as pool:
            objects = list(pool.map(lambda source: _compile(target.variant, source, say), target.sources))
        _link(target, objects, say)
    return target.path


def _compile(variant: Variant, source: Path, say: Callable[[str], None]) -> Path:
    relative = source.relative_to(ROOT)
    result = FOLDER / variant.name / "objects" / f"{'_'.join(relative.parts)}.o"
    dependencies = result.with_suffix(".d")
    language = ("-x", "c++") if source.suffix == ".cu" else ()
    command = [
        *_compiler(),
        *_common_flags(),
        *variant.compile_flags,
        *OPTIMISATION.get(source.name, ()),
        *("-MD", "-MF", str(dependencies)),
        *(*language, "-c", str(relative)),
    ]
    _produce(result, command, lambda: _read_dependencies(dependencies), say)
    return result


def _link(target: Target, objects: list[Path], say: Callable[[str], None]) -> None:
    command = [*_compiler(), *target.variant.link_flags, *map(str, objects)]
    _produce(target.path, command, lambda: objects, say)


def _common_flags() -> tuple[str, ...]:
    return (
        *(
            "-std=c++20",
            "-fPIC",
            "-Wall",
            "-Wextra",
            "-Wno-unknown-pragmas",
            "-Wno-missing-field-initializers",
            # says that kernels which take a tensor map are called otherwise than by GCC 4.5
            "-Wno-psabi",
        ),
        # contraction would round differently from one machine to the next; only an explicit fmaf may fuse
        "-ffp-contract=off",
        # two libraries of one process must not share their inline variables
        *("-fno-gnu-unique", "-fno-semantic-interposition"),
        *_processor_flags(),
        *("-Itests/simt/include", "-Icsrc"),
    )


@cache
def _compiler() -> tuple[str, ...]:
    return tuple(shlex.split(os.environ.get("CXX", "g++")))


@cache
def _compiler_version() -> str:
    try:
        return subprocess.run([*_compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            f"The simulator needs a C++20 compiler, and {shlex.join(_compiler())!r} does not run ({error}). "
            "Install g++ 12 or newer, or name another in the environment variable CXX."
        ) from error


@cache
def _processor_flags() -> tuple[str, ...]:
    """Fused multiply-add and half conversion as instructions: the same results as the library's, faster."""
    if platform.machine() != "x86_64":
        return ()
    info = Path("/proc/cpuinfo")
    features = set(info.read_text().split()) if info.exists() else set()
    return tuple(f"-m{feature}" for feature in ("fma", "f16c") if feature in features)


def _produce(
    result: Path, command: list[str], find_inputs: Callable[[], list[Path]], say: Callable[[str], None]
) -> None:
    """Runs the command unless `result` was made by the same command from files of the same content."""
    record = result.with_name(result.name + ".json")
    recipe = [_compiler_version(), *command]
    if result.exists() and record.exists():
        made_by = json.loads(record.read_text())
        if made_by["recipe"] == recipe and all(_digest(p) == d for p, d in made_by["inputs"].items()):
            say(f"up to date: {result.relative_to(ROOT)}")
            return
    result.parent.mkdir(parents=True, exist_ok=True)
    unfinished = result.with_name(result.name + ".new")
    start = time.monotonic()
    finished = subprocess.run([*command, "-o", str(unfinished)], cwd=ROOT, capture_output=True, text=True)
    if finished.returncode != 0:
        raise RuntimeError(
            f"The simulator does not build; this command failed:\n{shlex.join(command)}\n{finished.stderr}"
        )
    inputs = {str(path): _digest(str(path)) for path in find_inputs()}
    # a library in use keeps its file; and nobody ever sees half of one
    unfinished.replace(result)
    record.write_text(json.dumps({"recipe": recipe, "inputs": inputs}))
    say(f"{time.monotonic() - start:5.1f} s: {result.relative_to(ROOT)}\n{finished.stderr}".rstrip())


def _read_dependencies(depfile: Path) -> list[Path]:
    """The project's own files among those that a compiler listed in make's syntax."""
    _, _, listed = depfile.read_text().replace("\\\n", " ").partition(":")
    paths = [Path(ROOT, name) for name in listed.split()]
    return [path for path in paths if path.resolve().is_relative_to(ROOT)]


def _digest(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except FileNotFoundError:
        return ""
