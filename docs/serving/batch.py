"""Classifies a folder of images on the machines of a Ray cluster, or on this one; see docs/serving.md."""

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
import ray
import torch
from models import classify, fused, load
from PIL import Image

Batch = dict[str, np.ndarray]


class Decoder:
    """Makes inputs of files. What cannot be decoded keeps its row, with the error."""

    def __init__(self, model: str) -> None:
        _, self.transform = load(model)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            image, error = Image.open(io.BytesIO(row["bytes"])).convert("RGB"), ""
        except OSError as failure:
            image, error = Image.new("RGB", (256, 256)), str(failure)
        return {"path": row["path"], "image": self.transform(image).numpy(), "error": error}


class Classifier:
    """One network for a worker, fused once."""

    def __init__(self, model: str) -> None:
        self.network = fused(model)

    def __call__(self, batch: Batch) -> Batch:
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
    parser.add_argument("--out", type=Path, required=True, help="a folder for the Parquet files; must be new")
    parser.add_argument("--model", default="resnet50", help="of torchvision, or module:function")
    parser.add_argument("--workers", type=int, default=2, help="networks at a time, each on a GPU of its own")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--cpus", type=int, help="of a local Ray; default: this machine's cores")
    given = parser.parse_args()
    if given.out.exists():
        parser.error(f"{given.out} exists already; name a folder that does not")
    ray.init(num_cpus=given.cpus)
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    results = (
        ray.data.read_binary_files(given.images, include_paths=True)
        .map(
            Decoder,
            fn_constructor_args=(given.model,),
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=8),
        )
        .map_batches(
            Classifier,
            fn_constructor_args=(given.model,),
            batch_size=given.batch_size,
            compute=ray.data.ActorPoolStrategy(size=given.workers),
            num_gpus=gpus,
        )
    )
    unfinished = given.out.with_name(given.out.name + ".unfinished")
    results.write_parquet(str(unfinished.absolute()), mode="overwrite")
    unfinished.rename(given.out)
    written = pyarrow.dataset.dataset(given.out)
    failed = written.count_rows(filter=pyarrow.dataset.field("error") != "")
    print(f"{written.count_rows()} images in {given.out}, of which {failed} could not be decoded")


if __name__ == "__main__":
    main()
