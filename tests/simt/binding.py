"""The simulator's C functions, called through ctypes: nothing compiled depends on torch or Python."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.simt.build import build

SUCCEEDED, LAUNCH_REFUSED, KERNEL_AT_FAULT = 0, 1, 2

CONV = "conv"
"""The target whose kernels `run_conv` runs."""

VECTORS = ("bias", "norm_weight", "norm_bias", "running_mean", "running_var")


class SimulatorError(RuntimeError):
    """A simulated kernel broke a rule of the machine; the message is the report."""


class TensorView(ctypes.Structure):
    """A tensor as a kernel gets it: an address, sizes, and strides in elements."""

    _fields_ = (("data", ctypes.c_void_p), ("sizes", ctypes.c_int64 * 4), ("strides", ctypes.c_int64 * 4))


class ConvCall(ctypes.Structure):
    """One call of the operator, laid out as in host/conv_call.h."""

    _fields_ = (
        ("x", TensorView),
        ("weight", TensorView),
        ("dense_x", TensorView),
        ("dense_weight", TensorView),
        ("residual", TensorView),
        ("y", TensorView),
        ("vectors", ctypes.c_void_p * len(VECTORS)),
        ("eps", ctypes.c_double),
        ("act_param", ctypes.c_double),
        ("stride", ctypes.c_int64 * 2),
        ("padding", ctypes.c_int64 * 4),
        ("dilation", ctypes.c_int64 * 2),
        ("groups", ctypes.c_int64),
        ("seed", ctypes.c_int64),
        ("norm_is_float32", ctypes.c_int64),
        ("allow_tf32", ctypes.c_int64),
        ("starts_early", ctypes.c_int64),
        ("dtype", ctypes.c_char * 16),
        ("act", ctypes.c_char * 16),
        ("residual_order", ctypes.c_char * 16),
        ("device", ctypes.c_char * 16),
        ("plan", ctypes.c_char * 128),
    )


class PlanText(ctypes.Structure):
    """What C says of a plan, laid out as in host/conv_call.h."""

    _fields_ = (
        ("convert_x", ctypes.c_int64),
        ("convert_weight", ctypes.c_int64),
        ("text", ctypes.c_char * 256),
    )


@dataclass(frozen=True)
class Plan:
    """How a call will run, and what has to be copied to dense channels_last before."""

    text: str
    convert_x: bool
    convert_weight: bool


_built = cache(build)


@cache
def _load(target: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(_built(target)))


def _load_conv() -> ctypes.CDLL:
    library = _load(CONV)
    if library.simt_conv_call_bytes() != ctypes.sizeof(ConvCall):
        raise RuntimeError("ConvCall of binding.py is not laid out as in host/conv_call.h; make them agree")
    return library


def _raise_unless_ok(status: int, error: ctypes.Array[ctypes.c_char]) -> None:
    if status == SUCCEEDED:
        return
    message = error.value.decode(errors="replace")
    raise (SimulatorError if status == KERNEL_AT_FAULT else RuntimeError)(message)


def plan_conv(call: ConvCall) -> Plan:
    """The plan that `call` names, or that would be chosen, for x and the weight as they lie in memory.

    Raises:
        RuntimeError: there is no such plan or device.
    """
    plan = PlanText()
    error = ctypes.create_string_buffer(1 << 14)
    status = _load_conv().simt_plan_conv(
        ctypes.byref(call), ctypes.byref(plan), error, ctypes.c_int64(len(error))
    )
    _raise_unless_ok(status, error)
    return Plan(plan.text.decode(), bool(plan.convert_x), bool(plan.convert_weight))


def list_plans(call: ConvCall) -> list[str]:
    """The names of all plans that could run `call`, the fastest by estimate first."""
    names, error = ctypes.create_string_buffer(1 << 16), ctypes.create_string_buffer(1 << 14)
    status = _load_conv().simt_list_plans(
        ctypes.byref(call), names, ctypes.c_int64(len(names)), error, ctypes.c_int64(len(error))
    )
    _raise_unless_ok(status, error)
    return names.value.decode().splitlines()


def run_conv(call: ConvCall) -> None:
    """Runs the operator's kernel on the tensors that `call` points to, copies that the plan wants among them.

    Raises:
        SimulatorError: the kernel broke a rule.
        RuntimeError: there is no such plan, or the launch was refused.
    """
    error = ctypes.create_string_buffer(1 << 14)
    status = _load_conv().simt_run_conv(ctypes.byref(call), error, ctypes.c_int64(len(error)))
    _raise_unless_ok(status, error)


def run_conv_sanitized(call: ConvCall, memory: Sequence[tuple[int, int]]) -> bytes:
    """The same in a process of its own, under AddressSanitizer and UndefinedBehaviorSanitizer.

    Args:
        call: its addresses are read only here; the process works on copies of exactly the given size.
        memory: (address, bytes) of x, weight, their dense copies, the residual, the vectors, and y, less
            those that are absent.

    Returns:
        The bytes of y afterwards.

    Raises:
        SimulatorError: the kernel broke a rule, or a sanitizer reported; the message holds the report.
    """
    program = _built("conv_sanitized")
    with tempfile.TemporaryDirectory(prefix="simt") as folder:
        case, result = Path(folder, "case"), Path(folder, "result")
        with open(case, "wb") as file:
            file.write(bytes(call))
            for address, size in memory:
                file.write(bytes((ctypes.c_int64 * 2)(size, address % 16)))
                file.write(ctypes.string_at(address, size))
        _run_sanitized([str(program), str(case), str(result)])
        return result.read_bytes()


@contextmanager
def without_tensor_maps(target: str = CONV) -> Iterator[None]:
    """As on a driver from before CUDA 12: within it there are no tensor maps."""
    library = _load(target)
    library.simt_refuse_tensor_maps(1)
    try:
        yield
    finally:
        library.simt_refuse_tensor_maps(0)


@contextmanager
def failing_encode(target: str = CONV) -> Iterator[None]:
    """Within it the driver has tensor maps, but refuses to encode any."""
    library = _load(target)
    library.simt_fail_encoding(1)
    try:
        yield
    finally:
        library.simt_fail_encoding(0)


def run_test_kernel(
    name: str,
    inputs: Sequence[float],
    outputs: int,
    *,
    seed: int = 0,
    fill: float = -1.0,
    target: str = "kernels",
) -> list[float]:
    """Runs a kernel of tests/simt/kernels and returns its output, `fill` where it wrote nothing."""
    library = _load(target)
    error = ctypes.create_string_buffer(1 << 14)
    source = (ctypes.c_float * len(inputs))(*inputs)
    result = (ctypes.c_float * outputs)(*[fill] * outputs)
    status = library.simt_run_test_kernel(
        name.encode(),
        source,
        ctypes.c_int64(len(inputs)),
        result,
        ctypes.c_int64(outputs),
        ctypes.c_uint64(seed),
        error,
        ctypes.c_int64(len(error)),
    )
    _raise_unless_ok(status, error)
    return list(result)


def run_test_kernel_sanitized(name: str, inputs: int, outputs: int, *, seed: int = 0) -> list[float]:
    """Runs a test kernel on 0, 1, 2, ... in a sanitized process."""
    program = _built("kernels_sanitized")
    printed = _run_sanitized([str(program), name, str(inputs), str(outputs), str(seed)])
    return [float(line) for line in printed.split()]


def _run_sanitized(command: list[str]) -> str:
    """Runs a sanitized program to its end; its own report or the sanitizer's becomes the exception's message.

    A program rather than the library preloaded into Python: torch under AddressSanitizer takes many times
    longer to import, and what it leaks and overrides would have to be suppressed.
    """
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    finished = subprocess.run(
        command, env={**os.environ, **options}, capture_output=True, text=True, errors="replace", timeout=600
    )
    if finished.returncode != 0:
        raise SimulatorError(finished.stderr or f"{command[0]} ended with status {finished.returncode}")
    return finished.stdout
