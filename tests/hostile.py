"""Generated command lines and damaged run folders: `python tests/hostile.py --lines N --folders N --seed S`.

Each command runs in a forked child of this process, which has imported everything, in a copy of a folder that holds a
small sweep. Printed is what went wrong, and a count of how the commands ended.

A command line is wrong if it ends by a traceback, or in no code of 0, 1, 2; if code 2 comes without a message of ours,
or after something was written; if it takes over 10 s of CPU. Those that compute for long are cut off after 10 s. Over
damaged folders, commands must name a run that cannot be read or is no more finished, and show the others as before.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import random
import re
import shutil
import signal
import string
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scaling_exps import cli, config, rules  # noqa: E402
from scaling_exps.config.compose import CONF  # noqa: E402
from scaling_exps.plan import PlanError  # noqa: E402
from scaling_exps.records import RunDir  # noqa: E402

LIMIT = 10.0  # seconds of CPU of a command
PATIENCE = 120.0  # seconds after which a command counts as hung
TINY = [
    "batch=[64,128]", "base=none", "recipe.batch=64", "recipe.micro_batch=32", "model.width=4", "recipe.epochs=null",
    "recipe.samples=256", "recipe.statistics_samples=64", "measure.evaluations=2", "measure.noise_records=2",
    "checkpoint.keep=[0.5]",
]  # fmt: skip
SWEEP = [*TINY, "seed=[0,1]", "logger=wandb"]
DRY = ["launch=slurm", "launch.dry_run=true", "launch.node_local=[]", "launch.gpus=false"]  # it trains nothing
POOR = re.compile(  # what a library says, and nobody understands
    r"mismatched input|extraneous input|token recognition|no viable|embedded null|hydra\.cc|HYDRA_FULL|<class"
    r"|0x[0-9a-f]{8}|object at |NoneType|object has no|Errno|codec can't|surrogates not allowed|[Oo]verflow"
    r"|list index|unhashable"
)


@dataclass(frozen=True)
class Ended:
    code: int | None  # None: cut off
    seconds: float  # of CPU, its children's included
    out: str
    err: str


def command(words: list[str], cwd: Path, patience: float = PATIENCE) -> Ended:
    """What a user gets who types `scalerun WORDS` in `cwd`, at no terminal."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        end = time.monotonic() + patience
        if not (pid := os.fork()):
            _child(words, cwd, out.fileno(), err.fileno())
        done = 0
        while not done:
            if cut := time.monotonic() > end:
                os.killpg(pid, signal.SIGKILL)
            done, status, used = os.wait4(pid, 0 if cut else os.WNOHANG)
            time.sleep(0 if done else 0.005)
        texts = (f.seek(0) or f.read().decode(errors="replace") for f in (out, err))
        code = None if cut else os.waitstatus_to_exitcode(status)
        return Ended(code, used.ru_utime + used.ru_stime, *texts)


def works(words: list[str]) -> bool:
    """Whether it computes for long where it is legal."""
    trains = not (words and words[0] in cli.COMMANDS) and DRY[1] not in words
    return trains or words[:1] in (["fork"], ["theory"]) or "cost.probe=true" in words or "cost=probe" in words


