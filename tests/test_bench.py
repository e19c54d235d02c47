"""Every bench and script runs, at tiny size: no verdict on speed, only that each still measures what it says."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import forked
import pytest
from support import ENVIRONMENT, ROOT

from bench.fabricate import fabricate


def run(name: str, *words: str, cwd: Path) -> str:
    env = {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
    done = forked.run([str(ROOT / name), *words], cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rows(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed.splitlines()]


@pytest.mark.slow
def test_loop(tmp_path: Path) -> None:
    """A network of texts after one of images: fails if the first left its data behind for the second."""
    printed = rows(run("bench/loop.py", "--models", "resnet8,gpt", "--batch", "2", "--rounds", "2", cwd=tmp_path))
    assert [row["model"] for row in printed] == ["resnet8", "gpt"]
    assert all(len(row["ratio_to_bare"]) == 3 and min(row["ratio_to_bare"]) > 0 for row in printed)
    (memory,) = rows(run("bench/loop.py", "--models", "resnet8", "--batch", "2", "--memory", cwd=tmp_path))
    assert list(memory["peak_mib"]) == ["2", "32"]
    words = ["--models", "resnet8", "--batch", "2", "--rounds", "2", "--allocator"]
    (gain,) = rows(run("bench/loop.py", *words, cwd=tmp_path))
    assert len(gain["returned_over_kept"]) == 3


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_gpu(tmp_path: Path) -> None:
    """All of it on this CPU; then the same command measures nothing again but the panel."""
    words = ["bench/gpu.py", "--tiny", "--minutes", "14", "--out", str(tmp_path / "gpu")]
    run(*words, cwd=tmp_path)
    done = json.loads((tmp_path / "gpu/gpu.json").read_text())
    assert done["the same run twice"]["differences"] == done["killed and resumed"]["differences"] == []
    assert done["killed and resumed"]["resumed"]
    one, two = (done["two processes"][n] for n in "12")
    assert abs(one - two) < 1e-4 and done["speed of resnet8, float32"]["samples_per_second"] > 0
    assert "| killed and resumed |" in (tmp_path / "gpu/gpu.md").read_text()
    assert len(run(*words, cwd=tmp_path).splitlines()) == 1


@pytest.mark.slow
def test_peers(tmp_path: Path) -> None:
    """Each peer trains the network of images and the one of texts."""
    words = ["--models", "resnet8,gpt", "--micro", "2", "--accumulation", "2", "--steps", "2", "--rounds", "2"]
    said = run("bench/peers.py", *words, cwd=tmp_path).splitlines()
    printed = [json.loads(line) for line in said if line.startswith("{")]  # a peer may print, too
    assert [row["model"] for row in printed] == ["resnet8", "gpt"]
    for row in printed:
        assert min(row["samples_per_second"].values()) > 0
        assert set(row["ours_is_faster_by"]) == {"bare", "timm", "trainer", "lightning"}


@pytest.mark.slow
def test_stacked(tmp_path: Path) -> None:
    words = ["--models", "resnet8", "--batches", "2", "--seeds", "2", "--rounds", "2"]
    (row,) = rows(run("bench/stacked.py", *words, cwd=tmp_path))
    assert row["seeds"] == 2 and min(row["in_turn_ms"], row["stacked_ms"], *row["stacked_is_faster_by"]) > 0


@pytest.mark.slow
def test_noise(tmp_path: Path) -> None:
    words = ["--batch", "8", "--micro", "4", "--rounds", "2", "--examples", "8"]
    free, full, single = rows(run("bench/noise.py", *words, cwd=tmp_path))
    assert min(free["free_own_calls_share"]) > 0
    assert full["examples_a_gradient"] == 4 and min(full["full_over_2_steps"]) > 0
    assert single["examples_a_gradient"] == 1
    probed = rows(run("bench/noise.py", *words, "--probe", "model.width=8", cwd=tmp_path))
    assert [row["probe"] for row in probed] == ["free", "examples"] and probed[1]["covered"] == 1
    assert all(len(row["extra_share_of_step"]) == 3 for row in probed)


@pytest.mark.slow
def test_noise_coverage(tmp_path: Path) -> None:
    """Each method at each B_noise and tail; with 10 repeats a share is no more than a number."""
    printed = run("scripts/noise_coverage.py", "known", "10", cwd=tmp_path)
    assert printed.count("| moments |") == 3 and printed.count("| examples |") == 3


@pytest.mark.slow
def test_noise_on_two_networks(tmp_path: Path, cifar10: str) -> None:
    """All methods on the GPT and on the ResNet, which trains on the real CIFAR-10."""
    printed = run("scripts/noise_coverage.py", "networks", "3", cwd=tmp_path)
    assert printed.count("| moments |") == 4 and printed.count("| examples |") == 4


@pytest.mark.slow
def test_startup(tmp_path: Path) -> None:
    printed = {row["command"]: row for row in rows(run("bench/startup.py", "--runs", "1", cwd=tmp_path))}
    assert printed["bare Hydra start"]["over_hydra"] == 1
    assert len(printed) == 6 and all(row["median_s"] > 0 for row in printed.values())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_report(tmp_path: Path) -> None:
    printed = run("bench/report.py", "26", "20", "1", cwd=tmp_path).splitlines()
    assert [line.split()[2] for line in printed if "MB peak" in line] == ["status", "report"] * 2


def test_theory(tmp_path: Path) -> None:
    printed = json.loads(
        run("bench/theory.py", "--paths", "64", "--steps", "4", "--repeats", "1", "--json", cwd=tmp_path)
    )
    assert {"ours", "torch loop"} <= set(printed["rows"])


@pytest.mark.slow
def test_drill(tmp_path: Path) -> None:
    """Two strikes in one process; the bench itself compares with an undisturbed sweep, bit by bit."""
    out, page = tmp_path / "drills.jsonl", tmp_path / "page.md"
    run(
        "bench/drill.py",
        "--kills",
        "2",
        "--places",
        "one process",
        "--samples",
        "1280",
        "--out",
        str(out),
        cwd=tmp_path,
    )
    (row,) = rows(out.read_text())
    assert row["wrong"] == [] and sum(row["counts"].values()) == 2 and row["runs"] >= 6
    page.write_text("<!-- counted -->\n<!-- end -->\n")
    run("bench/drill.py", "--render", str(out), str(page), cwd=tmp_path)
    assert "| one process |" in page.read_text()


@pytest.mark.slow
def test_a_campaign_of_faults(tmp_path: Path) -> None:
    """Fails if a case went wrong, if the second command repeated one, or if a number stood for another fault."""
    out, page, hits = tmp_path / "faults.jsonl", tmp_path / "page.md", 0
    for _ in range(2):
        words = ["--faults", str(hits + 1), "--places", "one process", "--out", str(out)]
        run("bench/drill.py", *words, cwd=tmp_path)
        hits = sum(sum(row["hit"].values()) for row in rows(out.read_text()))
    first, second = rows(out.read_text())
    assert [first["case"], second["case"]] == [0, 3] and not first["wrong"] and not second["wrong"]
    # Each is struck up to four times; how often it is before it has finished, the machine's speed decides.
    assert {*first["hit"]} <= {"checkpoint empty", "SIGHUP", "little memory", "files end at a size"}
    assert {*second["hit"]} <= {"SIGKILL", "both checkpoints cut", "lock overwritten"}
    page.write_text("<!-- faults -->\n<!-- end -->\n")
    run("bench/drill.py", "--render", str(out), str(page), cwd=tmp_path)
    assert f"| **faults** | {hits} | 0 | 0 | {hits} |" in page.read_text()
    assert "| **wrong** | 0 | 0 | 0 | 0 |" in page.read_text()


def test_evidence(tmp_path: Path) -> None:
    """A copy, so that the pages that it writes lie beside the copy: what people wrote around the marks stays."""
    for folder in ("scripts", "docs/evidence", "runs"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "scripts/evidence.py", tmp_path / "scripts")
    page = tmp_path / "docs/evidence/claims.md"
    page.write_text("before\n<!-- evidence: begin -->\nold\n<!-- evidence: end -->\nafter\n")
    specs = fabricate(tmp_path / "runs" / "demo", ["experiment=demo"], batches=(4, 64), rules=("sqrt", "none"))
    one = tmp_path / "runs/demo" / specs[0].run_id / "run.json"
    one.write_text(json.dumps(json.loads(one.read_text()) | {"dataset_path": "/home/me/data"}))
    run(str(tmp_path / "scripts/evidence.py"), str(tmp_path / "runs/demo"), "demo", cwd=tmp_path)
    with tarfile.open(tmp_path / "docs/evidence/runs/demo.tar.xz") as kept:
        assert all(b"/home/me" not in kept.extractfile(f).read() for f in kept.getmembers())
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "## demo" in text and "What the rule does, on a laptop" in text
    assert list(page.parent.glob("demo-*.png"))
    shutil.rmtree(tmp_path / "runs")
    run(str(tmp_path / "scripts/evidence.py"), cwd=tmp_path)
    assert page.read_text() == text  # from what was kept
    shutil.copy(ROOT / "docs/evidence/runs/fig2_trained_mid.tar.xz", tmp_path / "docs/evidence/runs")
    run(str(tmp_path / "scripts/evidence.py"), cwd=tmp_path)
    assert "## What the noise predicts\n\nprediction of the displacement over 1 arm(s)" in page.read_text()
    assert (page.parent / "all-prediction.png").exists()


@pytest.mark.slow
def test_the_evidence_is_what_its_records_say(tmp_path: Path) -> None:
    """Fails where the statistics, the records or the page was changed alone."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/evidence.py", tmp_path / "scripts")
    shutil.copytree(ROOT / "docs/evidence", tmp_path / "docs/evidence")
    run(str(tmp_path / "scripts/evidence.py"), cwd=tmp_path)
    assert (tmp_path / "docs/evidence/claims.md").read_text() == (ROOT / "docs/evidence/claims.md").read_text()


def test_every_bench_and_script_has_a_test() -> None:
    """Fails for a new file that no test runs."""
    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    for path in (*ROOT.glob("bench/*.py"), *ROOT.glob("scripts/*.py")):
        assert path.stem in tests, path


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lines"), [("evidence/public", 27), ("evidence/regime", 35), ("scale", 7)])
def test_a_page_is_what_its_script_writes(name: str, lines: int, tmp_path: Path) -> None:
    """Fails where a table, a rule, an experiment or the page was changed alone."""
    kept, page = ROOT / f"docs/{name}.md", tmp_path / "page.md"
    shutil.copy(kept, page)
    run(f"scripts/{kept.stem}.py", str(page), cwd=ROOT)
    assert page.read_text() == kept.read_text()
    assert page.read_text().count("\n| ") == lines
