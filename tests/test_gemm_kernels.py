"""What is special to the implicit GEMMs: splits of the reduction, and masks of filter rows."""

from __future__ import annotations

import pytest
import torch

from tests.conformance import Subject, random_case
from tests.conftest import Backend, Simulator
from tests.families import BY_NAME, Family, family_shape, laid_out
from tests.layouts import channels_last
from tests.reference import Wanted, integer_problem
from tests.shapes import shape_named

GEMMS = [family for name, family in BY_NAME.items() if name.startswith("implicit_gemm")]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [pytest.param(f, dtype, id=f"{f}-{dtype}") for f in GEMMS for dtype in f.dtypes],
)
@pytest.mark.parametrize("name", ["layer_14x14", "many_chunks"])
def test_every_split_is_exact_and_repeats(
    kernels: Backend, name: str, family: Family, dtype: torch.dtype
) -> None:
    subject = Subject(kernels, family, name, dtype)
    shape = shape_named(name) if name == "many_chunks" else family_shape(family.name, name)
    wanted = Wanted("relu", residual_order=subject.chance.choice(("add_act", "act_add")))
    problem = laid_out(integer_problem(shape, dtype, wanted), channels_last)
    splits = {plan.split()[3]: plan for plan in subject.plans(problem) if " 64x64x" in plan}
    assert len(splits) > 2
    subject.check(problem, splits.values())
    problem = laid_out(random_case(shape, dtype, wanted), channels_last)
    subject.check_error(problem, splits.values())
    subject.check_repeats(problem, splits.values())


@pytest.mark.parametrize("name", ["filter_of_mask", "filter_over_mask"])
def test_sanitizers_accept_a_mask_with_every_bit(name: str) -> None:
    subject = Subject(Simulator(), BY_NAME["implicit_gemm_sm80"], name)
    problem = laid_out(
        integer_problem(family_shape("implicit_gemm_sm80", name), torch.float16), channels_last
    )
    plans = [plan for plan in subject.plans(problem) if " 64x64x32 split 1 " in plan]
    assert plans
    subject.check(problem, plans, sanitized=True)
