"""What is run where there is a GPU, rehearsed with a pretended one: planted faults, limits, the summary."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import bench.__main__
from fused_cna import ConvProblem, _extension, _tuned, plan_file
from fused_cna.plan import planner
from tests.fake_cuda import environment, write_nvcc
from tests.gpu import fit, hopper, networks, probes, sanitize
from tests.gpu.__main__ import main
from tests.gpu.calls import CALLS, Call, Step
from tests.gpu.plans import kernel_of, list_cases
from tests.gpu.run import LOG_BYTES, run_call
from tests.gpu.summary import MOST_BYTES, summarise

needs_extension = pytest.mark.skipif(
    not _extension.is_available(), reason=f"needs the extension: {_extension.unavailable_reason()}"
)

NOWHERE = Path("/nowhere")

FAULTS = {
    "stem": ("wrong", "differ, the first at [0, 71, 0, 0]: "),
    "grouped": ("lost", "illegal memory access"),
    "small_m": ("dies", "its process ended with status -9"),
    "depthwise": ("hangs", "hangs: nothing for 5 s"),
}
"""Planted in the first plan of these kernels, and what is said of it."""

LOST = {"chosen float16 nhwc x[1, 9, 7, 6]": "lost"}
SPOILED = {"chosen bfloat16 nhwc x[4, 3, 64, 64]": "nan"}
LOST_BY = "tests/test_conformance.py::test_integers_are_exact[cuda-chosen-float16-groups_odd]"


@needs_extension
@pytest.mark.slow
def test_a_first_call_finds_the_faults_and_a_second_runs_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(name: str, faults: dict[str, str], *arguments: str) -> tuple[dict[str, Any], str]:
        """Runs a call whose steps pretend; what is left of them in its JSON, and what it prints."""
        for variable, value in environment(tmp_path, faults).items():
            monkeypatch.setenv(variable, value)
        main([name, str(tmp_path), *arguments])
        return json.loads((tmp_path / f"{name}.json").read_text())["steps"], capsys.readouterr().out

    planted = {kernel: next(case for case in list_cases() if kernel_of(case) == kernel) for kernel in FAULTS}
    faults = {case: FAULTS[kernel][0] for kernel, case in planted.items()}
    limits = {
        "plans": "--limit 1 --patience 5",
        "tests": "-n 1 tests/test_conformance.py -k 'test_integers_are_exact and chosen-float16'",
        "times": "--image 32 --limit 3",
        "networks": "tv/mobilenet_v3_small --times 2 --copies 1",
    }
    more = [argument for step, words in limits.items() for argument in ("--more", step, words)]
    steps, said = call("first", faults | LOST | SPOILED | {"cudnn float16": "refused"}, *more)

    plans = steps["plans"]["result"]
    assert set(plans["wrong"]) == set(faults)
    assert not plans["not_run"]
    for kernel, (_, words) in FAULTS.items():
        why = plans["wrong"][planted[kernel]]
        assert words in why
        assert f"first: {why} [{planted[kernel]}"[:200] in said

    assert list(steps["tests"]["result"]["failed"]) == [LOST_BY]
    assert steps["tests"]["result"]["passed"] > 20, "another worker goes on"
    assert f"1 x {LOST_BY}: " in said

    rows = steps["times"]["result"]["rows"]
    assert sum(row["uses"] for row in rows) == 53
    assert all(len(row["us"]) >= 2 and "find an engine" in row["left_out"]["cudnn"] for row in rows)
    assert f"{len(rows)} of {len(rows)} convolutions" in said
    assert "find an engine" in steps["probes"]["result"]["poisoned_addend"]["error"]
    assert all("error" not in a for n, a in steps["probes"]["result"].items() if n != "poisoned_addend")
    assert steps["probes"]["result"]["hopper"]["text"].startswith("all is as the code assumes")

    compared = steps["networks"]["result"]["rows"]
    wrong = {name.split()[1]: row["wrong"] for name, row in compared.items()}
    assert [precision for precision, why in wrong.items() if why] == ["bf16"]
    assert wrong["bf16"][0].startswith("error inf at (64, 64)")
    assert "3 of 4 right, 0 not run" in said

    again, _ = call("second", {}, "--steps", "plans,tests", "--more", "tests", "-n 0")
    assert [step["status"] for step in again.values()] == [0, 0]
    assert sum(row["right"] for row in again["plans"]["result"]["counts"].values()) == len(faults)
    assert again["tests"]["result"]["passed"] == 1


def python(name: str, text: str, limit: float = 30, **options: Any) -> Step:
    """A step that is a line of Python."""
    return Step(name, ("timeit", "-n1", "-r1", text), limit, **options)


def test_a_call_goes_on_after_failures_and_ends_in_time(tmp_path: Path) -> None:
    steps = (
        python("fails", "raise RuntimeError"),
        python("sleeps", "import time; time.sleep(60)", limit=1),
        python("talks", f"print('x' * {2 * LOG_BYTES}, 'last')", tail=2),
        python("waits", "pass", least=50),
    )
    assert run_call("first", Call(60, steps), tmp_path, NOWHERE) == 1
    done = json.loads((tmp_path / "first.json").read_text())["steps"]
    assert [done[name].get("status") for name in ("fails", "talks", "waits")] == [1, 0, None]
    assert done["sleeps"]["stopped"]
    assert done["talks"]["tail"][-2].endswith("last")
    assert done["waits"]["skipped"].endswith("s are left")
    assert LOG_BYTES < (tmp_path / "first.log").stat().st_size < LOG_BYTES + 10_000


def test_nothing_runs_kernels_where_there_are_none(tmp_path: Path) -> None:
    steps = (
        Step("extension", ("timeit", "raise RuntimeError"), 30, needs_kernels=False),
        python("plans", "pass"),
        python("probes", "pass", needs_kernels=False),
    )
    run_call("first", Call(60, steps), tmp_path, NOWHERE)
    done = json.loads((tmp_path / "first.json").read_text())["steps"]
    assert done["plans"] == {"skipped": "there are no kernels to run"}
    assert done["probes"]["status"] == 0


def test_the_summary_stays_short_whatever_fails() -> None:
    row = {"all": 9, "run": 9, "right": 0}
    names = [f"{kernel} {dtype}" for kernel in "abcdefgh" for dtype in ("float32", "float16", "bfloat16")]
    wrong = {f"{name} nhwc x[1]": "differs " * 40 for name in names}
    plans = {"counts": dict.fromkeys(names, row), "wrong": wrong, "not_run": [], "not_done": ""}
    failed = {f"tests/test_{i}.py::test_it[{i}]": "RuntimeError " * 20 for i in range(200)}
    tests = {"passed": 0, "failed": failed, "seconds": 1}
    ran = {"status": 1, "stopped": True, "seconds": 1.0, "limit": 1.0}
    text = summarise("first", {"plans": ran | {"result": plans}, "tests": ran | {"result": tests}})
    assert len(text.encode()) <= MOST_BYTES
    assert "a float32: 9 of 9 wrong, first: differs" in text
    assert "1 x tests/test_0.py::test_it[0]: RuntimeError" in text
    odd = summarise("first", {"plans": ran | {"result": {"what": 1}}, "tests": ran | {"result": tests}})
    assert "cannot be summed up" in odd
    assert "0 passed, 200 failed" in odd


BENCHED = {f"{n} {s.name}": s.command for n, c in CALLS.items() for s in c.steps if s.command[0] == "bench"}


@pytest.mark.parametrize("command", BENCHED.values(), ids=BENCHED)
def test_the_bench_takes_what_it_is_asked_for(command: tuple[str, ...]) -> None:
    words = [word.format(seconds=100, out="somewhere") for word in command[1:]]
    assert bench.__main__.parser().parse_args(words).budget == 100


def test_a_sanitizer_is_found_beside_nvcc_and_missing_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit, on_path = tmp_path / "toolkit", tmp_path / "bin"
    for folder in (toolkit, on_path):
        folder.mkdir()
    for name in ("nvcc", "compute-sanitizer"):
        (toolkit / name).write_text("#!/bin/sh\n")
        (toolkit / name).chmod(0o755)
    (on_path / "nvcc").symlink_to(toolkit / "nvcc")
    monkeypatch.setenv("PATH", str(on_path))
    assert sanitize.find_tool("compute-sanitizer") == str(toolkit / "compute-sanitizer")
    monkeypatch.setattr(sanitize, "find_tool", lambda name: None)
    for arguments, status in (["9"], 1), (["9", "--optional"], 0):
        monkeypatch.setattr(sys, "argv", ["sanitize", *arguments])
        assert sanitize.main() == status


def test_a_sanitizer_sees_every_kind_before_any_twice() -> None:
    kinds = "aaaaabbbc"
    order = sanitize.in_rounds(kinds)
    assert sorted(order) == list(range(9))
    assert [len({kinds[i] for i in order[:count]}) for count in (3, 9)] == [3, 3]


def test_a_network_is_to_repeat_itself_and_to_outlive_a_lack_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, capped, raised, counted = torch.zeros(1), [1.0], [], iter((0, 1, 0))
    for name, value in {
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 200,
        "get_device_properties": lambda index: SimpleNamespace(total_memory=1000),
        "set_per_process_memory_fraction": capped.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def sound(x: Tensor) -> Tensor:
        if capped[-1] < 1:
            raised.append(capped[-1])
            raise torch.OutOfMemoryError
        return x

    def forgets(x: Tensor) -> Tensor:
        return sound(x) + len(raised)

    assert networks.repeats(sound, x, x, 3) == []
    assert networks.repeats(lambda x: x + next(counted), x, x, 3) == ["1 of 3 runs differ from the first"]
    assert networks.survives(sound, x) == []
    assert raised == [0.18]
    assert networks.survives(forgets, x) == ["it differs after that"]
    assert networks.survives(lambda x: x, x) == ["80% of 0 MiB were enough"]
    assert capped[-1] == 1


def test_times_are_held_against_the_plan_and_the_fastest_are_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target, rows = _tuned.named_target(planner(), "H100"), []
    for n, first in ((32, 10.0), (1, 30.0)):
        problem = planner().problem(ConvProblem(n, 64, 56, 56, 64, 3, 3).question())
        row = {"network": "net", "uses": 2, "problem": problem}
        planned, other, *_ = fit.estimates(target, row)
        rows.append(row | {"us": {planned: first, other: 20.0, "no plan": 1.0}})
    gpu = {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0", "multiprocessors": 132}
    steps = {"extension": {"result": {"gpu": gpu}}, "times": {"result": {"rows": rows}}}
    (tmp_path / "first.json").write_text(json.dumps({"steps": steps}))
    shipped = tmp_path / "plans.json"
    monkeypatch.setattr(sys, "argv", ["fit", str(tmp_path / "first.json"), "--ship", str(shipped)])
    fit.main()
    said = capsys.readouterr().out
    assert "net: 80.0 us as chosen, 60.0 us at best, regret 33.3%; of 2 convolutions" in said
    ((device, _),) = plan_file.read(shipped)
    assert device == plan_file.Device("NVIDIA H100 80GB HBM3", "9.0", 132)
    (plans,) = plan_file.read(shipped).values()
    assert [plan.plan for plan in plans.values()] == [other]
    assert _tuned.set_plan(planner(), target, *plans.values()) == ""
    planner().clear_tuned_plans()


def ask_hopper(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), **answers: str
) -> tuple[int, str]:
    """The status of a call of this probe alone, and its text, where the hardware answers so."""
    write_nvcc(folder, **answers)
    gpu = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(hopper, "find_tool", lambda name: str(folder / name))
    monkeypatch.setattr(probes, "PROBES", (hopper.hopper,))
    status = probes.main(folder / "result.json")
    return status, json.loads((folder / "result.json").read_text())["hopper"]["text"]


@pytest.mark.parametrize(
    ("answers", "failures"),
    [
        ({"tf32_map": "rounded away"}, "all is as the code assumes; maps of tf32: rounded away"),
        (
            {"corner_order": "height first"},
            "corner_order height first (1 of 1): change corners_begin_with_w; ",
        ),
        (
            {"products_float16_n32": "wrong", "products_float32_n32": "wrong"},
            "products_float16_n32 wrong, products_float32_n32 wrong (2 of 3): change maps_bring_operands; ",
        ),
        ({"clusters": "hangs"}, "clusters hangs: "),
        ({"tf32": "fails"}, "tf32 fails: "),
    ],
)
def test_the_hopper_probe_says_what_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: dict[str, str], failures: str
) -> None:
    status, text = ask_hopper(tmp_path, monkeypatch, **answers)
    assert text.startswith(failures)
    assert status == (not text.startswith("all is"))


def test_the_hopper_probe_needs_a_hopper_and_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask_hopper(tmp_path, monkeypatch, (8, 0)) == (0, "not asked: compute capability 8.0 is not 9.0")
    assert ask_hopper(tmp_path, monkeypatch)[0] == 0
    monkeypatch.setattr(hopper, "find_tool", lambda name: None)
    assert probes.main(tmp_path / "result.json") == 1
    assert "there is no nvcc" in (tmp_path / "result.json").read_text()


def test_a_hopper_probe_that_hangs_keeps_its_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\necho \'"registers": {"answer": "right", "seen": ""},\'\nsleep 60\n')
    program.chmod(0o755)
    monkeypatch.setattr(hopper, "LIMIT", 0.5)
    assert hopper.answers_in(hopper.run_program([str(program)]))["registers"]["answer"] == "right"


def test_the_hopper_probe_is_judged_by_the_constants() -> None:
    right = {one.questions: {"answer": one.word, "seen": ""} for one in hopper.ASSUMPTIONS}
    constants = (hopper.ROOT / hopper.CONSTANTS).read_text()
    named = [one.change for one in hopper.ASSUMPTIONS if one.change.isidentifier()]
    assert sorted(re.findall(r"constexpr bool (\w+)", constants)) == sorted(named)
    swapped = constants.replace("corners_begin_with_w = true", "corners_begin_with_w = false")
    assert hopper.contradictions(right, swapped) == [
        "corner_order width first: corners_begin_with_w need not be false"
    ]
    other = right | {"corner_order": {"answer": "height first", "seen": ""}}
    assert hopper.contradictions(other, swapped) == []
    del right["registers"]
    assert hopper.contradictions(right, constants) == ["registers: no answer"]


@pytest.mark.skipif(hopper.find_tool("nvcc") is None, reason="needs nvcc")
def test_the_hopper_probe_compiles(tmp_path: Path) -> None:
    program = tmp_path / "probe"
    assert hopper.run_program(hopper.compilation(str(hopper.find_tool("nvcc")), program)) == ""
    assert program.is_file()
