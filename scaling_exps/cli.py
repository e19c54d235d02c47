"""The words a person types -> calls; exit codes; no logic.

0: done. 1: some run did not finish. 2: what was typed cannot be done; one message says what is allowed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

COMMANDS = ("plan", "status", "report")


def main(argv: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except KeyboardInterrupt:
        print("interrupted; the same command again goes on from the newest checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `scalerun plan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ValueError as e:  # every refusal of ours is one: config, rules, plan, data, models, launch, report
        for line in str(e).splitlines():
            print(f"scalerun: {line}", file=sys.stderr)
        return 2


def _dispatch(words: list[str]) -> int:
    command = words[0] if words and words[0] in COMMANDS else None
    rest = words[1:] if command else words
    if command == "status":
        from scaling_exps import launch

        options = _options(
            "status", rest, [("dir", {"nargs": "?", "default": None}), ("--json", {"action": "store_true"})]
        )
        rows = launch.status(Path(options.dir) if options.dir else _runs_dir())
        print(json.dumps(rows, indent=1)) if options.json else launch.print_status(rows)
        return 0
    if command == "report":
        from scaling_exps import report

        options = _options(
            "report",
            rest,
            [
                ("dirs", {"nargs": "*", "help": "folders of runs (default: runs)"}),
                ("--json", {"action": "store_true", "help": "the table, for machines"}),
                ("--out", {"default": "report", "help": "folder for the figures (default: report)"}),
            ],
        )
        return report.main([Path(d) for d in options.dirs] or [_runs_dir()], Path(options.out), options.json)

    from scaling_exps import config, plan

    as_json = command == "plan" and "--json" in rest
    configs = config.compose([w for w in rest if not (as_json and w == "--json")])
    if not configs:  # --help, --cfg, --info: Hydra has answered
        return 0
    specs = plan.plan(configs)
    if command == "plan":
        from scaling_exps import validity

        where = Path(configs[0].runs_dir), configs[0].noise
        if as_json:
            told = {spec.run_id: validity.describe(spec, *where) for spec in specs}
            rows = [{**row, "validity": told[spec.run_id]} for spec in specs for row in plan.describe(spec)]
            print(json.dumps(rows, indent=1))
        else:
            lines = validity.lines(specs, *where)
            plan.print_plan(specs)
            print("\n".join(lines))
        return 0
    from scaling_exps import launch

    return 0 if launch.launch(specs, configs[0]) else 1


def _options(command: str, words: list[str], arguments: list[tuple[str, dict[str, Any]]]) -> Any:
    import argparse

    parser = argparse.ArgumentParser(prog=f"scalerun {command}")
    for name, settings in arguments:
        parser.add_argument(name, **settings)
    return parser.parse_args(words)


def _runs_dir() -> Path:
    return Path(os.environ.get("SCALERUN_RUNS", "runs"))


if __name__ == "__main__":
    raise SystemExit(main())
