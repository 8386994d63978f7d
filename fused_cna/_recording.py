"""Every convolution that a model sends to the operator, once each, with the tensors of the call."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_cna import ops
from fused_cna.plan_file import ProblemKey, problem_key
from fused_cna.problem import call_question

# Where they are in the operator's arguments.
_X, _WEIGHT, _RUNNING_MEAN, _ACT, _RESIDUAL, _ORDER = 0, 1, 5, 12, 14, 15
_CONVOLUTION = slice(8, 12)


@dataclass
class RecordedCall:
    """One convolution problem of a model."""

    arguments: tuple[Any, ...]
    """The operator's, in the order of its schema, of the first call with this problem."""
    problem: Mapping[str, Any]
    """The planner's dict of it."""
    uses: int = 0
    """How many calls had it."""
    names: list[str] = field(default_factory=list)
    """The modules whose calls had it, as far as their weights tell."""

    @property
    def x(self) -> Tensor:
        x: Tensor = self.arguments[_X]
        return x

    @property
    def key(self) -> ProblemKey:
        return problem_key(self.problem)

    def __str__(self) -> str:
        """Such as "3x3 stride 2, 64 to 128 channels, 32 x 56 x 56, float16, norm + residual + relu"."""
        p = self.problem
        pads = (p["pad_top"], p["pad_bottom"], p["pad_left"], p["pad_right"])
        parts = [f"{p['r']}x{p['s']}"]
        if (p["stride_h"], p["stride_w"]) != (1, 1):
            parts.append(f"stride {_short(p['stride_h'], p['stride_w'])}")
        if pads != _usual_pads(p):
            parts.append(f"padding {_short(*pads)}")
        if (p["dil_h"], p["dil_w"]) != (1, 1):
            parts.append(f"dilation {_short(p['dil_h'], p['dil_w'])}")
        if p["groups"] > 1:
            parts.append(f"groups {p['groups']}")
        shape = f"{p['c']} to {p['k']} channels, {p['n']} x {p['h']} x {p['w']}"
        precision = "tf32" if p["allow_tf32"] else p["dtype"]
        behind = " + ".join(self._steps_behind())
        return ", ".join(text for text in (" ".join(parts), shape, precision, behind) if text)

    def _steps_behind(self) -> Iterator[str]:
        act, residual, order = (self.arguments[i] for i in (_ACT, _RESIDUAL, _ORDER))
        if self.problem["has_norm"]:
            yield "norm"
        if residual is not None and order == "add_act":
            yield "residual"
        if act != "identity":
            yield act
        if residual is not None and order == "act_add":
            yield "residual"


def _short(*numbers: int) -> str:
    return str(numbers[0]) if len(set(numbers)) == 1 else "x".join(map(str, numbers))


def _usual_pads(p: Mapping[str, Any]) -> tuple[int, ...]:
    """Those that keep the size of the image where the stride is 1."""
    height, width = p["dil_h"] * (p["r"] - 1) // 2, p["dil_w"] * (p["s"] - 1) // 2
    return height, height, width, width


class _Recorder(TorchDispatchMode):
    """Sees the operator's calls below autocast and autograd, with the tensors that a kernel would get."""

    def __init__(self, planner: ModuleType, names: Mapping[int, str]) -> None:
        super().__init__()
        self.calls: dict[tuple[torch.device, ProblemKey], RecordedCall] = {}
        self._planner = planner
        self._names = names

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (ops.operator, ops.out_operator):
            *arguments, y = (*args, result) if func is ops.operator else args
            if y.dtype in ops.FUSED_DTYPES and y.numel() > 0:
                self._note(tuple(arguments))
        return result

    def _note(self, args: tuple[Any, ...]) -> None:
        x, weight = args[_X], args[_WEIGHT]
        question = call_question(
            x,
            weight,
            *args[_CONVOLUTION],
            norm=args[_RUNNING_MEAN] is not None,
            act=args[_ACT],
            residual=None if args[_RESIDUAL] is None else args[_ORDER],
        )
        new = RecordedCall(args, self._planner.problem(question))
        call = self.calls.setdefault((x.device, new.key), new)
        call.uses += 1
        name = None if weight.is_meta else self._names.get(weight.data_ptr())
        if name is not None and name not in call.names:
            call.names.append(name)


def _names_of_weights(model: object) -> dict[int, str]:
    """The modules that hold the convolutions' weights, by the weights' addresses."""
    if not isinstance(model, nn.Module):
        return {}
    named = [(name, p) for name, p in model.named_parameters() if p.dim() == 4 and not p.is_meta]
    return {p.data_ptr(): name.removesuffix("weight").rstrip(".").removesuffix(".conv") for name, p in named}


@contextmanager
def operator_everywhere() -> Iterator[None]:
    """Calls on devices other than CUDA go to the operator as well, whose kernel there is plain PyTorch."""
    before = ops.operator_everywhere
    ops.operator_everywhere = True
    try:
        yield
    finally:
        ops.operator_everywhere = before


def record(model: Callable[..., Any], example_inputs: Any, planner: ModuleType) -> list[RecordedCall]:
    """Runs a model once in inference mode and returns the distinct problems of its calls, in their order.

    Args:
        example_inputs: a tensor, a tuple or list of positional arguments, or a dict of named ones.

    Raises:
        RuntimeError: none of its convolutions came to the operator; says what may be the cause.
    """
    recorder = _Recorder(planner, _names_of_weights(model))
    with torch.inference_mode(), operator_everywhere(), recorder:
        if isinstance(example_inputs, Mapping):
            model(**example_inputs)
        else:
            model(*(example_inputs if isinstance(example_inputs, (tuple, list)) else (example_inputs,)))
    if not recorder.calls:
        raise RuntimeError(
            "no convolution of the model came to fused_cna's operator, so there is nothing to tune: "
            + _likely_cause(model)
        )
    return list(recorder.calls.values())


def _likely_cause(model: object) -> str:
    if isinstance(model, nn.Module) and model.training:
        return "it is in training mode; call model.eval() first"
    return (
        "it has no fused_cna.ConvNormAct in eval mode and calls no fused_cna.conv_norm_act, or they fall "
        "back to eager PyTorch, which fused_cna.config.strict = True turns into an error that says why"
    )
