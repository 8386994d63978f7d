"""The CUDA kernels on a CPU: csrc/ compiled by g++ and run thread by thread: see README.md."""

from tests.simt.binding import SimulatorError
from tests.simt.conv import conv_norm_act, list_plans

__all__ = ["SimulatorError", "conv_norm_act", "list_plans"]
