"""A worker: python -m scaling_exps.train [--since TIME] [--attached] RUN_DIR ..."""

import argparse
from pathlib import Path

from scaling_exps.train import work

parser = argparse.ArgumentParser(prog="python -m scaling_exps.train")
parser.add_argument("--since", type=float, default=float("inf"), help="leave runs that failed after this time alone")
parser.add_argument("--attached", action="store_true", help="save and stop when standard input ends")
parser.add_argument("run_dirs", nargs="+", type=Path)
raise SystemExit(work(**vars(parser.parse_args())))
