"""Pretends, on a CPU, that there is a GPU: rehearses all the Python around the kernels.

What is asked for on cuda lies in the CPU's memory and says that it is on the GPU. The operator computes the
formula in float64 and rounds once, as a right kernel would, whatever plan is forced; faults can be planted.

`environment` makes every Python process that it is given to pretend.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch._dynamo  # before anything is replaced, as its annotations name some of it
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fused_cna import _extension, eager, ops
from fused_cna.plan import planner
from tests.gpu.hopper import ASSUMPTIONS
from tests.plans import describe

FAULTS = "FUSED_CNA_FAKE_FAULTS"
"""An environment variable: {case: fault} as JSON.

A case is the beginning of what tests.plans.describe says. Faults are wrong, nan, refused, lost (an
illegal access, after which nothing works any more), hangs and dies.
"""

LIKE = "H100"
CPU = torch.device("cpu")
IS_CUDA = Tensor.is_cuda.__get__  # type: ignore[attr-defined]


def environment(folder: Path, faults: Mapping[str, str] | None = None) -> dict[str, str]:
    """What makes processes pretend; `folder` is for a file that Python runs first, and for an nvcc."""
    root = Path(__file__).resolve().parents[1]
    (folder / "sitecustomize.py").write_text("import tests.fake_cuda as fake\n\nfake.install()\n")
    write_nvcc(folder)
    return {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{folder}{os.pathsep}{root}",
        FAULTS: json.dumps(faults or {}),
        "TRITON_INTERPRET": "1",
    }


def write_nvcc(folder: Path, **others: str) -> None:
    """An nvcc whose programs give the answers that the Hopper kernel assumes, but for some."""
    words = {one.questions: one.word for one in ASSUMPTIONS} | others
    lines = [f'"{name}": {{"answer": "{word}", "seen": ""}}' for name, word in words.items()]
    (folder / "answers.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    (folder / "program").write_text(f"#!/bin/sh\ncat {folder}/answers.json\n")
    (folder / "nvcc").write_text(f'#!/bin/sh\nfor made; do :; done\ncp {folder}/program "$made"\n')
    for name in ("program", "nvcc"):
        (folder / name).chmod(0o755)


class Device:
    """The state of the pretended GPU."""

    lost = False
    memory = 1.0
    """The part of it that may be used: no call of the operator has enough of less than all."""

    def check(self, *ignored: object) -> None:
        if self.lost:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


DEVICE = Device()


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self, *stream: object) -> None:
        DEVICE.check()
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        DEVICE.check()

    def elapsed_time(self, end: Event) -> float:
        return max((end.at - self.at) * 1e3, 1e-6)


class Stream:
    def __init__(self, *ignored: object) -> None:
        pass

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass

    def synchronize(self) -> None:
        DEVICE.check()


class Graph:
    """Remembers nothing: what was computed at the capture stays as it is."""

    def replay(self) -> None:
        DEVICE.check()


@contextlib.contextmanager
def captured(*ignored: object, **options: object) -> Iterator[None]:
    yield


def on_cpu(value: object) -> object:
    # By exact types, because a proxy of a trace may not be asked for its class.
    if type(value) is torch.device:
        return CPU if value.type == "cuda" else value
    return CPU if type(value) is str and value.partition(":")[0] == "cuda" else value


class OnCpu(TorchFunctionMode):
    """Puts on the CPU what is asked for on cuda, where every tensor says that it is on cuda."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        if func == IS_CUDA:
            return True
        if func in (Tensor.cuda, Tensor.cpu):
            DEVICE.check()
            return args[0].clone()
        if func in (torch.cudnn_convolution_relu, torch.cudnn_convolution_add_relu):
            return cudnn_convolution(*args)
        return func(*map(on_cpu, args), **{name: on_cpu(value) for name, value in kwargs.items()})


