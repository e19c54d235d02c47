"""Single runs: looked at, compared, thrown away."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable
from typing import Any

import msgspec

from scaling_exps.launch import overview
from scaling_exps.launch.folders import LaunchError
from scaling_exps.plan import RunSpec, amount, print_lines, print_run
from scaling_exps.records import BusyError, RunDir, find

_SAID_ELSEWHERE = ("status", "reason", "traceback", "metrics", "ended", "records_checksum")  # of a result


def show(word: str) -> None:
    """Print the run's recipe, placement, state, result, last records and files.

    Raises:
        FindError, PlanError: there is no such run, or it cannot be read.
    """
    run_dir = find(word)
    spec, result = run_dir.spec(), run_dir.result() or {}
    (row,) = overview.describe([run_dir])
    print_run(spec)
    print(f"\n{row['state']}, {row['samples'] / row['total']:.0%} of {row['total']:,} samples, in {run_dir}")
    lines = [row["detail"]] if row["detail"] else []
    lines += [f"{k}: {_text(v)}" for k, v in result.items() if k not in _SAID_ELSEWHERE]
    print_lines("  " + line for line in [_fields(result.get("metrics") or {}), *lines] if line)
    last: dict[str, dict[str, Any]] = {}
    for record in run_dir.newest_records():
        last.setdefault(record["kind"], record)
    print_lines(["", *(f"last {kind}: {_fields({**r, 'kind': None})}" for kind, r in last.items()), ""])
    for entry in _entries(run_dir):
        size = "" if entry.is_dir(follow_symlinks=False) else amount(entry.stat(follow_symlinks=False).st_size, "bytes")
        print(f"  {size:>10}  {entry.name}{' (link)' if entry.is_symlink() else ''}")


def diff(first: str, second: str) -> None:
    """Print what differs between two runs: science, how the rule led to it, settings, machine and code, result.

    Raises:
        FindError, PlanError: one of them is no run, or cannot be read.
    """
    run_dirs = find(first), find(second)
    specs, results = [d.spec() for d in run_dirs], [d.result() or {} for d in run_dirs]
    print_lines(f"{name}: {overview.title(spec)}  [{d}]" for name, d, spec in zip("AB", run_dirs, specs, strict=True))
    science, rest = zip(*(_parts(spec) for spec in specs), strict=True)
    _differences("science", science, "nothing: they are one run" if specs[0].run_id == specs[1].run_id else "nothing")
    _differences("recipe and rule", [r.pop("arms")[0] for r in rest])
    _differences("settings", rest)
    ends = [{k: v for k, v in r.items() if k not in _SAID_ELSEWHERE or k == "status"} for r in results]
    _differences("machine, code and how it ended", ends)
    metrics = [r.get("metrics", {}) for r in results]
    print("metrics")
    for name in dict.fromkeys(k for m in metrics for k in m):
        a, b = (m.get(name) for m in metrics)
        change = f"  ({b - a:+.4g})" if a is not None and b is not None else ""
        print(f"  {name}: {_text(a)} -> {_text(b)}{change}")


def remove(words: list[str], yes: bool) -> bool:
    """List what goes, ask, and remove the folders of runs; returns whether it was removed.

    A run folder holds files alone, so what holds a folder is none. A link is removed, what it points to stays.

    Raises:
        FindError, LaunchError: one is no run folder, runs or is queued, or nobody can be asked; nothing is removed.
    """
    run_dirs = list(dict.fromkeys(map(find, words)))
    rows = {d: overview.describe([d], strict=True)[0] for d in run_dirs}
    faults = []
    for d, row in rows.items():  # who holds a finished run measures its noise
        if (state := "running" if d.holder() else row["state"]) in ("running", "queued"):
            faults.append(f"{d} is {state}: scalerun cancel, or stop it")
    for d in run_dirs:
        if os.path.islink(d.path) or not stat.S_ISREG(os.lstat(d.path / "run.json").st_mode):
            faults.append(f"{d} is no run folder: it, or its run.json, is a link or no file; remove it by hand")
        elif inside := [e.name for e in _entries(d) if e.is_dir(follow_symlinks=False)]:
            faults.append(f"{d} is no run folder: it holds the folder {inside[0]!r}; remove that by hand")
    if faults:
        raise LaunchError("\n".join(faults))
    for d, row in rows.items():
        sizes = [e.stat(follow_symlinks=False).st_size for e in _entries(d)]
        print(f"{d}  {row['state']}, {len(sizes)} files, {amount(sum(sizes), 'bytes')}")
    if not yes:
        if not sys.stdin.isatty():
            raise LaunchError("nobody can be asked without a terminal: give --yes; nothing is removed")
        if input(f"remove {len(run_dirs)} run(s)? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing is removed")
            return False
    for d in run_dirs:
        try:
            with d.lock():
                last = ("run.json", "lock")  # until these go, it is a run that can be removed again
                for name in [*(e.name for e in _entries(d) if e.name not in last), *last]:
                    (d.path / name).unlink()
            d.path.rmdir()
        except (BusyError, OSError) as e:
            why = f"{e.strerror} ({e.filename})" if isinstance(e, OSError) else e
            raise LaunchError(f"{d} is not removed: {why}") from e
    print(f"removed {len(run_dirs)} run(s)")
    return True


def _entries(run_dir: RunDir) -> list[os.DirEntry[str]]:
    with os.scandir(run_dir.path) as entries:
        return sorted(entries, key=lambda e: e.name)


def _parts(spec: RunSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    """The science, and the rest."""
    rest = spec.to_json()
    del rest["run_id"]
    return rest.pop("science"), rest


def _differences(title: str, sides: Iterable[dict[str, Any]], none: str = "nothing") -> None:
    a, b = map(_flat, sides)
    print(title)
    keys = [k for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)]
    print_lines([f"  {k}: {_text(a.get(k))} -> {_text(b.get(k))}" for k in keys] or [f"  {none}"])


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    inside = [_flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v} for k, v in value.items()]
    return {k: v for part in inside for k, v in part.items()}


def _fields(values: dict[str, Any]) -> str:
    return ", ".join(f"{k} {_text(v)}" for k, v in values.items() if v is not None)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return _fields(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    return "–" if value is None else value if isinstance(value, str) else msgspec.json.encode(value).decode()
