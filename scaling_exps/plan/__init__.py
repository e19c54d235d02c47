"""Config -> RunSpec: what will run, checked whole before the first run starts.

`expand` takes the product and applies the rule, `checks` refuses, `spec` is the result, `show` prints it.
"""

from scaling_exps.plan.expand import UNNAMED_GPU, base_runs, batch_limit, content, device, lacking, plan, threads
from scaling_exps.plan.show import NONE, added, amount, describe, print_lines, print_plan, print_run, print_table
from scaling_exps.plan.spec import (
    Arm,
    Foreign,
    ForeignData,
    Placement,
    PlanError,
    Role,
    RunSpec,
    Schedule,
    Science,
    Stage,
    run_id,
)

__all__ = [
    "NONE", "UNNAMED_GPU", "Arm", "Foreign", "ForeignData", "Placement", "PlanError", "Role", "RunSpec", "Schedule",
    "Science", "Stage", "added", "amount", "base_runs", "batch_limit", "content", "describe", "device", "lacking",
    "plan", "print_lines", "print_plan", "print_run", "print_table", "run_id", "threads",
]  # fmt: skip
