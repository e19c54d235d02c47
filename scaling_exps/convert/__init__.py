"""Recipes in and out of other trainers: read the base recipe, scale it, write it back.

    scalerun convert in.yaml --batch 8192 --devices 8

Only values that the rule moves change; the rest of the file stays, to the byte. Every key that could decide the
optimizer, the batch, a rate, a clock or an average is understood or named in the report; one that could change the
batch or the optimizer and is not understood is refused. The recipe goes to standard output, the report to standard
error.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path as File

from scaling_exps.convert.anew import anew
from scaling_exps.convert.coverage import Coverage, coupled, coverage
from scaling_exps.convert.documents import KEYS, Document, open_document, read_file
from scaling_exps.convert.forms import FORMS, guess
from scaling_exps.convert.forms.own import pair
from scaling_exps.convert.job import Edit, Recipe, agree, read, sentence
from scaling_exps.convert.layout import Layout
from scaling_exps.rules import OPTIMIZERS, BetaMap, Clip, Hyper, Move, Rule, RuleError, find, spelled
from scaling_exps.words import Parser, UsageError

WRITTEN = [form for form in FORMS if "new" in KEYS[form]]  # those of which a new file can be made


@dataclass(frozen=True)
class Conversion:
    text: str
    sentence: str  # "base: 4 per device × 8 data-parallel × 2 accumulation = 64"
    source: str  # the form that was read
    base: Recipe
    scaled: Recipe
    rule: Rule
    move: Move
    changes: tuple[str, ...]  # "optimizer.lr: 0.001 -> 0.002"
    notes: tuple[str, ...]
    coverage: Coverage
    partners: tuple[tuple[str, str], ...] = ()  # (text, name) of each, after the move


def convert(
    text: str,
    source: str | None = None,
    target: str | None = None,
    *,
    batch: int,
    rule: str | None = None,
    devices: int | None = None,
    new_devices: int | None = None,
    duration: float = 1.0,
    noise_scale: float | None = None,
    beta_map: BetaMap = "linear",
    clip: Clip = "keep",
    keep: Sequence[str] = (),
    partners: Sequence[tuple[str, str]] = (),
    where: str = "the recipe",
) -> Conversion:
    """Move the recipe in `text` to the global batch `batch`.

    Args:
        text: a recipe.
        source: a name of FORMS; None is the one that its keys say.
        target: a name of WRITTEN; None is the same.
        batch: new global batch, in examples.
        rule: a rule's name; the optimizer's own where None.
        devices: all devices of the base run, where the file does not say; those that share a replica by the parallel
            degrees in the file are divided out.
        new_devices: those of the new run; None is as many.
        duration, noise_scale, beta_map: as in `scale`.
        clip: "keep" the clipping threshold, or move it by the "rule" of the gradient's norm, 1/√κ.
        keep: keys of which you say that they decide neither the batch nor the optimizer.
        partners: (text, name) of files that belong to this one: DeepSpeed's, accelerate's.
        where: how messages call the file.

    Raises:
        RuleError: what is missing, unknown, not a number, not understood, or refused by the rule.
    """
    for name, allowed in ((source, FORMS), (target, WRITTEN)):
        if name is not None and name not in allowed:
            raise RuleError(f"unknown form {name!r}; allowed: {', '.join(allowed)}")
    for name, value in (("batch", batch), ("devices", devices), ("new_devices", new_devices)):
        if value is not None and not 1 <= value <= 10**12:
            raise RuleError(f"{name}={value} must be a whole number from 1 to 10^12")
    doc = open_document(text, where)
    doc.guessed = source is None
    source = source or guess(doc)
    layout = _layout(doc, source, partners)
    coverage(layout, keep)
    base = read(layout, devices)
    agree(layout, base)
    optimizer, family = OPTIMIZERS[layout.optimizer], OPTIMIZERS[layout.optimizer].family
    l2 = not optimizer.decoupled and base.hyper.weight_decay > 0
    chosen = find(rule or optimizer.match or optimizer.default("best"), family, l2=l2)
    move = Move(base.batch, batch, duration, noise_scale, beta_map)
    edit = Edit(layout, base, move, chosen, clip)
    out, scaled, beside = text, base, tuple(partners)
    if target not in (None, source):
        written, scaled = anew(edit, target, new_devices)
        out = written.text
        _check(written, target, scaled, (), scaled.parallel)
        edit.notes += [f"{name} belongs to the old file and is not written" for _, name in partners]
    elif not move.kappa == move.duration == 1 or new_devices not in (None, devices):
        scaled = edit.in_place(new_devices)
        out, held = doc.render(), {m.doc.where: m.doc for m in layout.mirrors}
        beside = tuple((held[name].render() if name in held else old, name) for old, name in partners)
        _check(doc.after or doc, source, scaled, beside, new_devices or devices)
        for (new, name), (old, _) in zip(beside, partners, strict=True):
            edit.notes += [f"{name} changes with it: where {where} names that file, name the new one"] * (new != old)
    formulas = chosen.formulas(beta_map)
    notes = [
        f"form {source}, by its keys; --from says otherwise" if doc.guessed else "",
        chosen.answers(family),
        "beside the clocks, which keep their samples, the rule moves: "
        + "; ".join(f"{key.replace('_', ' ')} {formulas[key]}" for key in ("lr", "betas", "eps", "weight_decay")),
        f"rule {chosen.name} leaves alone: {chosen.leaves_alone}",
        *doc.notes,
        *layout.notes,
        *edit.notes,
    ]
    if (goal := chosen.goals[family]) != "match":
        notes.append(f"no rule makes {layout.optimizer} at another batch the same run; this one answers goal={goal}")
    if duration != 1 and not chosen.moves_duration:
        notes.append(f"rule {chosen.name} does not know of a changed duration; `completed` and `adamw_timescale` do")
    if (word := coupled(doc)) is not None:
        notes.append(
            f"warning: {word}: where the loss or the network joins the examples of a batch (contrastive losses, "
            "in-batch negatives, BatchNorm), another batch is another problem, and no rule makes the runs equal"
        )
    said = sentence(layout, base), source, base, scaled, chosen, move, tuple(edit.changes), tuple(filter(None, notes))
    known = Coverage((), (), (), 0) if target not in (None, source) else coverage(layout, keep)  # anew notes the rest
    return Conversion(out, *said, known, beside)


def _layout(doc: Document, form: str, partners: Sequence[tuple[str, str]]) -> Layout:
    doc.partners = tuple(name for _, name in partners)
    layout = FORMS[form](doc)
    doc.near = layout.fields["lr"][0]
    if partners and form not in ("hf", "axolotl", "accelerate"):
        raise doc.error(f"--with goes with a Trainer's file (hf, axolotl, accelerate); this one is of the form {form}")
    for text, name in partners:
        pair(layout, open_document(text, name))
    return layout


def _check(doc: Document, form: str, scaled: Recipe, partners: Sequence[tuple[str, str]], devices: int | None) -> None:
    """Read what was written: it must hold what was meant."""
    layout = _layout(doc, form, partners)
    again = read(layout, devices if layout.parallel is None else None)
    agree(layout, again)
    if (again.batch, again.hyper) != (scaled.batch, scaled.hyper):
        raise doc.error(f"the new file would be read as {again} instead of {scaled}; it is not written")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="scalerun convert",
        description="Move a recipe of this or another trainer to another batch size. "
        "The linear map of the betas ends at κ < 1/(1 - β1), which is 10 for β1 = 0.9: beyond it, --beta-map power "
        "(β -> β^κ), or a base retuned at a larger β1.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("where", metavar="file", help="the base recipe; - is standard input")
    add("--from", dest="source", choices=list(FORMS), help="its form (default: the one that its keys say)")
    told = "write a new file of another form (default: edit this one)"
    add("--to", dest="target", choices=WRITTEN, help=told)
    add("--batch", type=int, required=True, help="new global batch, in examples")
    add("--with", dest="partners", action="append", metavar="FILE", help="DeepSpeed's or accelerate's file beside it")
    add("--rule", help="default: the optimizer's own, see docs/rules.md")
    shared = "tensor, pipeline, context and expert degrees that it names are divided out"
    add("--devices", type=int, help=f"all devices of the base run, where the file does not say; {shared}")
    add("--new-devices", type=int, help="those of the new run (default: as many)")
    add("--duration", type=float, help="new budget / base budget in samples (default 1)")
    measured = parser.add_mutually_exclusive_group().add_argument
    measured("--noise-scale", type=float, help="measured gradient-noise scale, in examples")
    measured("--noise-from", metavar="FILE", help="the noise.jsonl of a NoiseProbe, or a run's folder, that tells it")
    linear = "linear: 1 - β goes as κ, so κ >= 1/(1 - β1), which is 10 for β1 = 0.9, is refused (default)"
    add("--beta-map", choices=["linear", "power"], help=f"{linear}; power: β -> β^κ, for every κ (beta_map=power)")
    share = "which keeps the share of clipped steps where noise dominates, as one MLPerf benchmark prescribes"
    add("--clip", choices=["keep", "rule"], help=f"the clipping threshold c: keep it (default), or c/√κ, {share}")
    stages = 'its numbers too, for later stages of a run that begins at --batch, as "0:256 1B:1024" (tokens:batch)'
    add(
        "--ramp", metavar="STAGES", help=f"{stages}: Megatron's --step-batch-size-schedule, a torchtitan fork's section"
    )
    add("--keep", action="append", metavar="KEY", help="one that decides neither batch nor optimizer, by your word")
    add("-o", "--out", "--output", dest="output", help="file to write (default: standard output)")
    pair = "file to write for each --with, in their order; both files are written, or none"
    add("--out-with", dest="beside", action="append", metavar="FILE", help=pair)
    return parser


def main(argv: Sequence[str]) -> int:
    """`scalerun convert`: 0; or 2, one message and nothing written, where the recipe or the request is at fault.

    Raises:
        PlanError: --noise-from tells no noise scale.
    """
    try:
        options = vars(_parser().parse_args(argv))
    except SystemExit as e:  # --help
        return int(e.code or 0)
    except UsageError as e:
        print(f"scalerun convert: {e}", file=sys.stderr)
        return 2
    output, beside, where = options.pop("output", None), options.pop("beside", []), options["where"]
    if (told := options.pop("noise_from", None)) is not None:
        from scaling_exps.noise import validity

        options["noise_scale"] = validity.noise_scale(File(told))
    try:
        stages = _stages(options.pop("ramp", None), options["batch"])
        partners = options["partners"] = [(read_file(name), name) for name in options.get("partners", ())]
        if len({name for _, name in partners} | {where}) <= len(partners):
            raise RuleError("one file is given twice: the recipe and each --with are files of their own")
        with spelled("--beta-map power"):
            done = convert(read_file(where), **options)
            form = options.get("target", done.source)
            if stages and form not in ("megatron", "torchtitan"):
                raise RuleError(f"--ramp goes with megatron and torchtitan; this is {form}, with no words for it known")
            hypers = [done.rule.scale(done.base.hyper, replace(done.move, batch=b)) for _, b in stages]
            words = ramp_report(done, stages, hypers, form)
        _write(done, where, partners, output, beside)
    except (RuleError, OSError) as e:
        print(f"scalerun convert: {e}", file=sys.stderr)
        return 2
    print(*report(done, where), *words, sep="\n", file=sys.stderr)
    return 0


def _stages(text: str | None, batch: int) -> list[tuple[str, int]]:
    """(start as it is written, batch) of each stage of "0:256 1B:1024"; none for None."""
    found = [re.fullmatch(r"(\d+(?:\.\d+)?)([KMBT]?):([1-9]\d*)", word) for word in (text or "").split()]
    stages = [(m[1] + m[2], int(m[3])) for m in found if m]
    starts = [_tokens(start) for start, _ in stages]
    if text is None:
        return []
    if None in found or not stages or starts[0] != 0 or starts != sorted(set(starts)):
        raise RuleError(
            f"--ramp {text!r}: stages are START:BATCH, starts in tokens that rise from 0, with K, M, B or T for "
            '10^3 to 10^12: --ramp "0:256 250M:1024"'
        )
    if stages[0][1] != batch:
        raise RuleError(f"--ramp begins at batch {stages[0][1]}, and --batch is {batch}: the file is that of its start")
    return stages


def _tokens(start: str) -> float:
    """The number that Megatron's word for it says.

    >>> _tokens("1.5B"), _tokens("0")
    (1500000000.0, 0.0)
    """
    unit = " KMBT".find(start[-1])
    return float(start[:-1] if unit > 0 else start) * 1000.0 ** max(0, unit)


def ramp_report(done: Conversion, stages: Sequence[tuple[str, int]], hypers: Sequence[Hyper], form: str) -> list[str]:
    """The words for Megatron, or for a fork of torchtitan, and what the stages need and neither does itself.

    Raises:
        RuleError: a torchtitan file does not say the length of a sequence.
    """
    if not stages:
        return []
    titan = form == "torchtitan"
    words = f'--step-batch-size-schedule "{" ".join(f"{start}:{batch}" for start, batch in stages)}"'
    words += "\n  in place of --global-batch-size: Megatron refuses the two together"
    rows = [
        f"  from {start} tokens: batch {batch}, lr {h.lr:.6g}, betas {', '.join(f'{b:.6g}' for b in h.betas)}, "
        f"eps {h.eps:.3g}, weight decay {h.weight_decay:.6g}"
        for (start, batch), h in zip(stages, hypers, strict=True)
    ]
    return [
        *(_increments(done.text, stages) if titan else [words]),
        *rows,
        f"{'torchtitan' if titan else 'Megatron'} keeps rate, betas, eps and the second moment at a switch: set them "
        "at a restart there, and divide the second moment by the ratio of the batches (scaling_exps.scale does it to a "
        "live optimizer)" + "; its schedule counts steps, which are fewer where the batch grows" * titan,
    ]


def _increments(text: str, stages: Sequence[tuple[str, int]]) -> list[str]:
    """The section of NousResearch's fork of torchtitan: increments of one size, at equal distances in samples."""
    lengths = [v for path, v in open_document(text, "the recipe").values.items() if path[-1] == "seq_len"]
    if len(lengths) != 1 or not isinstance(lengths[0], int) or lengths[0] < 1:
        raise RuleError("--ramp in torchtitan's form: forks count samples, so the file must say training.seq_len")
    starts, batches = [_tokens(start) / lengths[0] for start, _ in stages], [batch for _, batch in stages]
    n, rise = len(stages) - 1, batches[-1] - batches[0]
    even = all(abs(s * n - i * starts[-1]) <= 1e-6 * starts[-1] for i, s in enumerate(starts))
    if rise <= 0 or not even or any(n * (b - batches[0]) != i * rise for i, b in enumerate(batches)):
        return [
            "NousResearch's fork of torchtitan grows by equal increments at equal distances, which these stages are "
            "not: give it two stages, or set training.global_batch_size at a restart"
        ]
    return [
        "[batch_size_scheduler]  # NousResearch's fork of torchtitan",
        'mode = "increment"',
        f"start_batch_size = {batches[0]}",
        f"increment = {rise // n}",
        f"rampup_samples = {round(starts[-1])}",
        "[training]",
        f"global_batch_size = {batches[-1]}",
    ]


