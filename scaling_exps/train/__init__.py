"""The one training loop: RUN_DIR in, records and result out. One process a device.

`trainer` is the step, `runs` takes a directory to its end, `ranks` are the processes, `provenance` the machine.
"""

from scaling_exps.train.ranks import slurm_rank
from scaling_exps.train.runs import AGAIN, FAILED, final_metrics, preflight, run, run_all, stop_requested, work
from scaling_exps.train.trainer import Trainer, TrainError, build_net, mean_loss

__all__ = [
    "AGAIN", "FAILED", "TrainError", "Trainer", "build_net", "final_metrics", "mean_loss", "preflight", "run",
    "run_all", "slurm_rank", "stop_requested", "work",
]  # fmt: skip
