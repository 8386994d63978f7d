"""The file that keeps tuned plans: JSON, by device, version of this library, and convolution problem.

Several processes may read and write it at once: it is replaced whole, by a rename, and whoever adds to it
holds a lock from reading it to replacing it.
"""

import contextlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fused_cna._version import __version__
from fused_cna.config import PlanFileWarning

try:
    import fcntl
except ImportError:  # not on this system; two processes that write in the same moment may then lose plans
    fcntl = None  # type: ignore[assignment]

VARIABLE = "FUSED_CNA_PLAN_FILE"
FORMAT = "fused_cna tuned plans"
FORMAT_VERSION = 1

Problem = Mapping[str, int | str | bool]
ProblemKey = tuple[tuple[str, int | str | bool], ...]


class PlanFileError(RuntimeError):
    """A plan file that cannot be read or written, or does not hold what it should; the message says which."""


@dataclass(frozen=True)
class Device:
    """A GPU, as far as plans for one are plans for another."""

    name: str
    compute_capability: str
    multiprocessors: int

    def stands_for(self, other: "Device") -> bool:
        """Whether plans for ``other`` are plans for this one: it is the same, or this is its name for short.

        The planner's "H100" stands for "NVIDIA H100 80GB HBM3", not for an H100 with fewer multiprocessors.
        """
        return (
            self.compute_capability == other.compute_capability
            and self.multiprocessors == other.multiprocessors
            and re.search(rf"(?<!\w){re.escape(self.name)}(?!\w)", other.name) is not None
        )


@dataclass(frozen=True)
class TunedPlan:
    """The plan that was the fastest for a problem, by its full name, and the time measured."""

    problem: ProblemKey
    plan: str
    microseconds: float


Sections = dict[tuple[Device, str], dict[ProblemKey, TunedPlan]]
"""The plans of a file, by device and version of the library, and within by problem."""


def problem_key(problem: Problem) -> ProblemKey:
    """The planner's dict of a problem, hashable."""
    return tuple(sorted(problem.items()))


def default_path() -> Path:
    """``FUSED_CNA_PLAN_FILE``, else ``fused_cna/plans.json`` in the user's cache folder.

    Raises:
        PlanFileError: neither is set and there is no home directory.
    """
    if given := os.environ.get(VARIABLE):
        return Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(cache):
        return Path(cache, "fused_cna", "plans.json")
    try:
        return Path.home() / ".cache" / "fused_cna" / "plans.json"
    except RuntimeError as error:
        raise PlanFileError(
            f"there is no place for tuned plans ({error}); set {VARIABLE} to the path of a file"
        ) from error


def read(path: Path) -> Sections:
    """The plans in a file; none where it does not exist or is empty.

    Raises:
        PlanFileError: it cannot be read, is damaged, or is no plan file of this format.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise PlanFileError(f"{path} cannot be read ({error})") from error
    if not text.strip():
        return {}
    try:
        return _parse(json.loads(text))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise PlanFileError(f"{path} is damaged or no file of tuned plans ({error!r})") from error


def plans_for(device: Device) -> dict[ProblemKey, TunedPlan]:
    """The plans for a device in this version: those that came with the package, and over them the user's.

    A file that cannot be used is warned about once, and counts as empty.
    """
    plans: dict[ProblemKey, TunedPlan] = {}
    for path in (*sorted(Path(__file__).with_name("plans").glob("*.json")), None):
        try:
            sections = read(default_path() if path is None else path)
        except PlanFileError as error:
            warn_once(f"tuned plans are ignored: {error}")
            continue
        for (known, version), section in sections.items():
            if version == __version__ and device.stands_for(known):
                plans.update(section)
    return plans


def add(path: Path, device: Device, plans: Iterable[TunedPlan]) -> None:
    """Adds plans of this version to a file, over older ones for the same problems; all else in it stays.

    A file that is damaged or foreign is renamed, with a warning, before a new one takes its place.

    Raises:
        PlanFileError: it cannot be read or written. It is then as it was.
    """
    try:
        path = _place(path)
        with _locked(path):
            sections = _read_or_set_aside(path)
            sections.setdefault((device, __version__), {}).update({plan.problem: plan for plan in plans})
            _replace(path, _format(sections))
    except OSError as error:
        raise _not_writable(path, error) from error


def check_writable(path: Path) -> None:
    """Raises the PlanFileError that ``add`` would, as far as that can be known beforehand."""
    try:
        path = _place(path)
        with _locked(path):
            trial = _unfinished(path)
            trial.touch()
            trial.unlink()
    except OSError as error:
        raise _not_writable(path, error) from error


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Gives a PlanFileWarning, each message once in a process; none to a compiler, which would refuse it."""
    if message in _warned or torch.compiler.is_compiling():
        return
    _warned.add(message)
    warnings.warn(f"fused_cna: {message}", PlanFileWarning, stacklevel=3)


