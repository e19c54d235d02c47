"""Fixtures, and the environment of every test: no wandb server, no hub."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:  # in the background of a shell, under nohup; our children inherit it
        signal.signal(number, usual)


SLOW = ("test_launcher", "test_train", "test_failures", "test_mirror", "test_bench", "test_noise", "test_language")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first: a worker that takes one last keeps all waiting."""
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


@pytest.fixture(autouse=True)
def _no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test names no width, nobody else does: shells export COLUMNS, and what a test imports may set it."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture(scope="session")
def cifar10() -> str:
    """Folder of the real CIFAR-10 parquet files."""
    folder = Path(os.environ.get("SCALERUN_DATA", "")) / "cifar10"
    if not os.environ.get("SCALERUN_DATA") or not folder.is_dir():
        pytest.skip("set SCALERUN_DATA to a folder that holds cifar10/*.parquet")
    return str(folder)
