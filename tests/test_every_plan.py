"""Every kernel, dtype and tile on a GPU, bit for bit: in the simulator each kernel's own tests do that."""

from __future__ import annotations

import pytest
import torch

import fused_cna
from tests.conftest import needs_gpu
from tests.kernel_cases import FAMILIES, plans_of, plans_of_every_kernel, run_on_gpu
from tests.plans import describe


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name, family in FAMILIES.items() for dtype in family.dtypes],
    ids=str,
)
def test_integers_are_exact(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_gpu()
    monkeypatch.setattr(fused_cna.config, "strict", True)
    ran = [(problem, plan, run_on_gpu(problem, plan)) for problem, plan in plans_of(name, dtype)]
    assert ran
    wrong = [f"{describe(plan, p.x, p.weight)}: {why}" for p, plan, why in ran if why]
    assert not wrong, "\n".join(wrong)


def test_no_kernel_is_left_out() -> None:
    reached = {plan.partition(" ")[0] for _, plan in plans_of_every_kernel()}
    assert reached - {""} == set(fused_cna.build_info()["kernels"])
