"""What importing fused_cna, and fusing with it, brings into a process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from fused_cna import eager

PROGRAM = """
import sys, torch, fused_cna
from torch import nn

class Asks(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    def forward(self, x):
        return self.norm(self.conv(x)) * (100 if torch._dynamo.is_compiling() else 1)

x = torch.ones(1, 3, 8, 8)
with torch.inference_mode():
    fused_cna.fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval())(x)
    fused_cna.ConvNormAct(3, 4).eval()(x)
    assert "torch._dynamo" not in sys.modules
    asks = fused_cna.fuse(Asks().eval())
    asks(x)
print(fused_cna.report(asks))
"""


def test_the_compiler_is_imported_where_it_is_used_and_still_known() -> None:
    """A network that asks it whether it runs is not followed, as in a process that has imported it."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "fused: 0 of 1 convolutions" in done.stdout


def test_constants_are_marked_as_torch_marks_them() -> None:
    def ours() -> None: ...
    def theirs() -> None: ...

    eager.constant_under_compile(ours)
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}