def cudnn_convolution(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    *addend, bias, stride, padding, dilation, groups = rest
    y = torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return (y.add_(addend[0], alpha=addend[1]) if addend else y).relu_()


def forced() -> str:
    extension = _extension.module()
    name: str = extension.force_plan("")
    extension.force_plan(name)
    return name


_kept: list[torch.library.Library] = []  # what it registers goes with it
_computed: list[tuple[list[Tensor], Tensor]] = []


def formula(arguments: tuple[Any, ...]) -> Tensor:
    """The formula rounded once; for a large problem once for all plans that are tried one after the other."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    for known, y in tuple(_computed):
        if len(known) == len(tensors) and all(map(_is_same, known, tensors)):
            return y.clone()
    wide = [a.double() if isinstance(a, Tensor) else a for a in arguments]
    x, weight = arguments[0], arguments[1]
    y = ops._empty_output(x, weight, ops.check_arguments(*arguments)).copy_(eager.conv_norm_act(*wide))
    if x.numel() > 1 << 16:
        _computed.append((tensors, y.clone()))
        del _computed[:-4]
    return y


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


def run_operator(*arguments: Any) -> Tensor:
    DEVICE.check()
    if DEVICE.memory < 1:
        raise torch.OutOfMemoryError("CUDA out of memory")
    x, weight = arguments[0], arguments[1]
    case = describe(forced(), x, weight)
    fault = next((f for start, f in json.loads(os.environ[FAULTS]).items() if case.startswith(start)), "")
    if fault == "refused":
        raise RuntimeError("GET was unable to find an engine to execute this computation")
    if fault == "hangs":
        time.sleep(3600)
    if fault == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    y = formula(arguments)
    if fault == "lost":
        DEVICE.lost = True
    if fault in ("wrong", "nan"):
        y[0, -1, 0, 0] += 1 if fault == "wrong" else float("nan")
    return y


def run_out_operator(*arguments: Any) -> None:
    *given, out = arguments
    ops._check_all(given, out)
    out.copy_(run_operator(*given))


class Extension:
    """The extension, but for what it asks the driver."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def device(self, index: int) -> object:
        return planner().device(LIKE)


def install() -> None:
    """From now on there is a GPU in this process."""
    info = planner().device(LIKE)
    capability = (info["compute_major"], info["compute_minor"])
    properties = SimpleNamespace(
        name=f"pretended {LIKE}",
        major=capability[0],
        minor=capability[1],
        multi_processor_count=2,
        total_memory=1 << 30,
        L2_cache_size=1 << 10,
    )
    replaced: dict[str, Callable[..., object] | type] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *device: properties,
        "get_device_name": lambda *device: properties.name,
        "get_device_capability": lambda *device: capability,
        "mem_get_info": lambda *device: (1 << 29, 1 << 30),
        "synchronize": DEVICE.check,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 1 << 20,
        "set_per_process_memory_fraction": lambda part: setattr(DEVICE, "memory", part),
        "device": lambda *device: contextlib.nullcontext(),
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "set_stream": lambda stream: None,
        "graph_pool_handle": lambda: None,
        "graph": captured,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    generator = torch.Generator
    torch.Generator = lambda *device, **named: generator()  # type: ignore[assignment, misc]
    torch.nn.Module.cuda = lambda module, *device: module  # type: ignore[assignment]
    if _extension.is_available():
        _extension._module = Extension(_extension.module())  # type: ignore[assignment]
    library = torch.library.Library("fused_cna", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl("conv_norm_act", run_operator, "CPU", allow_override=True)
        library.impl("conv_norm_act_out", run_out_operator, "CPU", allow_override=True)
    _kept.append(library)
    run = threading.Thread.run

    def run_pretending(thread: threading.Thread) -> None:
        with OnCpu():
            run(thread)

    threading.Thread.run = run_pretending  # type: ignore[method-assign]
    OnCpu().__enter__()


# It stands for torch, whose own code is not looked at while a network is traced.
__name__ = "torch.fake_cuda"
