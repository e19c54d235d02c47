"""The comparison in wandb: a workspace of panels, and a report with the verdicts (the extra `dashboard`)."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scaling_exps import mirror
from scaling_exps.records import RUNS
from scaling_exps.report import tables, verdict
from scaling_exps.report.answer import answer
from scaling_exps.report.charts import test_metric
from scaling_exps.report.judge import METRICS
from scaling_exps.report.runs import ReportError, collect, folder
from scaling_exps.words import Parser

HOW = "log in with `wandb login`, upload the runs with `scalerun sync`, and type `scalerun dashboard` again"
NOISE = ("trace", "gradient_sq", "kappa_r", "b_noise")  # of a noise record, what gets a panel
TITLE = "scalerun: batch sizes compared"


def main(words: list[str]) -> int:
    """`scalerun dashboard WORDS`: write the specification to OUT/wandb.json, and publish it where logged in.

    The runs decide the batches and metrics that get panels.

    Raises:
        ReportError: no finished run, wandb-workspaces is missing, OUT cannot be written, or wandb refuses.
    """
    parser = Parser(prog="scalerun dashboard")
    parser.add_argument("dirs", nargs="*", type=Path, default=[RUNS], help="folders of runs (default: runs)")
    parser.add_argument("--entity", help="wandb user or team (default: yours)")
    parser.add_argument("--project", default=os.environ.get("WANDB_PROJECT", "scalerun"), help="(default: scalerun)")
    parser.add_argument("--out", default="report", type=Path, help="folder of the specification (default: report)")
    parser.add_argument("--offline", action="store_true", help="write the specification and publish nothing")
    options = parser.parse_args(words)
    os.environ.setdefault("WANDB_SILENT", "true")
    collection = collect(options.dirs)
    if not collection.runs:
        raise ReportError(f"no finished run under {', '.join(map(str, options.dirs))}: a dashboard of nothing")
    for absent in collection.missing:
        print(f"not in it: {absent}", file=sys.stderr)
    offline = options.offline or os.environ.get("WANDB_MODE") == "offline" or not mirror.logged_in()
    entity = options.entity or ("ENTITY" if offline else _asked(_default_entity))
    try:
        workspace, article = build(verdict.compare(collection), entity, options.project)
    except ModuleNotFoundError as e:
        raise ReportError(f"{e}: pip install 'scalerun[dashboard]'") from e
    parts = {"workspace": workspace, "report": article}
    as_json = {k: json.loads(v._to_model().model_dump_json(by_alias=True, exclude_none=True)) for k, v in parts.items()}
    path = options.out / "wandb.json"
    with folder(options.out):
        path.write_text(json.dumps(as_json, indent=1) + "\n")
    print(f"specification: {path}")
    if offline:
        print(f"nothing was published (offline); to publish: {HOW}")
        return 0
    for name, part in parts.items():
        _asked(part.save)
        print(f"{name}: {part.url}")
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

    def over_samples(title: str, metric: str, by: str = "rule") -> Any:
        return wr.LinePlot(
            title=title, x="samples", y=[metric], groupby=wr.Config(by), groupby_aggfunc="mean",
            groupby_rangefunc="stddev", title_x="samples", aggregate=True, smoothing_factor=0.0,
        )  # fmt: skip

    def against_batch(name: str, key: str, log: bool = False) -> Any:
        x, y = wr.Config("batch"), wr.SummaryMetric(key)
        return wr.ScatterPlot(title=f"{name} against batch", x=x, y=y, log_x=True, log_y=log)

    metrics = {m: name for m, name in METRICS.items() if any(m in r.metrics for r in rows)}
    test = test_metric(rows)
    curves = {"train loss": "train/loss", f"test {test}": f"eval/{test}"}
    measured = [row for r in rows for run in r.runs for row in run.noise]
    noise = sorted({"/".join(filter(None, (row.get("method"), k))) for row in measured for k in NOISE if k in row})
    sections = {
        "Batch sizes at equal samples": [over_samples(f"{n} by batch", key, "batch") for n, key in curves.items()],
        "Rules at equal samples": [over_samples(f"{name} by rule", key) for name, key in curves.items()],
        "Final metrics against batch": [against_batch(name, f"final/{m}") for m, name in metrics.items()],
        "Gap to the base run of the same seed": [against_batch(f"Δ {n}", f"gap/{m}") for m, n in metrics.items()],
        "Throughput": [against_batch("samples/s", "samples_per_second", log=True)],
        "Noise": [over_samples(f"noise: {k}", f"noise/{k}", "batch") for k in noise],
    }
    columns = ["run:displayName", *(f"config:{k}" for k in ("batch", "rule", "kappa", "seed"))]
    workspace = ws.Workspace(
        entity=entity,
        project=project,
        name=TITLE,
        sections=[ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections.items() if panels],
        settings=ws.WorkspaceSettings(x_axis="samples", max_runs=100),
        runset_settings=ws.RunsetSettings(
            groupby=[ws.Config("rule"), ws.Config("batch")],
            pinned_columns=[*columns, *(f"summary:gap/{m}" for m in metrics)],
        ),
    )
    verdicts = "\n\n".join([*answer(rows), tables.as_markdown(rows), *verdict.reading(rows)])
    blocks: list[Any] = [wr.H1("Is the scaled run the base run?"), wr.MarkdownBlock(verdicts)]

    def grid(title: str, panels: list[Any], filters: str = "") -> None:
        runset = wr.Runset(filters=filters, groupby=["config.rule"])  # of the project that the report is in
        blocks.extend([wr.H2(title), wr.PanelGrid(runsets=[runset], panels=panels)])

    base = {r.batch for r in rows if r.role == "base"}
    for batch in sorted({r.batch for r in rows if r.role != "base"} or base):
        panels = [over_samples(f"{name}, batch {batch}", key) for name, key in curves.items()]
        near = ", ".join(map(str, sorted({batch, *base})))
        grid(f"Batch {batch} and the base, at equal samples", panels, f"Config('batch') in [{near}]")
    for title, panels in list(sections.items())[2:]:
        if panels:
            grid(title, panels)
    return workspace, wr.Report(entity=entity, project=project, title=TITLE, blocks=blocks)
