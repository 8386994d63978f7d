"""cuDNN's graph API: a convolution and all that follows it as one graph, run by its fastest engine."""

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import Layer, Precision
from fused_cna.activation import describe

HOW_TO_GET_IT = "cuDNN's graph API needs its Python package: pip install nvidia-cudnn-frontend"
PLAIN = {name: name for name in ("relu", "elu", "gelu", "sigmoid", "tanh")}
PLAIN |= {"silu": "swish", "gelu_tanh": "gelu_approx_tanh"}
ROUNDS, MOST_WORKSPACE = 5, 2 << 30


def why_not_here(layer: Layer) -> str | None:
    """How to get the package where it is missing; None where it is there."""
    return None if importlib.util.find_spec("cudnn") is not None else HOW_TO_GET_IT


@dataclass
class Description:
    """A graph of cuDNN, its tensors by name, and the values of its scalars.

    `scaled`: the norm's scale is an operation behind the convolution, else it is in the weight.
    """

    graph: Any
    scaled: bool
    tensors: dict[str, Any] = field(default_factory=dict)
    scalars: dict[str, Tensor] = field(default_factory=dict)


@cache
def opened() -> tuple[Any, Any]:
    """The package, and a handle of it for this process."""
    cudnn = importlib.import_module("cudnn")
    return cudnn, cudnn.create_handle()


