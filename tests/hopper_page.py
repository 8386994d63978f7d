"""Where the plan takes the Hopper kernel, and what it expects of it, as a page of Markdown.

``python -m tests.hopper_page > docs/hopper.md``. Nothing is measured: all times are estimates of the planner.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

from bench.cases import Layer, layers_of, parse, read_rows
from bench.result import geometric_mean
from fused_cna import ConvProblem
from fused_cna.plan import planner

DEVICE = "H100"
BATCHES = (1, 8, 32, 128)
HOPPER, RIVAL = "implicit_gemm_sm90", "implicit_gemm_sm80"
NETWORKS = {"resnet50": "ResNet-50", "vgg16_bn": "VGG-16 with norms", "efficientnet_b0": "EfficientNet-B0"}

HEAD = f"""\
# Where the Hopper kernel is expected to win

The plan's estimates for an {DEVICE} in float16, dense channels_last; nothing here is measured. Written by
`python -m tests.hopper_page > docs/hopper.md`. A *ratio* is the estimated time of the best plan of
`{HOPPER}` divided by that of `{RIVAL}`, launch included: below 1 the
Hopper kernel is expected to be faster.
"""


def fastest(layer: Layer, batch: int) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The plan that is chosen, and the best of each kernel that takes the layer."""
    stride, padding, dilation, groups = layer.geometry
    sizes = (batch, layer.cin, layer.h, layer.w, layer.cout, layer.kh, layer.kw)
    options = {"dtype": torch.float16, "norm": layer.has_norm, "residual": layer.residual_order}
    problem = ConvProblem(*sizes, stride, padding, dilation, groups, **options)  # type: ignore[arg-type]
    legal = [
        c for c in planner().candidates(planner().problem(problem.question()), DEVICE) if not c["illegal"]
    ]
    return legal[0], {c["kernel"]: c for c in reversed(legal)}


def over_all_layers() -> Iterator[str]:
    """For each kind of layers in conv_layers.csv: where it takes any, is chosen, and by how much."""
    yield "## Over the layers of 194 networks\n"
    yield (
        "For each kind of layer: the share of uses for which the plan chooses the Hopper kernel, and the "
        "mean ratio of these.\n"
    )
    yield "| layers | uses | " + " | ".join(f"batch {batch}" for batch in BATCHES) + " |"
    yield "| --- | --- |" + " --- |" * len(BATCHES)
    kinds: dict[str, list[Layer]] = {}
    for row in read_rows():
        kinds.setdefault(row["kind"], []).append(parse(row))
    for kind, layers in kinds.items():
        cells, chosen_at_all = [], 0
        for batch in BATCHES:
            uses, ratios = 0, []
            for layer in layers:
                chosen, best = fastest(layer, batch)
                if chosen["kernel"] == HOPPER:
                    uses += layer.uses
                    if RIVAL in best:
                        ratios.append(chosen["estimate_us"] / best[RIVAL]["estimate_us"])
            chosen_at_all += uses
            total = sum(layer.uses for layer in layers)
            cells.append(f"{uses / total:.0%}, {geometric_mean(ratios):.2f}" if ratios else "-")
        if chosen_at_all:
            yield f"| {kind} | {sum(layer.uses for layer in layers):,} | " + " | ".join(cells) + " |"


def of_network(name: str) -> Iterator[str]:
    """A row for each distinct dense layer."""
    yield f"\n## {NETWORKS[name]}\n"
    yield "| layer | uses | " + " | ".join(f"batch {batch} | ratio" for batch in BATCHES) + " |"
    yield "| --- | --- |" + " --- | --- |" * len(BATCHES)
    totals = {batch: [0.0, 0.0] for batch in BATCHES}
    for layer in layers_of(name):
        if layer.groups > 1 or (layer.h, layer.w) == (1, 1):
            continue
        cells = []
        for batch in BATCHES:
            chosen, best = fastest(layer, batch)
            cells += [short(chosen), "-"]
            if HOPPER in best and RIVAL in best:
                cells[-1] = f"{best[HOPPER]['estimate_us'] / best[RIVAL]['estimate_us']:.2f}"
            without = min(c["estimate_us"] for kernel, c in best.items() if kernel != HOPPER)
            totals[batch][0] += layer.uses * chosen["estimate_us"]
            totals[batch][1] += layer.uses * without
        yield f"| {layer.name} | {layer.uses} | " + " | ".join(cells) + " |"
    sums = (
        f"{chosen:,.0f} of {without:,.0f} us | {chosen / without:.2f}" for chosen, without in totals.values()
    )
    yield "| all of them, with it and without | | " + " | ".join(sums) + " |"


def short(plan: dict[str, Any]) -> str:
    """Of the Hopper kernel its tile and how it is run, of others the name."""
    if plan["kernel"] != HOPPER:
        return str(plan["kernel"])
    words = plan["name"].split()[1:4]
    split = f", split {plan['split_k']}" if plan["split_k"] > 1 else ""
    return " ".join(words) + split


def main() -> int:
    print(HEAD)
    for line in over_all_layers():
        print(line)
    for name in NETWORKS:
        for line in of_network(name):
            print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
