"""A worker: python -m scaling_exps.train RUN_DIR ..."""

import sys
from pathlib import Path

from scaling_exps.train import work

raise SystemExit(work([Path(a) for a in sys.argv[1:]]))
