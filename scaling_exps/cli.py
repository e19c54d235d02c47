"""The words a person types -> calls; exit codes; no logic.

0: done. 1: some run did not finish. 2: what was typed cannot be done; one message says what is allowed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


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
    if words == ["--version"]:
        from scaling_exps import __version__

        print(f"scalerun {__version__}")
        return 0
    if words and words[0] in COMMANDS:
        return COMMANDS[words[0]](words[1:])
    return _run(words)


def _run(words: list[str]) -> int:
    from scaling_exps import config, plan

    configs = config.compose(words)
    if not configs:  # --help, --cfg, --info: Hydra has answered
        return 0
    specs = plan.plan(configs)
    from scaling_exps import launch

    return 0 if launch.launch(specs, configs[0]) else 1


def _plan(words: list[str]) -> int:
    from scaling_exps import config, plan, validity

    configs = config.compose([w for w in words if w != "--json"])
    if not configs:
        return 0
    specs = plan.plan(configs)
    where = Path(configs[0].runs_dir), configs[0].noise
    if "--json" in words:
        told = {spec.run_id: validity.describe(spec, *where) for spec in specs}
        rows = [{**row, "validity": told[spec.run_id]} for spec in specs for row in plan.describe(spec)]
        print(json.dumps(rows, indent=1))
    else:
        lines = validity.lines(specs, *where)
        plan.print_plan(specs)
        print("\n".join(lines))
    return 0


def _status(words: list[str]) -> int:
    from scaling_exps import launch

    options = _options("status", words, [_DIR, ("--json", {"action": "store_true", "help": "for machines"})])
    rows = launch.status(Path(options.dir) if options.dir else _runs_dir())
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        launch.print_status(rows)
    return 0


def _cancel(words: list[str]) -> int:
    from scaling_exps import launch

    options = _options("cancel", words, [_DIR])
    jobs = launch.cancel(Path(options.dir) if options.dir else _runs_dir())
    print(f"cancelled {len(jobs)} job(s)" + (f": {', '.join(jobs)}" if jobs else ""))
    return 0


def _theory(words: list[str]) -> int:
    from scaling_exps import theory

    return theory.main(words)


def _convert(words: list[str]) -> int:
    from scaling_exps import convert

    return convert.main(words)


def _fork(words: list[str]) -> int:
    from scaling_exps import fork

    return fork.main(words)


_DIR: tuple[str, dict[str, Any]] = ("dir", {"nargs": "?", "default": None, "help": "folder of runs (default: runs)"})
_DIRS: tuple[str, dict[str, Any]] = ("dirs", {"nargs": "*", "help": "folders of runs (default: runs)"})


def _report(words: list[str]) -> int:
    from scaling_exps import report

    forms = ("json", "csv", "latex")
    options = _options(
        "report",
        words,
        [
            _DIRS,
            *((f"--{form}", {"action": "store_true", "help": f"print the comparison as {form}"}) for form in forms),
            ("--out", {"default": "report", "help": "folder of the page and the figures (default: report)"}),
            ("--pdf", {"action": "store_true", "help": "draw the figures as PDF too"}),
            ("--margin", {"action": "append", "metavar": "METRIC=VALUE", "help": "instead of those fixed beforehand"}),
            (
                "--watch",
                {"nargs": "?", "type": float, "const": 10, "metavar": "SECONDS", "help": "again until the sweep ends"},
            ),
        ],
    )
    chosen = [form for form in forms if getattr(options, form)]
    if len(chosen) > 1:
        raise report.ReportError(f"--{' and --'.join(chosen)} at once: choose one of {', '.join(forms)}")
    if options.watch is not None and not options.watch > 0:
        raise report.ReportError(f"--watch {options.watch:g}: give seconds > 0")
    return report.main(
        [Path(d) for d in options.dirs] or [_runs_dir()],
        Path(options.out),
        chosen[0] if chosen else "table",
        options.margin,
        options.watch,
        options.pdf,
    )


def _dashboard(words: list[str]) -> int:
    from scaling_exps.report import dashboard

    options = _options(
        "dashboard",
        words,
        [
            _DIRS,
            ("--entity", {"help": "wandb user or team (default: yours)"}),
            ("--project", {"help": "wandb project (default: WANDB_PROJECT, or scalerun)"}),
            ("--out", {"default": "report", "help": "folder of the specification (default: report)"}),
            ("--offline", {"action": "store_true", "help": "write the specification and publish nothing"}),
        ],
    )
    dirs = [Path(d) for d in options.dirs] or [_runs_dir()]
    return dashboard.publish(dirs, Path(options.out), options.entity, options.project, options.offline)


def _sync(words: list[str]) -> int:
    from scaling_exps.report import dashboard

    options = _options(
        "sync", words, [_DIRS, ("--dry-run", {"action": "store_true", "help": "list what would be uploaded"})]
    )
    return dashboard.sync([Path(d) for d in options.dirs] or [_runs_dir()], options.dry_run)


def _options(command: str, words: list[str], arguments: list[tuple[str, dict[str, Any]]]) -> Any:
    import argparse

    parser = argparse.ArgumentParser(prog=f"scalerun {command}")
    for name, settings in arguments:
        parser.add_argument(name, **settings)
    return parser.parse_args(words)


def _runs_dir() -> Path:
    return Path(os.environ.get("SCALERUN_RUNS", "runs"))


COMMANDS = {
    "plan": _plan,
    "status": _status,
    "cancel": _cancel,
    "report": _report,
    "dashboard": _dashboard,
    "sync": _sync,
    "theory": _theory,
    "convert": _convert,
    "fork": _fork,
}


if __name__ == "__main__":
    raise SystemExit(main())
