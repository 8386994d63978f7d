"""The file of tuned plans: merged, replaced whole, safe with several processes, and never trusted."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_cna
from fused_cna import PlanFileError, PlanFileWarning, plan_file
from fused_cna.plan import planner
from fused_cna.plan_file import Device, TunedPlan, problem_key

H100 = Device("NVIDIA H100 80GB HBM3", "9.0", 132)
A100 = Device("NVIDIA A100-SXM4-80GB", "8.0", 108)


pytestmark = pytest.mark.filterwarnings("error::fused_cna.PlanFileWarning")


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_file, "_warned", set())


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test keeps its plans."""
    place = tmp_path / "cache" / "plans.json"
    monkeypatch.setenv(plan_file.VARIABLE, str(place))
    return place


def tuned(n: int, plan: str = "direct 64x64x32", microseconds: float = 5.0) -> TunedPlan:
    """A plan for a problem that is told apart by its batch size."""
    return TunedPlan(problem_key(planner().problem(sized(n).question())), plan, microseconds)


def sized(n: int) -> fused_cna.ConvProblem:
    return fused_cna.ConvProblem(n, 64, 56, 56, 64, 3, 3, padding=1)


def written(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_the_default_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(plan_file.VARIABLE, str(tmp_path / "mine.json"))
    assert plan_file.default_path() == tmp_path / "mine.json"
    monkeypatch.setenv(plan_file.VARIABLE, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert plan_file.default_path() == tmp_path / "fused_cna" / "plans.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative, and so to be ignored")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert plan_file.default_path() == tmp_path / "home" / ".cache" / "fused_cna" / "plans.json"


def test_no_home_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(plan_file.VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(PlanFileError, match="set FUSED_CNA_PLAN_FILE"):
        plan_file.default_path()
    with pytest.warns(PlanFileWarning, match="home directory"):
        assert plan_file.plans_for(H100) == {}


def test_what_is_added_is_read_again(path: Path) -> None:
    assert plan_file.read(path) == {}
    first, second = tuned(1), tuned(2, "cudnn", 7.25)
    plan_file.add(path, H100, [first, second])
    assert plan_file.plans_for(H100) == {first.problem: first, second.problem: second}
    assert [p.name for p in path.parent.iterdir() if p != path] == ["plans.json.lock"]


def test_adding_keeps_what_is_there_and_replaces_the_same_problem(path: Path) -> None:
    plan_file.add(path, H100, [tuned(1), tuned(2)])
    plan_file.add(path, A100, [tuned(1, "direct 128x8x32")])
    plan_file.add(path, H100, [tuned(2, "direct 256x1x16", 3.0), tuned(3)])
    on_h100 = {dict(key)["n"]: plan for key, plan in plan_file.plans_for(H100).items()}
    assert {n: plan.plan for n, plan in on_h100.items()} == {
        1: "direct 64x64x32",
        2: "direct 256x1x16",
        3: "direct 64x64x32",
    }
    assert on_h100[2].microseconds == 3.0
    assert [plan.plan for plan in plan_file.plans_for(A100).values()] == ["direct 128x8x32"]


def test_another_version_has_plans_of_its_own(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_file.add(path, H100, [tuned(1)])
    monkeypatch.setattr(plan_file, "__version__", "99.0.0")
    assert plan_file.plans_for(H100) == {}
    plan_file.add(path, H100, [tuned(1, "cudnn")])
    assert [plan.plan for plan in plan_file.plans_for(H100).values()] == ["cudnn"]
    monkeypatch.undo()
    assert len(plan_file.read(path)) == 2


@pytest.mark.parametrize(
    ("wanted", "known", "stands"),
    [
        (H100, H100, True),
        (Device("H100", "9.0", 132), H100, True),
        (Device("H100", "9.0", 132), Device("NVIDIA H100 PCIe", "9.0", 114), False),
        (Device("H100", "9.0", 132), Device("NVIDIA H200", "9.0", 132), False),
        (Device("A100", "8.0", 108), A100, True),
        (Device("L4", "8.9", 58), Device("NVIDIA L40", "8.9", 58), False),
        (Device("RTX 4090", "8.9", 128), Device("NVIDIA GeForce RTX 4090", "8.9", 128), True),
        (H100, Device("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "9.0", 16), False),
        (Device("H100", "9.0", 132), Device("NVIDIA H100 80GB HBM3", "8.0", 132), False),
    ],
)
def test_devices_are_told_apart(wanted: Device, known: Device, stands: bool) -> None:
    assert wanted.stands_for(known) is stands


def section(plan: bytes, more_of_device: bytes = b"") -> bytes:
    """A file with one section."""
    device = b'{"name": "x", "compute_capability": "9.0", "multiprocessors": 1' + more_of_device + b"}"
    return (
        b'{"format": "fused_cna tuned plans", "format_version": 1, "sections": [{"device": '
        + device
        + b', "version": "1", "plans": ['
        + plan
        + b"]}]}"
    )


DAMAGED: dict[str, bytes] = {
    "half of it": b'{"format": "fused_cna tuned plans", "format_ver',
    "no JSON": b"plans",
    "no text": b"\xff\xfe\x00\x80",
    "another JSON": b'{"cache": [1, 2, 3]}',
    "a list": b"[]",
    "a newer format": b'{"format": "fused_cna tuned plans", "format_version": 2, "sections": []}',
    "sections that are none": b'{"format": "fused_cna tuned plans", "format_version": 1, "sections": [3]}',
    "a plan that is a number": section(b'{"problem": {"n": 1}, "plan": 4, "microseconds": 1}'),
    "a problem with a list": section(b'{"problem": {"n": [1]}, "plan": "direct", "microseconds": 1}'),
    "a time that is none": section(b'{"problem": {"n": 1}, "plan": "direct", "microseconds": "short"}'),
    "a device with too much": section(b"", b', "colour": 1'),
    "too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_or_foreign_file_is_ignored_with_one_warning(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.warns(PlanFileWarning, match=r"tuned plans are ignored: .*plans\.json"):
        assert plan_file.plans_for(H100) == {}
    assert plan_file.plans_for(H100) == {}  # a second warning would be an error
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_or_foreign_file_is_set_aside_before_a_new_one_is_written(
    path: Path, content: bytes
) -> None:
    for number in (1, 2):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        aside = path.with_name(f"plans.json.unusable-{number}")
        with pytest.warns(PlanFileWarning, match=rf"it is now .*{aside.name}"):
            plan_file.add(path, H100, [tuned(1)])
        assert aside.read_bytes() == content
        assert len(plan_file.plans_for(H100)) == 1


def test_an_empty_file_is_a_file_without_plans(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plan_file.plans_for(H100) == {}
        plan_file.add(path, H100, [tuned(1)])
    assert len(plan_file.plans_for(H100)) == 1


def test_a_compiler_is_not_warned(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.parent.mkdir()
    path.write_text("broken")
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert plan_file.plans_for(H100) == {}
    with pytest.warns(PlanFileWarning):
        plan_file.plans_for(H100)


def below_a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file" / "plans.json"


def a_folder(folder: Path) -> Path:
    (folder / "plans.json").mkdir()
    return folder / "plans.json"


def a_device(folder: Path) -> Path:
    return Path(os.devnull)


def in_a_folder_without_permission(folder: Path) -> Path:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    (folder / "locked").mkdir(mode=0o500)
    return folder / "locked" / "plans.json"


@pytest.mark.parametrize("make", [below_a_file, a_folder, a_device, in_a_folder_without_permission])
def test_where_nothing_can_be_written_is_said_beforehand(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    where = make(tmp_path)
    for attempt in (lambda: plan_file.check_writable(where), lambda: plan_file.add(where, H100, [tuned(1)])):
        with pytest.raises(PlanFileError, match=r"cannot be written to .*set FUSED_CNA_PLAN_FILE to a file"):
            attempt()


def test_what_cannot_be_read_is_not_replaced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_file.add(path, H100, [tuned(1)])
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", raising(OSError(errno.EACCES, "Permission denied")))
        with pytest.raises(PlanFileError, match="Permission denied"):
            plan_file.add(path, H100, [tuned(2)])
        with pytest.warns(PlanFileWarning, match="cannot be read"):
            assert plan_file.plans_for(H100) == {}
    assert path.read_bytes() == before


def raising(error: Exception) -> Callable[..., Any]:
    def function(*args: object, **kwargs: object) -> None:
        raise error

    return function


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_on_the_way_leaves_the_old_file(
    path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_file.add(path, H100, [tuned(1)])
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, step, raising(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(PlanFileError, match="No space left"):
            plan_file.add(path, H100, [tuned(2)])
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["plans.json", "plans.json.lock"]


def test_a_link_stays_a_link_and_permissions_stay(path: Path, tmp_path: Path) -> None:
    real = tmp_path / "elsewhere" / "real.json"
    path.parent.mkdir()
    path.symlink_to(real)
    plan_file.add(path, H100, [tuned(1)])
    real.chmod(0o640)
    plan_file.add(path, H100, [tuned(2)])
    assert path.is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert len(plan_file.plans_for(H100)) == 2


WRITERS, ADDITIONS = 5, 6


def add_slowly(path: Path, writer: int) -> None:
    """Adds plans one by one, and takes its time between reading the file and replacing it."""
    replace = plan_file._replace

    def replace_later(place: Path, text: str) -> None:
        time.sleep(0.005)
        replace(place, text)

    plan_file._replace = replace_later
    for i in range(ADDITIONS):
        plan_file.add(path, H100, [TunedPlan((("n", writer * ADDITIONS + i),), "direct", 1.0)])


def test_several_processes_lose_nothing_and_never_see_half_a_file(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=add_slowly, args=(path, writer)) for writer in range(WRITERS)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        plan_file.read(path)
    assert [writer.exitcode for writer in writers] == [0] * WRITERS
    (plans,) = plan_file.read(path).values()
    assert {dict(key)["n"] for key in plans} == set(range(WRITERS * ADDITIONS))


def test_neither_the_import_nor_a_cpu_reads_the_file(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("broken")
    program = (
        "import torch, fused_cna; "
        "fused_cna.ConvNormAct(3, 4).eval()(torch.ones(1, 3, 8, 8)); "
        "fused_cna.conv_norm_act(torch.ones(1, 3, 8, 8), torch.ones(4, 3, 3, 3))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::fused_cna.PlanFileWarning", "-c", program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "PlanFileWarning" not in done.stderr


def test_plans_of_the_package_come_below_those_of_the_user(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "package" / "plans"
    plan_file.add(shipped / "h100.json", H100, [tuned(1, "direct 128x8x32"), tuned(2)])
    plan_file.add(path, H100, [tuned(1, "cudnn")])
    monkeypatch.setattr(plan_file, "__file__", str(tmp_path / "package" / "plan_file.py"))
    plans = {dict(key)["n"]: plan.plan for key, plan in plan_file.plans_for(H100).items()}
    assert plans == {1: "cudnn", 2: "direct 64x64x32"}
