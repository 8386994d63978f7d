"""Convolution, batch norm, residual and activation in one CUDA kernel: a drop-in module and an operator."""

from fused_cna import config
from fused_cna._device_timer import WrongResultError
from fused_cna._extension import build_info
from fused_cna._version import __version__
from fused_cna.config import FusionFallbackWarning, PlanFileWarning
from fused_cna.device import Device
from fused_cna.functional import conv_norm_act
from fused_cna.fusion.fuse import fuse, unfuse
from fused_cna.fusion.records import FusionError
from fused_cna.fusion.report import FusionReport, report
from fused_cna.modules import ConvNormAct
from fused_cna.plan import Explanation, explain, forced_plan
from fused_cna.plan_file import PlanFileError
from fused_cna.problem import ConvProblem
from fused_cna.tuning import TunedLayer, TuneResult, tune

__all__ = [
    "ConvNormAct",
    "ConvProblem",
    "Device",
    "Explanation",
    "FusionError",
    "FusionFallbackWarning",
    "FusionReport",
    "PlanFileError",
    "PlanFileWarning",
    "TuneResult",
    "TunedLayer",
    "WrongResultError",
    "__version__",
    "build_info",
    "config",
    "conv_norm_act",
    "explain",
    "forced_plan",
    "fuse",
    "report",
    "tune",
    "unfuse",
]