def describe_graph(
    cudnn: Any, layer: Layer, batch: int, precision: Precision, *, scaled: bool, handle: Any = None
) -> Description:
    """Convolution, scale, bias, residual and activation; `x`, `weight`, `residual` and `y` are channels_last.

    What is between the operations is float32. Groups follow from the channels of x and of the weight.
    """
    kind = cudnn.data_type
    dtypes = {torch.float16: kind.HALF, torch.bfloat16: kind.BFLOAT16, torch.float32: kind.FLOAT}
    dtype = dtypes[precision.dtype]
    computed = {"intermediate_data_type": kind.FLOAT, "compute_data_type": kind.FLOAT}
    graph = cudnn.pygraph(handle=handle, io_data_type=dtype, **computed)
    made = Description(graph, scaled)

    def tensor(name: str, n: int, c: int, h: int, w: int) -> Any:
        strides = [c * h * w, 1, c * w, c]
        made.tensors[name] = graph.tensor(name=name, dim=[n, c, h, w], stride=strides, data_type=dtype)
        return made.tensors[name]

    def scalar(value: float) -> Any:
        name, one = f"scalar {value}", [1, 1, 1, 1]
        made.scalars[name] = torch.full((1, 1, 1, 1), value)
        options = {"data_type": kind.FLOAT, "is_pass_by_value": True}
        made.tensors[name] = graph.tensor(name=name, dim=one, stride=one, **options)
        return made.tensors[name]

    stride, padding, dilation, groups = layer.geometry
    x = tensor("x", batch, layer.cin, layer.h, layer.w)
    weight = tensor("weight", layer.cout, layer.cin // groups, layer.kh, layer.kw)
    geometry = {"padding": list(padding), "stride": list(stride), "dilation": list(dilation)}
    z = graph.conv_fprop(image=x, weight=weight, **geometry)
    if scaled:
        z = graph.mul(a=z, b=tensor("scale", 1, layer.cout, 1, 1))
    z = graph.add(a=z, b=tensor("bias", 1, layer.cout, 1, 1))
    order = layer.residual_order
    residual = tensor("residual", batch, layer.cout, layer.out_h, layer.out_w) if order else None
    if order == "add_act":
        z = graph.add(a=z, b=residual)
    z = _activated(graph, scalar, layer.act, z)
    if order == "act_add":
        z = graph.add(a=z, b=residual)
    z.set_output(True).set_data_type(dtype)
    made.tensors["y"] = z
    return made


def _activated(graph: Any, scalar: Callable[[float], Any], module: str, z: Any) -> Any:
    """What torch's module of that name computes, of cuDNN's pointwise operations."""
    name, params = describe(nn.Identity() if module == "none" else getattr(nn, module)()) or (module, ())
    if name == "identity":
        return z
    if name in PLAIN:
        return getattr(graph, PLAIN[name])(input=z)
    if name == "leaky_relu":
        return graph.leaky_relu(input=z, negative_slope=params[0])
    if name == "mish":
        return graph.mul(a=z, b=graph.tanh(input=graph.softplus(input=z)))
    if name not in ("relu6", "hardsigmoid", "hardswish"):
        raise NotImplementedError(f"no operations of cuDNN are known here for the activation {module}")
    shifted = z if name == "relu6" else graph.add(a=z, b=scalar(3.0))
    clipped = graph.relu(input=shifted, lower_clip=0.0, upper_clip=6.0)
    if name == "relu6":
        return clipped
    gate = graph.mul(a=clipped, b=scalar(1 / 6))
    return gate if name == "hardsigmoid" else graph.mul(a=z, b=gate)


@dataclass
class Engine:
    """One execution plan that was built; `run` writes y of `values`, which has all tensors by name."""

    cudnn: Any
    handle: Any
    description: Description
    index: int
    workspace: Tensor

    def run(self, values: dict[str, Tensor]) -> None:
        # A capture has a stream of its own.
        self.cudnn.set_stream(handle=self.handle, stream=torch.cuda.current_stream().cuda_stream)
        known = values | self.description.scalars
        pack = {tensor: known[name] for name, tensor in self.description.tensors.items()}
        self.description.graph.execute_plan_at_index(pack, self.workspace, self.index, handle=self.handle)


def build_engines(cudnn: Any, handle: Any, made: Description, precision: Precision) -> list[Engine]:
    """Every engine of heuristics A, B and the fallback that can be built; raises what cuDNN raises."""
    graph, modes, notes = made.graph, cudnn.heur_mode, cudnn.numerical_note
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([modes.A, modes.B, modes.FALLBACK])
    if precision.dtype == torch.float32:
        tensor_cores = [notes.TENSOR_CORE] if precision.float32_products == "ieee" else []
        graph.deselect_numeric_notes([notes.DOWN_CONVERT_INPUTS, *tensor_cores])
    graph.check_support()
    graph.build_plans(cudnn.build_plan_policy.ALL)
    sizes = [_workspace_bytes(graph, index) for index in range(graph.get_execution_plan_count())]
    return [
        Engine(cudnn, handle, made, index, torch.empty(max(size, 1), dtype=torch.uint8, device="cuda"))
        for index, size in enumerate(sizes)
        if size <= MOST_WORKSPACE
    ]


def _workspace_bytes(graph: Any, index: int) -> float:
    """Infinite for a plan that was not built."""
    try:
        return graph.get_workspace_size_plan_at_index(index)  # type: ignore[no-any-return]
    except Exception:  # cuDNN's error is of no special class
        return math.inf


def _seconds(engine: Engine, values: dict[str, Tensor]) -> float | Exception:
    """Of its fastest run, or what cuDNN says where it does not run."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    taken = []
    try:
        for _ in range(1 + ROUNDS):
            start.record()
            engine.run(values)
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end))
    except Exception as error:
        torch.cuda.synchronize()
        return error
    return min(taken)


def prepare(layer: Layer, precision: Precision, values: dict[str, Tensor]) -> Engine:
    """The fastest engine of two graphs, with the norm's scale in the weight and behind the convolution.

    `values` has all that either needs, by name, and y. Raises what cuDNN says where it has neither.
    """
    cudnn, handle = opened()
    batch = values["x"].shape[0]

    def engines(scaled: bool) -> list[Engine] | Exception:
        try:
            made = describe_graph(cudnn, layer, batch, precision, scaled=scaled, handle=handle)
            return build_engines(cudnn, handle, made, precision)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return error

    graphs = [engines(False), engines(True)]
    built = [engine for found in graphs if not isinstance(found, Exception) for engine in found]
    times = {number: _seconds(engine, values) for number, engine in enumerate(built)}
    right = {number: taken for number, taken in times.items() if not isinstance(taken, Exception)}
    if not right:
        refusals = [*(found for found in graphs if isinstance(found, Exception)), *times.values()]
        raise refusals[0] if refusals else RuntimeError("cuDNN could build none of its engines")  # type: ignore[misc]
    return built[min(right, key=lambda number: right[number])]
