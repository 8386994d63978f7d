"""Serves a network over HTTP with Ray Serve, in batches; see docs/serving.md."""

import argparse
import asyncio
import io
import signal

import ray
import torch
from models import classify, fused, load
from PIL import Image
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

BATCH = 8


@serve.deployment(health_check_period_s=10, graceful_shutdown_timeout_s=30, max_ongoing_requests=8 * BATCH)
class Classifier:
    """POST an image file, get its class and probability."""

    def __init__(self, model: str) -> None:
        network, self.transform = load(model)
        self.network = fused(network)
        # Nobody waits for the first call of a size: every batch is filled up to this one.
        self.warm = self.transform(Image.new("RGB", (256, 256))).expand(BATCH, -1, -1, -1)
        classify(self.network, self.warm)

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.005)
    async def classify(self, images: list[torch.Tensor]) -> list[dict[str, float]]:
        filled = torch.cat([torch.stack(images), self.warm[len(images) :]])
        classes, probabilities = await asyncio.to_thread(classify, self.network, filled)
        answers = zip(classes.tolist(), probabilities.tolist(), strict=True)
        return [{"label": label, "probability": p} for label, p in answers][: len(images)]

    async def __call__(self, request: Request) -> JSONResponse:
        try:
            image = Image.open(io.BytesIO(await request.body())).convert("RGB")
        except Exception as error:  # Pillow raises many kinds for damaged files
            return JSONResponse({"error": f"the body must be an image file: {error}"}, status_code=400)
        return JSONResponse(await self.classify(self.transform(image)))

    def check_health(self) -> None:
        """Raises where the device is lost; Ray Serve then replaces this replica."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet50", help="of torchvision, or module:function")
    parser.add_argument("--replicas", type=int, default=1, help="networks, each on a GPU of its own")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    ray.init(include_dashboard=False)
    # Ctrl-C and what supervisors send, also where the shell that started this ignores one of them.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    serve.start(http_options={"port": given.port})
    options = {"num_gpus": 1 if ray.cluster_resources().get("GPU") else 0}
    deployment = Classifier.options(num_replicas=given.replicas, ray_actor_options=options)
    try:
        serve.run(deployment.bind(given.model), blocking=True)
    finally:
        serve.delete("default")  # waits for the requests that run


if __name__ == "__main__":
    main()
