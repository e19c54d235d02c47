"""The comparison in wandb: a workspace, a report, and the upload of what was logged offline."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scaling_exps import mirror
from scaling_exps.report import verdict
from scaling_exps.report.runs import ReportError, collect, make_folder

HOW = "log in with `wandb login`, upload the runs with `scalerun sync`, and type `scalerun dashboard` again"


def publish(dirs: list[Path], out: Path, entity: str | None, project: str | None, offline: bool) -> int:
    """Write the specification of the workspace and the report to `out/wandb.json`, and publish both where logged in.

    Args:
        dirs: folders of runs; they decide the batches and metrics that get panels.
        out: folder of the specification.
        entity, project: where in wandb; by default the user's own, and WANDB_PROJECT or `scalerun`.
        offline: publish nothing.

    Raises:
        ReportError: no finished run, `out` cannot be written, or wandb refuses.
    """
    os.environ.setdefault("WANDB_SILENT", "true")
    found = collect(dirs)
    if not found.runs:
        raise ReportError(f"no finished run under {', '.join(map(str, dirs))}: a dashboard of nothing")
    make_folder(out)
    rows = verdict.compare(found)
    project = project or os.environ.get("WANDB_PROJECT", "scalerun")
    offline = offline or os.environ.get("WANDB_MODE") == "offline" or not mirror.logged_in()
    if not offline and entity is None:
        entity = _asked(lambda: _default_entity())
    workspace, article = build(rows, entity or "ENTITY", project)
    specification = {
        "workspace": json.loads(workspace._to_model().model_dump_json(by_alias=True, exclude_none=True)),
        "report": json.loads(article._to_model().model_dump_json(by_alias=True, exclude_none=True)),
    }
    path = out / "wandb.json"
    path.write_text(json.dumps(specification, indent=1) + "\n")
    print(f"specification: {path}")
    if offline:
        print(f"nothing was published (offline); to publish: {HOW}")
        return 0
    _asked(workspace.save)
    _asked(article.save)
    print(f"workspace: {workspace.url}\nreport: {article.url}")
    return 0


def _default_entity() -> str:
    import wandb

    return str(wandb.Api().default_entity)


def _asked(call: Callable[[], Any]) -> Any:
    """What wandb answers; its refusals and lost connections as ours."""
    try:
        return call()
    except Exception as e:
        raise ReportError(f"wandb did not do it ({type(e).__name__}: {e}); {HOW}, or give --offline") from e


def build(rows: list[verdict.Row], entity: str, project: str) -> tuple[Any, Any]:
    """The workspace and the report, as wandb-workspaces holds them; nothing is sent.

    Panels: loss and accuracy of each batch size over equal samples, by rule; final metrics and gaps against batch;
    throughput; noise.
    """
    import wandb_workspaces.reports.v2
    import wandb_workspaces.workspaces as ws

    wr: Any = wandb_workspaces.reports.v2  # its names are made where a type checker does not look

    batches = sorted({r.batch for r in rows if r.role != "base"}) or sorted({r.batch for r in rows})
    metrics = [m for m in verdict.METRICS if any(m in r.metrics for r in rows)]
    accuracy = any("accuracy" in run.evals for r in rows for run in r.runs)
    measured = [row for r in rows for run in r.runs for row in run.noise]
    noise = sorted(
        {"/".join([*([row["method"]] if "method" in row else []), k]) for row in measured for k in _NOISE & set(row)}
    )

    def over_samples(title: str, metric: str, by: str = "rule") -> Any:
        return wr.LinePlot(
            title=title, x="samples", y=[metric], groupby=wr.Config(by), groupby_aggfunc="mean",
            groupby_rangefunc="stddev", title_x="samples", aggregate=True, smoothing_factor=0.0,
        )  # fmt: skip

    def against_batch(title: str, key: str, log: bool = False) -> Any:
        return wr.ScatterPlot(title=title, x=wr.Config("batch"), y=wr.SummaryMetric(key), log_x=True, log_y=log)

    test = ("test accuracy", "eval/accuracy") if accuracy else ("test loss", "eval/loss")
    curves = [("train loss", "train/loss"), test]
    finals = [against_batch(f"{verdict_name(m)} against batch", f"final/{m}") for m in metrics]
    gaps = [against_batch(f"gap in {verdict_name(m)} against batch", f"gap/{m}") for m in metrics]
    speed = [against_batch("throughput against batch, samples/s", "samples_per_second", log=True)]
    noises = [over_samples(f"noise: {k}", f"noise/{k}", "batch") for k in noise]
    by_batch = [over_samples(f"{name} by batch, at equal samples", key, "batch") for name, key in curves]
    by_rule = [over_samples(f"{name} by rule, at equal samples", key) for name, key in curves]
    sections = [
        ("Batch sizes at equal samples", by_batch),
        ("Rules at equal samples", by_rule),
        ("Final metrics against batch", finals),
        ("Gap to the base run of the same seed", gaps),
        ("Throughput", speed),
        ("Noise", noises),
    ]
    names = ["run:displayName", "config:batch", "config:rule", "config:kappa", "config:seed"]
    workspace = ws.Workspace(
        entity=entity,
        project=project,
        name="scalerun: batch sizes compared",
        sections=[ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections if panels],
        settings=ws.WorkspaceSettings(x_axis="samples", max_runs=100),
        runset_settings=ws.RunsetSettings(
            groupby=[ws.Config("rule"), ws.Config("batch")],
            pinned_columns=[*names, *(f"summary:gap/{m}" for m in metrics)],
        ),
    )
    blocks: list[Any] = [wr.H1("Is the scaled run the base run?"), wr.MarkdownBlock(_markdown(rows))]

    def grid(title: str, panels: list[Any], filters: str = "") -> None:
        runset = wr.Runset(filters=filters, groupby=["config.rule"])  # of the project that the report is in
        blocks.extend([wr.H2(title), wr.PanelGrid(runsets=[runset], panels=panels)])

    for batch in batches:
        panels = [over_samples(f"{name}, batch {batch}", key) for name, key in curves]
        grid(f"Batch {batch} and the base, at equal samples", panels, f"Config('batch') in [{_near(rows, batch)}]")
    for title, panels in sections[2:]:
        if panels:
            grid(title, panels)
    article = wr.Report(entity=entity, project=project, title="scalerun: batch sizes compared", blocks=blocks)
    return workspace, article


_NOISE = {"trace", "gradient_sq", "kappa_r", "b_noise"}  # of a noise record, what gets a panel


def _near(rows: list[verdict.Row], batch: int) -> str:
    return ", ".join(map(str, sorted({batch, *(r.batch for r in rows if r.role == "base")})))


def verdict_name(metric: str) -> str:
    return metric.replace("_", " ")


def _markdown(rows: list[verdict.Row]) -> str:
    """The verdict table, as it stands when the dashboard is made."""
    lines = [
        "| setting | arm | batch | n | verdict | seeds that would decide | power |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        needed = str(r.seeds_needed or "")
        lines.append(f"| {r.setting} | {r.rule} | {r.batch} | {len(r.seeds)} | {r.verdict} | {needed} | {r.power} |")
    return "\n".join([*lines, "", *verdict.reading(rows)])