def _write(
    done: Conversion, where: str, partners: Sequence[tuple[str, str]], output: str | None, beside: Sequence[str]
) -> None:
    """Recipe and partners to their files, all or none; to standard output what has no file.

    Raises:
        RuleError: a partner changed and has no file of its own; OSError: a file cannot be written.
    """
    if beside and len(beside) != len(partners):
        raise RuleError(f"{len(beside)} --out-with for {len(partners)} --with: one each, in their order")
    changed = [(text, name) for (text, name), old in zip(done.partners, partners, strict=True) if text != old[0]]
    if output and changed and not beside:
        names = ", ".join(name for _, name in changed)
        raise RuleError(f"{names} changes too: give --out-with FILE for it, so that the pair stays one recipe")
    files = [(output, done.text)] if output else []
    files += [(name, text) for name, (text, _) in zip(beside, done.partners, strict=False)]
    if len({File(name).resolve() for name, _ in files}) < len(files):
        raise RuleError("--out and --out-with are one file: each needs its own")
    write_all(files)
    if not output and changed and not beside:
        shown = [(done.text, where), *changed]
        sys.stdout.write("\n".join(f"==> {name} <==\n{text}" for text, name in shown))
    elif not output:
        sys.stdout.write(done.text)


def write_all(files: Sequence[tuple[str, str]]) -> None:
    """Write every (name, text), or none: each is written aside first, and what was replaced comes back on failure."""
    if len(files) == 1:  # a pipe or a terminal too
        File(files[0][0]).write_bytes(files[0][1].encode())
        return
    targets = [(File(name).resolve(), text) for name, text in files]
    aside: list[File] = []
    old: list[tuple[File, bytes | None]] = []
    try:
        for path, text in targets:
            if path.exists() and not path.is_file():
                raise RuleError(f"{path} is not a regular file")
            aside.append(path.with_name(f".{path.name}.{os.getpid()}.part"))
            aside[-1].write_bytes(text.encode())
            if path.exists():
                aside[-1].chmod(path.stat().st_mode & 0o777)
        for (path, _), part in zip(targets, aside, strict=True):
            old.append((path, path.read_bytes() if path.exists() else None))
            os.replace(part, path)
    except BaseException:
        for path, before in old:
            if before is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(before)
        raise
    finally:
        for part in aside:
            part.unlink(missing_ok=True)


def report(done: Conversion, name: str) -> list[str]:
    """What was done, line by line; the first says how the base batch came about."""
    base, new, known = done.base.batch, done.scaled.batch, done.coverage
    named = {
        "understood, and kept": known.kept,
        "not looked at, and by its name a rate, a clock or an average: yours to check": known.clocks,
        "not looked at": known.rest,
    }
    return [
        done.sentence,
        f"{name}: batch {base} -> {new}, κ = {new / base:g}, rule {done.rule.name}",
        *(f"  {c}" for c in done.changes),
        *(f"note: {n}" for n in done.notes),
        *(f"{words}: {', '.join(keys)}" for words, keys in named.items() if keys),
        *([f"{known.harmless} key(s) known to be harmless"] if known.harmless else []),
    ]
