"""A sample of the generated command lines and damaged folders; `bench/drill.py` tries a thousand, and three hundred."""

from __future__ import annotations

import forked
from support import ROOT


def test_generated_command_lines_and_damaged_folders() -> None:
    """Fails by a traceback, a poor message, a refusal that wrote something, a run that takes others along."""
    done = forked.run([str(ROOT / "tests/hostile.py"), "--lines", "40", "--folders", "9"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"lines": 40' in done.stdout and '"folders": 9' in done.stdout
