"""One tree of commands: the words a person types -> calls. No logic.

Exit codes: 0 done; 1 some run did not finish, or a bug (with its traceback); 2 what was typed cannot be done, and one
message says what was given, what is allowed and what to do; 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(argv: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words == ["--version"]:
            from scaling_exps import __version__

            print(f"scalerun {__version__}")
            return 0
        command = COMMANDS.get(words[0]) if words else None
        return command(words[1:]) if command else _train(words)
    except KeyboardInterrupt:
        print("interrupted; the same command again goes on from the newest checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `scalerun plan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ValueError as e:
        if not type(e).__module__.startswith("scaling_exps"):  # only our own errors are refusals
            raise
        for line in str(e).splitlines():
            print(f"scalerun: {line}", file=sys.stderr)
        return 2


def _train(words: list[str]) -> int:
    from scaling_exps import config, plan

    configs = config.compose(words)
    if not configs:  # --help, --cfg, --info: Hydra has answered
        return 0
    specs = plan.plan(configs)
    from scaling_exps import launch

    return 0 if launch.launch(specs, configs[0]) else 1


def _plan(words: list[str]) -> int:
    from scaling_exps import config, plan
    from scaling_exps.noise import validity

    configs = config.compose([w for w in words if w != "--json"])
    if not configs:
        return 0
    specs = plan.plan(configs)
    where = Path(configs[0].runs_dir), configs[0].noise_from
    if "--json" in words:
        predicted = validity.describe(specs, *where)
        rows = [{**row, "validity": predicted[spec.run_id]} for spec in specs for row in plan.describe(spec)]
        print(json.dumps(rows, indent=1))
    else:
        plan.print_plan(specs)
        print("\n".join(validity.lines(specs, *where)))
    return 0


def _status(words: list[str]) -> int:
    from scaling_exps import launch

    options = _options("status", words, _DIR, ("--json", {"action": "store_true", "help": "for machines"}))
    rows = launch.status(options.dir)
    print(json.dumps(rows, indent=1)) if options.json else launch.print_status(rows)
    return 0


def _cancel(words: list[str]) -> int:
    from scaling_exps import launch

    jobs = launch.cancel(_options("cancel", words, _DIR).dir)
    print(f"cancelled {len(jobs)} job(s)" + (f": {', '.join(jobs)}" if jobs else ""))
    return 0


def _report(words: list[str]) -> int:
    from scaling_exps import report

    return report.main(words, _runs_dir())


def _dashboard(words: list[str]) -> int:
    from scaling_exps.report import dashboard

    return dashboard.main(words, _runs_dir())


def _sync(words: list[str]) -> int:
    from scaling_exps import mirror

    options = _options("sync", words, _DIRS, ("--dry-run", {"action": "store_true", "help": "list the runs only"}))
    return mirror.sync(options.dirs or [_runs_dir()], options.dry_run)


def _theory(words: list[str]) -> int:
    from scaling_exps import theory

    return theory.main(words)


def _convert(words: list[str]) -> int:
    from scaling_exps import convert

    return convert.main(words)


def _fork(words: list[str]) -> int:
    from scaling_exps.train import fork

    return fork.main(words)


def _data(words: list[str]) -> int:
    from scaling_exps.data import fetch

    return fetch.main(words)


def _runs_dir() -> Path:
    return Path(os.environ.get("SCALERUN_RUNS", "runs"))


Argument = tuple[str, dict[str, Any]]
_DIR: Argument = ("dir", {"nargs": "?", "type": Path, "default": _runs_dir(), "help": "folder of runs (default: runs)"})
_DIRS: Argument = ("dirs", {"nargs": "*", "type": Path, "help": "folders of runs (default: runs)"})


def _options(command: str, words: list[str], *arguments: Argument) -> Any:
    parser = argparse.ArgumentParser(prog=f"scalerun {command}")
    for name, settings in arguments:
        parser.add_argument(name, **settings)
    return parser.parse_args(words)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "plan": _plan,
    "status": _status,
    "cancel": _cancel,
    "report": _report,
    "dashboard": _dashboard,
    "sync": _sync,
    "theory": _theory,
    "convert": _convert,
    "fork": _fork,
    "data": _data,
}


if __name__ == "__main__":
    raise SystemExit(main())
