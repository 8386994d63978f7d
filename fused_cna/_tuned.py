"""Which plans were tuned for a device, and how the compiled code gets to know them."""

import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from fused_cna import _extension, plan_file
from fused_cna.device import Device as Figures
from fused_cna.plan_file import Device, Problem, ProblemKey, TunedPlan, problem_key

_lock = threading.Lock()

# Set in this process, whether or not they are in a file.
_own: dict[Device, dict[ProblemKey, TunedPlan]] = {}
_revision = 0


@dataclass(frozen=True)
class Target:
    """What is planned for."""

    device: Device
    """What its plans are filed under."""
    info: Mapping[str, Any]
    """The planner's view of it."""


def named_target(planner: ModuleType, name: str) -> Target:
    """A device that the planner knows by name, in any case and with or without its brand.

    Raises:
        ValueError: it does not (lists those that it knows).
    """
    whole, slash, part = re.sub(r"^(nvidia )?(geforce )?", "", name, flags=re.IGNORECASE).partition("/")
    known = {each.lower(): each for each in planner.devices()}
    if whole.lower() not in known:
        raise ValueError(
            f"no device is called {name!r}; known are {', '.join(known.values())}; any other can be given by "
            "its figures, as a fused_cna.Device"
        )
    name = known[whole.lower()] + slash + part
    info = planner.device(name)
    capability = f"{info['compute_major']}.{info['compute_minor']}"
    return Target(Device(name, capability, info["multiprocessors"]), info)


def target_of(device: Figures) -> Target:
    """A device by its figures."""
    capability = "{}.{}".format(*device.compute_capability)
    return Target(Device(device.name, capability, device.multiprocessors), device.fields())


def cuda_target(index: int) -> Target:
    """A CUDA device of this machine.

    Raises:
        ImportError: the extension is not loaded.
        RuntimeError: the device is too old for the kernels.
    """
    properties = torch.cuda.get_device_properties(index)
    capability = f"{properties.major}.{properties.minor}"
    device = Device(properties.name, capability, properties.multi_processor_count)
    return Target(device, _extension.module().device(index))


def plans_for(device: Device) -> dict[ProblemKey, TunedPlan]:
    """The tuned plans for a device: those set in this process, over those of the files."""
    plans = plan_file.plans_for(device)
    for known, own in list(_own.items()):
        if device.stands_for(known):
            plans.update(own)
    return plans


def plan_for(device: Device, problem: Problem) -> TunedPlan | None:
    return plans_for(device).get(problem_key(problem))


def revision() -> int:
    """Another number after every ``use`` and ``forget``: what was chosen before may not be chosen again."""
    return _revision


def use(target: Target, plans: Iterable[TunedPlan]) -> None:
    """Has every later call in this process run these plans."""
    global _revision
    plans = list(plans)
    with _lock:
        _revision += 1
        _own.setdefault(target.device, {}).update({plan.problem: plan for plan in plans})
        if _extension.is_available():
            _hand_over(target, plans)


def forget() -> None:
    """Ends what ``use`` did, and what was read from files, in this process."""
    global _revision
    with _lock:
        _revision += 1
        _own.clear()
        if _extension.is_available():
            _extension.module().clear_tuned_plans()


def load(device_index: int) -> None:
    """Gives the compiled code all plans for a CUDA device; called before the first plan for it is chosen."""
    with _lock:
        target = cuda_target(device_index)
        _hand_over(target, plans_for(target.device).values())


def _hand_over(target: Target, plans: Iterable[TunedPlan]) -> None:
    refused = [why for plan in plans if (why := set_plan(_extension.module(), target, plan))]
    if refused:
        plan_file.warn_once(
            f"{len(refused)} tuned plans for {target.device.name} are ignored, because no kernel of this "
            f"version takes them; the first: {refused[0]}. fused_cna.tune finds new ones"
        )


def set_plan(module: ModuleType, target: Target, plan: TunedPlan) -> str:
    """Sets a tuned plan in a compiled module; why not, or an empty string."""
    try:
        why: str = module.set_tuned_plan(dict(plan.problem), dict(target.info), plan.plan)
    except (RuntimeError, ValueError) as error:
        why = str(error)
    return f"{plan.plan}: {why}" if why else ""


if _extension.is_available():
    _extension.module().set_plan_loader(load)