def _child(words: list[str], cwd: Path, out: int, err: int) -> None:
    code: Any = 1
    try:
        os.setsid()
        for number, descriptor in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out), (2, err)):
            os.dup2(descriptor, number)
        sys.stdin = open(0)  # noqa: SIM115
        sys.modules["__main__"] = cli  # what a process that it starts imports first
        os.chdir(cwd)
        code = cli.main(words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def sweep(folder: Path) -> None:
    """A finished sweep under `folder`/runs, and files that the command lines name."""
    folder.mkdir()
    done = command(SWEEP, folder, 3 * PATIENCE)
    assert done.code == 0, done
    (folder / "recipe.yaml").write_text("learning_rate: 1e-3\nper_device_train_batch_size: 8\nadam_beta2: 0.99\n")
    (folder / "notes.txt").write_text("words\n" * 99)
    (folder / "a b").mkdir()


def content(folder: Path) -> dict[str, Any]:
    """Every file below, by its size and time."""
    return {
        str(p): (s.st_size, s.st_mtime_ns)
        for p in folder.rglob("*")
        if (s := p.lstat()) and not p.is_dir() and p.name != "lock"
    }


# ---- command lines ----

ODD = [
    "", "null", "None", "nan", "-nan", "inf", "-inf", "-1", "0", "1", "-0.0", "0.5", "1e300", "1e-300", "1e20",
    "9" * 30, "1e9999", "true", "false", "yes", "0x10", "1_000", "1,000", "1.5e", "[]", "[1,2]", "[1,1]", "[[1]]",
    "[1,a,null]", "{}", "{a:1}", "{a:{b:c}}", "[", "]", "{", "}", "(", ")", "${x}", "${oc.env:HOME}", "${",
    "$(touch owned)", "`id`", "'", '"', "it's", "a b", " ", "\t", "a\nb", "\udcff", "é", "κ", "😀", "\u202e", "..",
    "../..", "/", "/dev/null", "/dev/zero", "/proc/self/mem", "/etc/passwd", "~", "~root", ".", "-", "--", "---", "=",
    "==", "a=b", "*", "?", "%s", "%(x)s", "\\", "\\x", "#", ":", ";", "&", "|", "!", "@", "@x", "+", "x" * 5000,
    "runs", "recipe.yaml", "notes.txt", "a b", "range(3)", "choice(1,2)", "interval(0,1)", "glob(*)", "sort(3,2)",
    "shuffle(1,2)", "???", "int(3)", "!!python/object:os.system", "json_str('1')", "tag(a,1)", "1-3", "1..3", "8192",
    "256", "sqrt", "adam", "resnet8",
]  # fmt: skip
FLAGS = [
    "-m", "--multirun", "--cfg", "--cfg job", "--cfg all", "--info", "--info all", "--info plugins", "--resolve",
    "--package model", "-p", "--config-dir conf", "--config-dir=/nowhere", "-cd .", "--config-path x",
    "--config-name x", "--run", "--version", "--hydra-help", "--shell-completion", "--experimental-rerun x.pickle",
    "-sc install=bash", "-h", "--help", "--json", "--full", "--figure f.png", "--figure", "--out", "--out o", "--yes",
    "--seed 3", "--seed x", "--dry-run", "--watch 0", "--watch nan", "--margin x", "--margin test_loss=nan",
    "--margin train_loss=0.1", "--latex", "--pdf", "--batch 512", "--batch x", "--devices 8", "--to hf",
    "--to safetensors", "--offline", "--at 0.5", "--at x", "--kappa 4", "--kappa x", "--kappa 1e300", "--repeats 0",
    "--tolerance nan", "--rule linear", "--rule x", "--beta-map power", "--beta-map x", "--from a", "--from", "-x",
    "--", "--lr 0.1", "--verbose", "-vvv", "--force",
]  # fmt: skip


def lines(seed: int, count: int) -> Iterator[list[str]]:
    """`count` command lines over all commands: about one in six as a person should type it, the rest spoilt."""
    chance = random.Random(seed)
    keys = config.keys()
    groups = {g.name: [p.stem for p in g.glob("*.yaml")] for g in CONF.iterdir() if g.is_dir() and g.name != "hydra"}
    names = [*cli.COMMANDS]

    def key() -> str:
        k = chance.choice(keys)
        return f"{k.name}={chance.choice([*(k.options or ODD), *ODD[:20]])}"

    def group() -> str:
        g = chance.choice([*groups])
        return f"{g}={chance.choice(groups[g])}"

    def overrides() -> list[str]:
        rule = chance.choice(["sqrt", "none", "[sqrt,none]", "linear", chance.choice([*rules.RULES])])
        some = [f"batch={chance.choice(['256', '[64,128]', '1024'])}", f"rule={rule}"]
        return [*some, *(chance.choice([key, group])() for _ in range(chance.choice([0, 0, 0, 1, 2])))]

    def run() -> str:
        return chance.choice(["runs/FIRST", "runs/SECOND", "FIRST", "runs", "nowhere", "notes.txt", *ODD])

    usual: dict[str, Callable[[], list[str]]] = {
        "plan": lambda: ["plan", *overrides()],
        "status": lambda: ["status", chance.choice(["runs", "nowhere", "notes.txt"])],
        "show": lambda: ["show", run()],
        "diff": lambda: ["diff", run(), run()],
        "rm": lambda: ["rm", run()],
        "cancel": lambda: ["cancel", chance.choice(["runs", "nowhere", "notes.txt"])],
        "report": lambda: ["report", chance.choice(["runs", "nowhere", "notes.txt", "runs/FIRST"])],
        "dashboard": lambda: ["dashboard", "--offline", chance.choice(["runs", "nowhere", "notes.txt"])],
        "sync": lambda: ["sync", chance.choice(["runs", "nowhere", "notes.txt"])],
        "theory": lambda: ["theory", chance.choice(["weak", "beta1", "svag", "nothing"])],
        "convert": lambda: [
            "convert",
            chance.choice(["recipe.yaml", "notes.txt", "runs", "nowhere"]),
            "--batch",
            "512",
        ],
        "fork": lambda: ["fork", run()],
        "import": lambda: ["import", chance.choice([run(), "trainer_state.json", "nowhere"]), "--batch", "32"],
        "export": lambda: ["export", run(), "--to", chance.choice(["safetensors", "hf", "onnx"])],
        "data": lambda: ["data", chance.choice(["cifar10", "digits", "wikitext103", "nothing"])],
        "completion": lambda: ["completion", chance.choice(["bash", "zsh", "fish", "csh"])],
    }
    slow = {"theory", "fork"}  # what is legal takes minutes

    def spoil(words: list[str]) -> list[str]:
        i = chance.randrange(len(words))
        word, odd = words[i], chance.choice(ODD)
        j = chance.randrange(len(word) + 1)
        name, equal, value = word.partition("=")
        spoilt = chance.choice(
            [
                [name + "=" + odd],
                [name + equal + value + odd],
                [word[:j] + word[j + 1 :]],
                [word[:j] + chance.choice(string.printable) + word[j:]],
                [chance.choice(["-", "--", "+", "++", "~", "@", "+~", "hydra."]) + word],
                [word, odd],
                [word, f"{name}={odd}"],
                [word, word],
                [word, *chance.choice(FLAGS).split()],
                [word, *chance.choice(FLAGS).split()],
                [name + equal, value],
                [name, "=", value],
                [word.upper()],
                [],
                [key()],
                [f"{name}={odd},{value}"],
                [f"{name}=[{value},{odd}]"],
                [f"{name}.{odd}={value}"],
                [f"{chance.choice(keys).name}={odd}"],
            ]
        )
        return [*words[:i], *spoilt, *words[i + 1 :]]

    for _ in range(count):
        name = chance.choice(["train", "train", "train", "plan", "plan", "plan", "report", *names])
        words = overrides() if name == "train" else usual[name]()
        for _ in range(chance.choice([1, 1, 2, 3] if name in slow else [0, 1, 1, 1, 2, 3])):
            words = spoil(words) if words else [chance.choice(ODD)]
        yield [*words, *DRY] if name == "train" else words


def fault(words: list[str], ended: Ended, written: list[str]) -> str:
    """What is wrong with how a command line ended; empty if nothing is."""
    said = ended.out + ended.err
    if "Traceback (most recent call last)" in said:
        return "traceback"
    if ended.code is None:
        return "" if works(words) else f"hangs: over {PATIENCE:g} s"
    if ended.seconds > LIMIT:
        return f"over {LIMIT:g} s of CPU"
    if ended.code not in (0, 1, 2):
        return f"code {ended.code}"
    if ended.code == 2 and written:
        return f"refused, and wrote {written[0]}"
    if ended.code == 2 and not re.match(r"scalerun( \w+)?: ", ended.err):
        return "code 2 without a message"
    if ended.code == 2 and (poor := POOR.search(ended.err)):
        return f"poor message: {poor[0]}"
    if ended.code == 2 and len(ended.err) > 6000:
        return "message of over 6,000 letters"
    return ""


def try_lines(seed: int, count: int, folder: Path) -> tuple[collections.Counter[str], list[str]]:
    """How the command lines ended, by code, and those that are wrong."""
    place, ends, wrong = folder / "place", collections.Counter[str](), []
    ids = sorted(p.name for p in (folder / "sweep/runs").iterdir() if (p / "run.json").exists())
    before: dict[str, Any] = {}
    for words in lines(seed, count):
        words = [w.replace("FIRST", ids[0]).replace("SECOND", ids[1]) for w in words]
        if not before:
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(folder / "sweep", place)
            before = content(place)
        ended = command(words, place, LIMIT if works(words) else PATIENCE)
        after = content(place)
        written = sorted(f for f in {*before, *after} if before.get(f) != after.get(f))
        ends[f"{'cut off' if ended.code is None else f'code {ended.code}'}"] += 1
        if why := fault(words, ended, written):
            wrong.append(f"{why}\n    {words!r}\n    {ended.code} {ended.seconds:.1f} s\n    {ended.err[-600:]}")
            print(wrong[-1], flush=True)
        if written:
            before = {}
    return ends, wrong


# ---- damaged run folders ----

VALUES = [
    None,
    -1,
    0,
    1.5,
    1e300,
    -1e308,
    math.nan,
    math.inf,
    10**30,
    2**63,
    "",
    "x",
    "\0",
    [],
    {},
    [[]],
    True,
    "9",
    {"a": 1},
]


def damage(run: Path, chance: random.Random) -> str:
    """Spoil one file of a run's folder, or the folder; returns what was done."""
    files = sorted(p for p in run.iterdir() if p.suffix in (".json", ".jsonl", ".pt", ".txt") or p.name == "lock")
    file = chance.choice([*files, *(p for p in files if p.suffix in (".json", ".jsonl")), run])
    raw = b"" if file == run else file.read_bytes()
    at = chance.randrange(len(raw) + 1)
    lines = raw.splitlines(keepends=True)
    swapped = chance.sample(lines, len(lines))

    def anew(make: Callable[[Path], Any]) -> Callable[[], Any]:
        def do() -> None:
            shutil.rmtree(file) if file == run else file.unlink()
            make(file)

        return do

    def write(content: bytes) -> Callable[[], Any]:
        return lambda: file.write_bytes(content)

    def value() -> None:
        """Another value, or none, somewhere in a JSON file."""
        i = chance.randrange(len(lines)) if file.suffix == ".jsonl" else 0
        top = at = json.loads(lines[i] if file.suffix == ".jsonl" else raw)
        key = chance.choice([*top])
        while isinstance(at[key], dict | list) and at[key] and chance.random() < 0.8:
            at = at[key]
            key = chance.choice([*at] if isinstance(at, dict) else range(len(at)))
        if chance.random() < 0.2:
            del at[key]
        else:
            at[key] = chance.choice(VALUES)
        changed = json.dumps(top).encode() + b"\n"
        file.write_bytes(b"".join([*lines[:i], changed, *lines[i + 1 :]]) if file.suffix == ".jsonl" else changed)

    kinds: dict[str, Callable[[], Any]] = {
        "a folder": anew(lambda p: p.mkdir()),
        "a fifo": anew(os.mkfifo),
        "a link to nothing": anew(lambda p: p.symlink_to("nowhere")),
        "a link to itself": anew(lambda p: p.symlink_to(p)),
        "a link to /dev/zero": anew(lambda p: p.symlink_to("/dev/zero")),
        "empty": anew(lambda p: p.touch()),
        "gone": anew(lambda p: None),
    }
    if file != run and raw:
        flipped = bytearray(raw)
        for _ in range(chance.randrange(1, 4)):
            flipped[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        kinds |= {
            "cut": write(raw[:at]),
            "zeros to the end": write(raw[:at] + bytes(len(raw) - at)),
            "flipped bits": write(bytes(flipped)),
            "noise": write(chance.randbytes(99)),
            "doubled": write(raw + raw),
            "lines in disorder": write(b"".join(swapped)),
            "DOS lines": write(raw.replace(b"\n", b"\r\n")),
            "a mark at the start": write(b"\xef\xbb\xbf" + raw),
            "a hole in it": write(raw[:at] + raw[at + chance.randrange(1, 99) :]),
        }
        if file.suffix in (".json", ".jsonl"):
            kinds |= {f"a value {i}": value for i in range(8)}
    kind = chance.choice([*kinds])
    kinds[kind]()
    return f"{'the folder' if file == run else re.sub('[0-9]+', 'N', file.name)}: {kind.rstrip(' 0123456789')}"


def look(line: list[str], place: Path, usual: dict[str, Any], readable: dict[str, bool], bad: list[str]) -> str:
    """What is wrong with how a command ended over damaged runs: `bad` must be named, the others served."""
    ended = command(line, place)
    said, why = ended.out + ended.err, fault(line, ended, [])
    if why:
        return f"{why}\n    {said[-600:]}"
    good = line[0] == "show" and line[1].removeprefix("runs/") not in readable
    if ended.code and (good or line[0] in ("status", "report", "dashboard", "cancel", "sync")):
        return f"code {ended.code}\n    {said[-600:]}"
    unnamed = [r for r in bad if r[:8] not in said and not (readable[r] and line[0] not in ("status", "report"))]
    if unnamed and line[0] not in ("cancel", "rm", "show", "diff", "export"):
        return f"does not name {unnamed}\n    {said[-600:]}"
    if line == ["status", "--json"]:
        rows = {r["run_id"]: r for r in json.loads(ended.out)}
        if lost := [r for r in usual if r not in readable and rows.get(r) != usual[r]]:
            return f"takes {lost} with it"
    return ""


def try_folders(seed: int, count: int, folder: Path) -> tuple[collections.Counter[str], list[str]]:
    """What was damaged, and which command went wrong: three of four runs are damaged at a time."""
    chance, words = random.Random(seed), [*SWEEP, *DRY]
    place, ends, wrong = folder / "place", collections.Counter[str](), []
    usual = {r["run_id"]: r for r in json.loads(command(["status", "--json"], folder / "sweep").out)}
    for turn in range(0, count, 3):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder / "sweep", place)
        *spoilt, good = chance.sample([*usual], 4)
        what = {r: damage(place / "runs" / r, chance) for r in spoilt[: count - turn]}
        ends.update(what.values())
        readable, bad = dict.fromkeys(what, True), []
        for run_dir in (RunDir(place / "runs" / r) for r in what):
            try:
                run_dir.spec()
            except PlanError:
                readable[run_dir.path.name] = False
            if run_dir.exists and not (readable[run_dir.path.name] and run_dir.state() == "finished"):
                bad.append(run_dir.path.name)
        forms = [[], ["--json"]] if turn % 30 == 0 else [["--json"]]
        lines = [["status"], ["status", "--json"], *(["report", *form] for form in forms), ["dashboard", "--offline"]]
        lines += [["cancel"], ["sync", "--dry-run"], words, ["show", f"runs/{good}"]]
        for run in what:
            lines += [["show", f"runs/{run}"], ["diff", f"runs/{good}", f"runs/{run}"], ["rm", f"runs/{run}", "--yes"]]
            lines.insert(0, ["export", f"runs/{run}", "--to", "safetensors"])
        for line in lines:
            if why := look(line, place, usual, readable, bad):
                wrong.append(f"{what}: {line[:2]}: {why}")
                print(wrong[-1], flush=True)
    return ends, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=0, help="how many")
    parser.add_argument("--folders", type=int, default=0, help="how many")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ |= {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    os.environ.pop("COLUMNS", None)
    for module in (
        "launch",
        "report.page",
        "report.figures",
        "train.export",
        "train.fork",
        "theory",
        "convert",
        "cost",
    ):
        import_module(f"scaling_exps.{module}")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        sweep(Path(folder) / "sweep")
        for name, tried, count in (("lines", try_lines, options.lines), ("folders", try_folders, options.folders)):
            ends, wrong = tried(options.seed, count, Path(folder))
            row = {"seed": options.seed, name: count, "wrong": len(wrong), **dict(ends.most_common())}
            print(json.dumps(row), flush=True)
            found += wrong
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
