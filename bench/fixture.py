"""What the benches of training share: a Trainer of real size on data that needs no download, and a clock."""

from __future__ import annotations

import atexit
import functools
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from scaling_exps import config, plan
from scaling_exps.train.trainer import Trainer

IMAGES = {"train": 2048, "test": 256}


@functools.cache
def pictures() -> Path:
    """A folder laid out as the hub's CIFAR-10, of noise: pixels do not matter to the clock, their path does.

    It and every cache of this process lie in a temporary folder.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    folder = Path(tempfile.mkdtemp(prefix="scalerun-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    rng = np.random.default_rng(0)
    for part, count in IMAGES.items():
        cells = []
        for pixels in rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG", compress_level=0)
            cells.append({"bytes": file.getvalue()})
        table = pa.table({"img": cells, "label": rng.integers(0, 10, count)})
        pq.write_table(table, folder / f"{part}-0.parquet")
    return folder


def trainer(model: str, batch: int, micro: int, *words: str) -> Trainer:
    """One process on one run: images for a network of images, the standard library's bytes for one of texts."""
    sizes = [f"dataset.{part}_size={count}" for part, count in IMAGES.items()]
    images = [] if model in ("gpt", "roberta") else ["dataset=cifar10", f"dataset.path={pictures()}", *sizes]
    batches = [f"batch={batch}", f"recipe.batch={batch}", f"recipe.micro_batch={micro}", "launch.devices=1"]
    return Trainer(plan.plan(config.compose([f"model={model}", *images, *batches, "logger=none", *words]))[0])


def step(t: Trainer) -> None:
    """One step as the loop takes it."""
    t.train_step()
    t.optimizer.zero_grad(set_to_none=True)


def seconds(call: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """How long a call takes, its work on a GPU included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = clock()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start
