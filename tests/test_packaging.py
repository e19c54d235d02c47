"""What is installed, what is imported, and what is imported when."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from support import ENVIRONMENT, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HARD = {
    "torch", "torchvision", "hydra-core", "omegaconf", "wandb", "timm", "transformers", "datasets", "numpy", "scipy",
    "msgspec", "rich", "plotly", "jinja2",
}  # fmt: skip
HEAVY = ("torch", "wandb", "plotly", "matplotlib", "transformers", "numba", "datasets", "scipy", "numpy")
# bench/theory.py times the three where they are installed; the fourth is the trainer that an example is for
COMPARED = {"torchsde", "diffrax", "jax", "torchtitan"}


def canonical(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("_", "-").replace(".", "-")


def test_the_hard_dependencies_are_these() -> None:
    assert {canonical(r) for r in PROJECT["dependencies"]} == HARD


def test_all_is_every_extra_of_the_run_time() -> None:
    (everything,) = PROJECT["optional-dependencies"]["all"]
    extras = set(PROJECT["optional-dependencies"]) - {"all", "dev", "docs"}
    assert set(re.findall(r"\[(.*)\]", everything)[0].split(",")) == extras


def test_every_direct_import_is_declared() -> None:
    """Fails for a package that came along with another, and would go with it."""
    extras = PROJECT["optional-dependencies"].values()
    declared = HARD | {canonical(r) for extra in extras for r in extra}
    owners = packages_distributions()
    own = {p.stem for p in ROOT.rglob("*.py")} | {"scaling_exps"}
    for folder in ("scaling_exps", "bench", "scripts", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module or ""]
                else:
                    continue
                for name in {n.split(".")[0] for n in names} - sys.stdlib_module_names - own - COMPARED:
                    distributions = {canonical(d) for d in owners.get(name, [name])}
                    assert distributions & declared, f"{path.relative_to(ROOT)} imports {name}"


def test_the_lock_has_every_declared_package_and_no_address() -> None:
    lock = (ROOT / "requirements.lock").read_text().splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==\S+", line) and "/" not in line for line in lock)
    locked = {canonical(line) for line in lock}
    extras = PROJECT["optional-dependencies"]
    wanted = {canonical(r) for name, extra in extras.items() if name != "docs" for r in extra} | HARD
    assert wanted - {"scalerun"} <= locked


CALL = "from scaling_exps import cli; assert cli.main({}) == 0"
COMMANDS = {
    "scale": "import scaling_exps; scaling_exps.scale({'batch': 4, 'lr': 1e-3, 'betas': (0.9, 0.99), 'eps': 1e-8}, "
    "batch=8, rule='sqrt')",
    "plan": CALL.format(["plan", "batch=16"]),
    "plan --json": CALL.format(["plan", "--json", "model=resnet50"]),
    "status": CALL.format(["status", "runs"]),
    "convert": CALL.format(["convert", "in.yaml", "--from", "plain", "--batch", "8"]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_light_commands_import_nothing_heavy(command: str, tmp_path: Path) -> None:
    """Fails if a word about a run, or a rule for one's own trainer, waited for torch."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "in.yaml").write_text("batch: 4\nlr: 0.001\nbetas: [0.9, 0.99]\neps: 1.0e-8\noptimizer: adam\n")
    code = f"{COMMANDS[command]}\nimport sys\nheavy = [m for m in {HEAVY} if m in sys.modules]\nassert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_rooms_that_plan_launch_and_report_import_no_torch() -> None:
    code = "import sys; from scaling_exps import cli, config, rules, plan, launch, records, report, sources, mirror; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT).returncode == 0
