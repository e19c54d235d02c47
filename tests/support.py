"""Helpers that several tests share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from scaling_exps import config

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def dataset(name: str, **changes: Any) -> Any:
    """The group conf/dataset/NAME.yaml as its struct, with some fields changed; imagefolder has three classes."""
    if name == "imagefolder":  # which is imagenet's group, and none before it is given its classes
        owned = {"name": name, "classes": 3, "revision": None, "train_size": None, "test_size": None}
        return msgspec.structs.replace(config.dataset("imagenet"), **owned | changes)
    return msgspec.structs.replace(config.dataset(name), **changes)


def write_pictures(root: Path, counts: dict[str, int]) -> Path:
    """Real JPEGs, each of its own size: counts[part] of each of 3 classes, below root/part/CLASS.

    Smooth random fields: in noise a resized crop would look like any other.
    """
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, count in counts.items():
        for name in ("ant", "bee", "cow"):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                h, w = (int(n) for n in rng.integers(40, 120, 2))
                coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
                coarse.resize((w, h), Image.Resampling.BICUBIC).save(root / part / name / f"{i:03d}.JPEG", quality=90)
    return root
