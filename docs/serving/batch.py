"""Classifies a folder of images on the machines of a Ray cluster, or on this one; see docs/serving.md."""

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
import ray
import torch
from models import Transform, classify, fused, load
from PIL import Image


def decode(row: dict[str, Any], transform: Transform) -> dict[str, Any]:
    """The input of one file. A file that is no image keeps its row, with the error."""
    try:
        image, error = Image.open(io.BytesIO(row["bytes"])).convert("RGB"), ""
    except Exception as failure:  # Pillow raises many kinds for damaged files
        image, error = Image.new("RGB", (256, 256)), f"{type(failure).__name__}: {failure}"
    return {"path": row["path"], "image": transform(image).numpy(), "error": error}


class Classifier:
    """One worker: a network, fused once."""

    def __init__(self, model: str) -> None:
        network, _ = load(model)
        self.network = fused(network)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        classes, probabilities = classify(self.network, torch.from_numpy(np.stack(batch["image"])))
        failed = batch["error"] != ""
        return {
            "path": batch["path"],
            "label": np.where(failed, -1, classes.numpy()),
            "probability": np.where(failed, np.nan, probabilities.numpy()),
            "error": batch["error"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", required=True, help="a folder, or an s3:// or gs:// address")
    parser.add_argument("--out", type=Path, required=True, help="a new folder, which all machines see")
    parser.add_argument("--model", default="resnet50", help="a network of torchvision, or module:function")
    parser.add_argument("--workers", type=int, help="default: one per GPU, or per CPU but one without GPUs")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--cpus", type=int, help="CPUs of a local Ray; default: this machine's")
    given = parser.parse_args()
    if given.out.exists():
        parser.error(f"--out {given.out} exists; name a folder that does not")
    ray.init(num_cpus=given.cpus, include_dashboard=False)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    cpus = int(ray.cluster_resources()["CPU"])
    workers = given.workers or gpus or max(1, cpus - 1)
    if min(workers, gpus or workers) >= cpus:  # a worker takes a CPU beside its GPU: Ray would wait for ever
        parser.error(f"{workers} workers leave none of {cpus} CPUs to read images; there must be one more")
    _, transform = load(given.model)
    results = (
        ray.data.read_binary_files(given.images, include_paths=True)
        .map(decode, fn_kwargs={"transform": transform})
        .map_batches(
            Classifier,
            fn_constructor_args=(given.model,),
            batch_size=given.batch_size,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_gpus=1 if gpus else 0,
        )
    )
    unfinished = given.out.absolute().with_name(given.out.name + ".unfinished")
    results.write_parquet(str(unfinished), mode="overwrite")
    unfinished.rename(given.out)
    written = pyarrow.dataset.dataset(given.out)
    failed = written.count_rows(filter=pyarrow.dataset.field("error") != "")
    print(f"{written.count_rows()} files in {given.out}, of which {failed} could not be decoded")


if __name__ == "__main__":
    main()
