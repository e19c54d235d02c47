"""A worker: python -m scaling_exps.train [--since TIME] [--launched] RUN_DIR ..."""

import argparse
from pathlib import Path

from scaling_exps.train import work

parser = argparse.ArgumentParser(prog="python -m scaling_exps.train")
parser.add_argument("--since", type=float, default=float("inf"), help="leave runs that failed after this time alone")
parser.add_argument("--launched", action="store_true", help="stdin ends when the launcher does: save and stop then")
parser.add_argument("run_dirs", nargs="+", type=Path)
options = parser.parse_args()
raise SystemExit(work(options.run_dirs, options.since, launched=options.launched))
