"""One tree of commands: the words a person types -> calls. No logic.

Exit codes: 0 done; 1 some run did not finish, or a bug (with its traceback); 2 what was typed cannot be done, and one
message says what was given, what is allowed and what to do; 130 Ctrl-C.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from scaling_exps.words import Parser, UsageError, nearest


def main(argv: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words == ["--version"]:
            from scaling_exps import __version__

            print(f"scalerun {__version__}")
            return 0
        if words[:1] == ["help"]:  # of a command, or of all
            return main([*words[1:2], "--help"])
        command = COMMANDS.get(words[0]) if words else None
        return command(words[1:]) if command else _train(words)
    except SystemExit as e:  # --help
        return int(e.code or 0)
    except KeyboardInterrupt:
        print("interrupted; the same command again goes on from the newest checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `scalerun plan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        if e.errno != errno.ENAMETOOLONG:
            raise
        print(f"scalerun: {str(e.filename)[:60]!r}... is longer than a file's name can be", file=sys.stderr)
        return 2
    except ValueError as e:
        if not type(e).__module__.startswith("scaling_exps"):  # only our own errors are refusals
            raise
        for line in str(e).splitlines():
            said = re.sub(r"\S{1000,}", lambda word: word[0][:60] + "...", line)
            print(f"scalerun: {said}", file=sys.stderr)
        return 2


def _train(words: list[str]) -> int:
    from scaling_exps import config, plan

    if words and words[0][:1] not in "-+~" and "=" not in words[0]:
        keys = {k.name: f"{k.name}=..." for k in config.keys()}  # noqa: SIM118 (no dictionary)
        hint = nearest(words[0], COMMANDS) or nearest(keys.get(words[0], words[0]), keys.values())
        raise UsageError(f"{words[0]!r} is neither key=value nor a command{hint}; commands: {', '.join(COMMANDS)}")
    configs = config.compose(words)
    if not configs:  # --help, --cfg, --info: Hydra has answered
        return 0
    from scaling_exps.noise import ramp

    configs, said = ramp.resolve(configs)
    plan.print_lines(said)
    specs = plan.plan(configs)
    added = plan.lacking(configs, specs)
    plan.print_lines(plan.added(added))
    from scaling_exps import cost, launch

    launch.check(added + specs, configs[0])  # before a probe spends a minute
    specs, said = cost.compiled(added + specs, configs[0])
    plan.print_lines(said)
    return 0 if launch.launch(specs, configs[0]) else 1


def _plan(words: list[str]) -> int:
    parser = Parser(
        prog="scalerun plan",
        usage="scalerun plan [--full | --json] [--figure FILE] [key=value ...]",
        description="What would run, with which numbers, at what cost and gain. Nothing is trained or written.",
        epilog="Keys and groups: scalerun --help; their ranges and meanings: docs/keys.md; rules: docs/rules.md. "
        "Hydra's flags work, too: -m, --cfg job, --config-dir DIR",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="one object for each run, for machines")
    parser.add_argument("--full", action="store_true", help="every number, base -> scaled, and every run")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw time against batch")
    options, rest = parser.parse_known_args(words)
    from scaling_exps import config, plan

    configs = config.compose(rest, parser.flags)
    if not configs:
        return 0
    from scaling_exps import cost, launch
    from scaling_exps.noise import ramp, tradeoff, validity

    configs, said = ramp.resolve(configs)
    asked = plan.plan(configs)
    added = plan.lacking(configs, asked)
    specs, where = added + asked, (Path(configs[0].runs_dir), configs[0].noise_from)
    margins: list[str] = []
    if configs[0].margin.auto:
        proposal = launch.proposed(specs, where[0])
        specs, margins = proposal.specs, proposal.lines
    remarks = launch.check(specs, configs[0])
    specs, decided = cost.compiled(specs, configs[0])
    costs = cost.estimate(specs, configs)
    predicted = validity.describe(specs, *where)
    trades, batches = tradeoff.of(specs, *where), [s.science.batch for s in specs]
    if options.json:
        beside = {s.run_id: {"validity": predicted[s.run_id], "cost": costs[s.run_id]} for s in specs}
        print(json.dumps([{**row, **beside[s.run_id]} for s in specs for row in plan.describe(s)], indent=1))
    else:
        plan.print_plan(specs, costs, predicted, full=options.full)
        missing = [row["text"] for row in predicted.values() if row["source"] is None]
        said += [*cost.lines(costs, configs[0]), *decided, *missing, *remarks, *margins]
        plan.print_lines(dict.fromkeys([*plan.added(added), *said, *(tradeoff.paragraph(t, batches) for t in trades)]))
    if options.figure is not None:
        try:
            tradeoff.draw(trades, batches, options.figure, asked)
        except tradeoff.NothingToDrawError as e:
            print(f"scalerun: {e}", file=sys.stderr)
    return 0


def _status(words: list[str]) -> int:
    from scaling_exps import launch
    from scaling_exps.records import RUNS

    parser = Parser(prog="scalerun status")
    parser.add_argument("dir", nargs="?", type=Path, default=RUNS, help="folder of runs (default: runs)")
    parser.add_argument("--json", action="store_true", help="for machines")
    options = parser.parse_args(words)
    rows = launch.status(options.dir)
    print(json.dumps(rows, indent=1)) if options.json else launch.print_status(rows)
    return 0


def _show(words: list[str]) -> int:
    from scaling_exps import launch

    parser = Parser(
        prog="scalerun show", description="One run: its recipe, how it stands, its last records, its files."
    )
    parser.add_argument("run", help=RUN)
    launch.show(parser.parse_args(words).run)
    return 0


def _diff(words: list[str]) -> int:
    from scaling_exps import launch

    parser = Parser(
        prog="scalerun diff", description="What differs: the science, the settings, the machine, the result."
    )
    parser.add_argument("a", help=RUN)
    parser.add_argument("b", help="the other")
    options = parser.parse_args(words)
    launch.diff(options.a, options.b)
    return 0


def _rm(words: list[str]) -> int:
    from scaling_exps import launch

    parser = Parser(prog="scalerun rm", description="Remove runs, after a question; never one that runs or is queued.")
    parser.add_argument("runs", nargs="+", metavar="run", help=RUN)
    parser.add_argument("--yes", action="store_true", help="do not ask")
    options = parser.parse_args(words)
    return 0 if launch.remove(options.runs, options.yes) else 1


def _cancel(words: list[str]) -> int:
    from scaling_exps import launch
    from scaling_exps.records import RUNS

    parser = Parser(prog="scalerun cancel")
    parser.add_argument("dir", nargs="?", type=Path, default=RUNS, help="folder of runs (default: runs)")
    jobs = launch.cancel(parser.parse_args(words).dir)
    print(f"cancelled {len(jobs)} job(s)" + (f": {', '.join(jobs)}" if jobs else ""))
    return 0


def _sync(words: list[str]) -> int:
    from scaling_exps import mirror
    from scaling_exps.records import RUNS

    parser = Parser(prog="scalerun sync")
    parser.add_argument("dirs", nargs="*", type=Path, default=[RUNS], help="folders of runs (default: runs)")
    parser.add_argument("--dry-run", action="store_true", help="list the runs only")
    options = parser.parse_args(words)
    return mirror.sync(options.dirs, options.dry_run)


def _completion(words: list[str]) -> int:
    from scaling_exps.config import complete

    parser = Parser(
        prog="scalerun completion",
        description="Print the completion of commands, keys and options, to be sourced by a shell.",
        epilog='bash, zsh: eval "$(scalerun completion bash)" in ~/.bashrc, ~/.zshrc; fish: scalerun completion fish '
        "> ~/.config/fish/completions/scalerun.fish",
    )
    parser.add_argument("shell", choices=list(complete.SHELLS))
    print(complete.script(parser.parse_args(words).shell, list(COMMANDS)))
    return 0


def _of(module: str) -> Callable[[list[str]], int]:
    """The command that is the `main` of a module; it is imported when it is typed."""
    return lambda words: int(importlib.import_module(f"scaling_exps.{module}").main(words))


RUN = "a run's folder, or the beginning of its id below runs/"

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "plan": _plan,
    "status": _status,
    "show": _show,
    "diff": _diff,
    "rm": _rm,
    "cancel": _cancel,
    "report": _of("report"),
    "dashboard": _of("report.dashboard"),
    "sync": _sync,
    "theory": _of("theory"),
    "convert": _of("convert"),
    "fork": _of("train.fork"),
    "import": _of("trainers.foreign"),
    "export": _of("train.export"),
    "data": _of("data.fetch"),
    "completion": _completion,
}


if __name__ == "__main__":
    raise SystemExit(main())
