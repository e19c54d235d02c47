"""Training: RUN_DIR in, records and result out. One process a device.

`worker` takes directories, `loop.fit` is one run, `trainer` the step and its state, `measure` what is measured,
`checkpoint` what is saved, `fork` branches off a checkpoint, `ranks` are the processes, `provenance` the machine.
"""

from scaling_exps.train.loop import fit, preflight
from scaling_exps.train.ranks import slurm_rank
from scaling_exps.train.trainer import Trainer, TrainError
from scaling_exps.train.worker import AGAIN, FAILED, run, run_all, stop_requested, work

__all__ = [
    "AGAIN", "FAILED", "TrainError", "Trainer", "fit", "preflight", "run", "run_all", "slurm_rank", "stop_requested",
    "work",
]  # fmt: skip
