"""A run's weights for other programs, from its newest checkpoint: safetensors, or a folder that transformers loads."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from scaling_exps.config import GPT, Roberta, Timm
from scaling_exps.plan import RunSpec
from scaling_exps.records import RunDir, find
from scaling_exps.sources import need
from scaling_exps.train import checkpoint
from scaling_exps.train.trainer import build_net
from scaling_exps.words import Parser

FORMS = ("safetensors", "hf")


class ExportError(ValueError):
    """Nothing was written; the message says why."""


def export(run_dir: RunDir, form: str, out: Path) -> str:
    """Write the network of the run's newest whole checkpoint to the new folder `out`.

    `safetensors`: model.safetensors, its names those of our networks, a tensor that is held twice once; its metadata
    hold run id, step, samples and, as `run.json`, the recipe. `hf`: that file in transformers' names, beside the
    config.json with which AutoModelForCausalLM (GPT), AutoModelForMaskedLM (RoBERTa, whose pad token -1 lets positions
    count from 0) or AutoModelForImageClassification (networks of timm) load it.

    Returns:
        What was written, in a line.

    Raises:
        ExportError: no checkpoint, no such form of this network, or `out` holds something.
        PlanError, ModelError: the run cannot be read, or its network not be built.
    """
    spec = run_dir.spec()
    if form == "hf" and not isinstance(spec.science.model, GPT | Roberta | Timm):
        raise ExportError(
            f"--to hf: transformers has no network like {spec.science.model.name}; it has gpt, roberta and those of "
            "timm (vit, vit_small, model=timm). --to safetensors takes every network"
        )
    states = (checkpoint.load(path, torch.device("cpu")) for path in (run_dir.newest, run_dir.previous))
    try:
        state = next(filter(None, states), None)
    except OSError as e:
        raise ExportError(f"a checkpoint of {run_dir} cannot be read: {e.strerror} ({e.filename})") from e
    if state is None or state.get("run_id") != spec.run_id:
        raise ExportError(f"{run_dir} has no checkpoint of run {spec.run_id}: train it first, or let it write one")
    step, total = state["step"], spec.science.steps
    described = {"run_id": spec.run_id, "step": step, "samples": spec.science.samples(step), "run.json": spec.to_json()}
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in described.items()}
    weights = {**state["net"], **state["average"]}  # what evaluations saw
    with _new_folder(out) as aside:
        if form == "hf":
            _transformers(spec, weights).save_pretrained(aside)
            tensors = _load(aside)
        else:
            tensors = _once(weights)
        need("safetensors.torch", "export").save_file(
            tensors, aside / "model.safetensors", {**metadata, "format": "pt"}
        )
    unfinished = "" if step == total else f", which is not finished: step {step:,} of {total:,}"
    return f"{out}: {len(tensors)} tensors of run {spec.run_id}{unfinished}"


def _transformers(spec: RunSpec, weights: dict[str, Any]) -> Any:
    """The network as transformers knows it."""
    model, net = spec.science.model, build_net(spec)
    net.load_state_dict(weights)
    if not isinstance(model, Timm):
        theirs: Any = net.net
        if isinstance(model, Roberta):
            theirs.config.pad_token_id = -1
        return theirs
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    data: Any = spec.science.dataset
    height, width, channels = data.shape
    options: dict[str, Any] = {
        "architecture": model.name,
        "num_labels": data.classes,
        "model_args": {**model.options, "in_chans": channels},
        "pretrained_cfg": {"input_size": [channels, height, width], "mean": data.mean, "std": data.std},
    }
    config = TimmWrapperConfig(**options)
    theirs = TimmWrapperForImageClassification(config)
    theirs.timm_model.load_state_dict(weights)
    return theirs


def _once(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors; of those that share their memory, the first."""
    places = {(t.data_ptr(), t.shape, t.stride()) if t.numel() else name: name for name, t in reversed(weights.items())}
    return {name: weights[name].contiguous() for name in reversed(places.values())}


def _load(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = need("safetensors.torch", "export").load_file(folder / "model.safetensors")
    return tensors


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder to be filled, which then becomes `out`, whole or not at all; ExportError where something lies there."""
    out = out.absolute()
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        if os.path.lexists(out) and (out.is_symlink() or any(out.iterdir())):
            raise ExportError(f"{out} is there already: remove it, or give another folder with --out")
        aside.mkdir(parents=True)
        yield aside
        os.replace(aside, out)
    except OSError as e:
        raise ExportError(f"cannot write {out}: {e.strerror or e}; give another folder with --out") from e
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def main(words: list[str]) -> int:
    """`scalerun export WORDS`; it raises as `export` does."""
    parser = Parser(prog="scalerun export", description="Write a run's weights for other programs.")
    parser.add_argument("run", help="a run's folder, or the beginning of its id below runs/")
    parser.add_argument("--to", choices=FORMS, required=True, help="one file of tensors, or transformers' folder")
    parser.add_argument("--out", type=Path, help="a new folder (default: export/RUN_ID-FORM)")
    options = parser.parse_args(words)
    run_dir = find(options.run)
    out = options.out or Path("export", f"{run_dir.spec().run_id}-{options.to}")
    print(export(run_dir, options.to, out))
    sys.stdout.flush()
    return 0
