"""The job that times first calls in fresh processes: with processes that are faked, and one that is not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cli, first_call, first_call_process, jobs, terminal
from tests.bench_cases import setting


class Processes:
    """Answers of processes that are not started; the request is remembered."""

    def __init__(self, failing: str = "") -> None:
        self.requests: list[dict[str, Any]] = []
        self.failing = failing

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        self.requests.append(json.loads(json.dumps(request)))
        if request["route"] == self.failing:
            raise RuntimeError("out of memory")
        seconds = {name: float(index + 1) for index, name in enumerate(first_call.STEPS)}
        return {"seconds": seconds, "recompiled": request["route"] == "compiled"}


def test_every_route_of_every_network_in_its_processes() -> None:
    processes, steps = Processes(), []
    results = first_call.run(setting(), steps.append, processes)
    turn = [f"{n}, {r}" for r in ("eager", "fused", "compiled") for n in first_call.NETWORKS]
    assert steps == [*turn, *turn[:4], *turn[:4]]
    assert len(processes.requests) == len(steps) == first_call.most_steps(setting())
    assert processes.requests[0] == {
        "network": "resnet50",
        "route": "eager",
        "device": "cpu",
        "precision": "fp32",
        "batch": 2,
        "sizes": [224, 256],
        "seed": 0,
    }
    written = json.loads(json.dumps([one.as_json() for one in results]))
    assert written[-1]["seconds"]["new size"]["median"] == 5.0
    assert [one["recompiled"] for one in written] == [False] * 4 + [True] * 2


def test_networks_and_compiling_are_chosen() -> None:
    chosen = first_call.cases(setting(networks=("densenet121",), compiled=False))
    assert chosen == [("densenet121", "eager"), ("densenet121", "fused")]
    assert first_call.run(setting(budget=1e-9), lambda name: None, Processes()) == []


@pytest.mark.parametrize(("failing", "status"), [("", 0), ("fused", 1), ("compiled", 0)])
def test_the_job_writes_and_prints(
    failing: str,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("torchvision", reason="the networks are torchvision's")
    run = first_call.run
    monkeypatch.setattr(first_call, "run", lambda made, step: run(made, step, Processes(failing)))
    console = terminal.make_console()
    assert jobs.run(setting(), ("first-call",), tmp_path, [], console) == status
    written = json.loads((tmp_path / "first-call.json").read_text())
    assert written["provenance"]["torch"]
    assert len(written["first-call"]["results"]) == 6
    said = capsys.readouterr().out
    assert ("out of memory" in said) == bool(failing)
    assert ("5.0 s *" in said) == (failing != "compiled")
    assert "first call of resnet50, and of a new size: eager 3.0 s and 5.0 s" in said


def test_it_is_run_only_where_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[tuple[str, ...]] = []
    monkeypatch.setattr(cli, "run", lambda setting, names, *rest: ran.append(names))
    for arguments in ([], ["first-call"]):
        cli.main([*arguments, "--device", "cpu", "--out", str(tmp_path)])
    assert ran == [tuple(name for name in jobs.JOBS if name != "first-call"), ("first-call",)]


@pytest.mark.parametrize("route", ["eager", "fused"])
def test_a_process_times_every_step(route: str) -> None:
    pytest.importorskip("torchvision", reason="the networks are torchvision's")
    request = {"network": "mobilenet_v2", "route": route, "device": "cpu", "precision": "fp32"}
    answer = first_call.start_process({**request, "batch": 1, "sizes": [32, 64], "seed": 0})
    assert list(answer["seconds"]) == list(first_call.STEPS)
    assert min(answer["seconds"].values()) > 0
    assert not answer["recompiled"]


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'route'"):
        first_call.start_process({})


def test_compiled_graphs_are_counted(fresh_dynamo: None) -> None:
    before = first_call_process.compiled_graphs()
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    assert first_call_process.compiled_graphs() == before + 1
