"""A sample of the generated command lines and damaged folders; docs/reliability.md says how all are tried."""

from __future__ import annotations

import forked
import pytest
from support import ROOT


@pytest.mark.slow
def test_generated_command_lines_and_damaged_folders() -> None:
    """Fails by a traceback, a poor message, a refusal that wrote something, a run that takes others along."""
    done = forked.run([str(ROOT / "tests/hostile.py"), "--lines", "30", "--folders", "3"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"lines": 30' in done.stdout and '"folders": 3' in done.stdout