def _not_writable(path: Path, error: OSError) -> PlanFileError:
    return PlanFileError(
        f"tuned plans cannot be written to {path} ({error}); "
        f"make it writable, or set {VARIABLE} to a file that is"
    )


def _parse(content: Any) -> Sections:
    if content["format"] != FORMAT or content["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"its format is {content['format']!r} version {content['format_version']!r}, "
            f"not {FORMAT!r} version {FORMAT_VERSION}"
        )
    sections: Sections = {}
    for section in content["sections"]:
        device = _checked(Device(**section["device"]))
        plans = sections.setdefault((device, _text(section["version"])), {})
        for plan in section["plans"]:
            key = problem_key(plan["problem"])
            if not all(isinstance(value, (int, str)) for _, value in key):
                raise TypeError(f"the problem {plan['problem']} has something else than numbers and words")
            plans[key] = TunedPlan(key, _text(plan["plan"]), float(plan["microseconds"]))
    return sections


def _checked(device: Device) -> Device:
    _text(device.name)
    _text(device.compute_capability)
    if not isinstance(device.multiprocessors, int):
        raise TypeError(f"{device.multiprocessors!r} is no number of multiprocessors")
    return device


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _format(sections: Sections) -> str:
    """One plan a line, in a fixed order, so that people and diffs can read it."""
    texts = []
    for (device, version), plans in sorted(sections.items(), key=lambda item: repr(item[0])):
        rows = [
            json.dumps({"problem": dict(plan.problem), "plan": plan.plan, "microseconds": plan.microseconds})
            for plan in sorted(plans.values(), key=lambda plan: repr(plan.problem))
        ]
        head = f'  {{"device": {json.dumps(asdict(device))}, "version": {json.dumps(version)}, "plans": ['
        texts.append(head + ",".join(f"\n    {row}" for row in rows) + "\n  ]}")
    head = f'{{\n"format": {json.dumps(FORMAT)},\n"format_version": {FORMAT_VERSION},\n"sections": [\n'
    return head + ",\n".join(texts) + "\n]\n}\n"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(f"{path}.lock", "a") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read_or_set_aside(path: Path) -> Sections:
    try:
        return read(path)
    except PlanFileError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        number = 1
        while os.path.lexists(aside := Path(f"{path}.unusable-{number}")):
            number += 1
        os.replace(path, aside)
        warn_once(f"{error}; it is now {aside}, and a new file takes its place")
        return {}


def _place(path: Path) -> Path:
    """Where the file really is, with its folder there."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError("it is no regular file")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _unfinished(path: Path) -> Path:
    return Path(f"{path}.{os.getpid()}.new")


def _replace(path: Path, text: str) -> None:
    """Writes a file beside and renames it, so that nobody ever sees half of one, whatever happens."""
    unfinished = _unfinished(path)
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.chmod(unfinished, path.stat().st_mode & 0o777)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
