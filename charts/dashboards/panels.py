"""The panels that the dashboards are made of, all in one style.

grafana-foundation-sdk writes what Grafana's schema allows and leaves out what a reader needs: without being told, a time
series has no legend, a query no refId, and a variable is never looked up again. Here every panel gets them, and none can
be made without a description and a unit. Only time series, stats, bar gauges and tables are used: Grafana's component
library can draw these outside of Grafana, so they can be looked at (`make dashboards-preview`).
"""

import json
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from grafana_foundation_sdk.builders import bargauge as bar_gauges
from grafana_foundation_sdk.builders import common as builders
from grafana_foundation_sdk.builders import dashboard as dashboards
from grafana_foundation_sdk.builders import prometheus
from grafana_foundation_sdk.builders import stat as stats
from grafana_foundation_sdk.builders import table as tables
from grafana_foundation_sdk.builders import timeseries as time_series
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

Panel: TypeAlias = Builder[dashboard.Panel]

DATASOURCE: Final = common.DataSourceRef(type_val="prometheus", uid="${datasource}")
TAG: Final = "kvplane"
COLUMNS: Final = 24
_HEIGHT: Final = 8
_STAT_HEIGHT: Final = 4

Steps: TypeAlias = Sequence[tuple[float, str]]
"""Where a value changes colour: (from this value on, colour), ascending."""


@dataclass(frozen=True)
class Query:
    """One expression and the name of each of its series, in which {{label}} stands for a label's value."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Row:
    """A heading, phrased as the question that its panels answer, and the panels."""

    title: str
    panels: tuple[Panel, ...]


def stat(
    title: str,
    description: str,
    expr: str,
    *,
    unit: str,
    below: str = "green",
    steps: Steps = (),
    none: str = "unknown",
) -> Panel:
    """One figure now, its recent past behind it; `below` is its colour below all steps, `none` its text without data."""
    panel = (
        stats.Panel()
        .title(title)
        .description(description)
        .datasource(DATASOURCE)
        .span(COLUMNS // 6)
        .height(_STAT_HEIGHT)
        .unit(unit)
        .thresholds(_thresholds(steps, below=below))
        .no_value(none)
        .graph_mode(common.BigValueGraphMode.AREA)
        .color_mode(common.BigValueColorMode.VALUE)
        .reduce_options(builders.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
    )
    return panel.with_target(_target(Query(expr, title), "A"))


def graph(
    title: str,
    description: str,
    *queries: Query,
    unit: str,
    span: int = COLUMNS // 3,
    steps: Steps = (),
    stacked: bool = False,
    maximum: float | None = None,
) -> Panel:
    """Lines over time from 0 upwards; thresholds are drawn as dashed lines."""
    panel = (
        time_series.Panel()
        .title(title)
        .description(description)
        .datasource(DATASOURCE)
        .span(span)
        .height(_HEIGHT)
        .unit(unit)
        .min(0)
        .thresholds(_thresholds(steps))
        .legend(
            builders.VizLegendOptions()
            .show_legend(True)
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
        )
        .tooltip(builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING))
        .color_scheme(dashboards.FieldColor().mode(dashboard.FieldColorModeId.PALETTE_CLASSIC))
        .show_points(common.VisibilityMode.NEVER)
        .line_width(1)
        .fill_opacity(40 if stacked else 5)
    )
    if steps:
        panel.thresholds_style(builders.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED))
    if stacked:
        panel.stacking(builders.StackingConfig().mode(common.StackingMode.NORMAL))
    if maximum is not None:
        panel.max(maximum)
    for name, query in zip(string.ascii_uppercase, queries, strict=False):
        panel.with_target(_target(query, name))
    return panel


def bars(title: str, description: str, query: Query, *, unit: str, span: int = COLUMNS // 3) -> Panel:
    """One bar per series, as it is now."""
    panel = (
        bar_gauges.Panel()
        .title(title)
        .description(description)
        .datasource(DATASOURCE)
        .span(span)
        .height(_HEIGHT)
        .unit(unit)
        .min(0)
        .thresholds(_thresholds(()))
        .orientation(common.VizOrientation.HORIZONTAL)
        .display_mode(common.BarGaugeDisplayMode.BASIC)
        .reduce_options(builders.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
    )
    return panel.with_target(_target(query, "A"))


def table(
    title: str,
    description: str,
    expr: str,
    *,
    columns: Mapping[str, str],
    value: str,
    texts: Mapping[str, tuple[str, str]] | None = None,
    unit: str = "none",
    span: int = COLUMNS // 2,
) -> Panel:
    """A table of what there is now: a column for each label in `columns` (label to heading), then the value.

    `texts` says what a value is shown as, and its colour.
    """
    panel = (
        tables.Panel()
        .title(title)
        .description(description)
        .datasource(DATASOURCE)
        .span(span)
        .height(_HEIGHT)
        .unit(unit)
        .thresholds(_thresholds(()))
        .with_transformation(
            dashboard.DataTransformerConfig(
                id_val="organize",
                options={
                    "excludeByName": {"Time": True},
                    "indexByName": {name: place for place, name in enumerate([*columns, "Value"])},
                    "renameByName": {**columns, "Value": value},
                },
            )
        )
    )
    if texts:
        results = {
            number: dashboard.ValueMappingResult(text=text, color=color, index=place)
            for place, (number, (text, color)) in enumerate(texts.items())
        }
        panel.override_by_name(
            value,
            [
                dashboard.DynamicConfigValue("mappings", [dashboard.ValueMap(options=results)]),
                dashboard.DynamicConfigValue("custom.cellOptions", {"type": "color-text"}),
            ],
        )
    target = prometheus.Dataquery().expr(expr).ref_id("A").datasource(DATASOURCE)
    return panel.with_target(target.instant().format(PromQueryFormat.TABLE))


def board(uid: str, title: str, description: str, *, variables: Iterable["Variable"], content: Iterable[Row]) -> str:
    """The JSON of a dashboard that answers its rows' questions from the top down."""
    built = (
        dashboards.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags([TAG])
        .editable()
        .timezone("browser")
        .time("now-1h", "now")
        .refresh("30s")
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .link(
            dashboards.DashboardLink("kvplane")
            .type(dashboard.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(True)
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(dashboards.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    for variable in variables:
        built.with_variable(_variable(variable))
    number = 0
    for row in content:
        number += 1
        built.with_row(dashboards.Row(row.title).id(number))
        for panel in row.panels:
            number += 1
            panel.build().id_val = number
            built.with_panel(panel)
    document = json.loads(JSONEncoder().encode(built.build()))
    for link in document["links"]:
        del link["placement"]  # the SDK knows only the menu, where nobody looks
    for variable in document["templating"]["list"]:
        for name in ("auto", "auto_count", "auto_min"):  # of intervals only
            del variable[name]
    for panel in document["panels"]:
        panel.get("options", {}).pop("footer", None)  # unknown to Grafana 13's tables
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


@dataclass(frozen=True)
class Variable:
    """A choice at the top of a dashboard: the values of a label of some series, or all of them."""

    name: str
    label: str
    query: str


ENGINE_VARIABLES: Final = (
    Variable("namespace", "Namespace", "label_values(kvplane_engine_ready, namespace)"),
    Variable("service", "Service", 'label_values(kvplane_engine_ready{namespace=~"$namespace"}, service)'),
    Variable("pod", "Pod", 'label_values(kvplane_engine_ready{namespace=~"$namespace", service=~"$service"}, pod)'),
)
CHOSEN_SERVICES: Final = 'namespace=~"$namespace", service=~"$service"'
CHOSEN_PODS: Final = f'{CHOSEN_SERVICES}, pod=~"$pod"'
"""Selectors that the variables of engines fill in."""


def rate(metric: str, selector: str, *by: str) -> str:
    """Increase per second of a counter, summed over everything but `by`."""
    return f"{_sum(by)} (rate({metric}{_braces(selector)}[$__rate_interval]))"


def quantile(q: float, metric: str, selector: str, *by: str) -> str:
    """A quantile of a histogram over the last moments; no point where nothing was observed."""
    return f"histogram_quantile({q}, {rate(f'{metric}_bucket', selector, 'le', *by)}) >= 0"


def quantiles(metric: str, selector: str, *qs: float) -> tuple[Query, ...]:
    """Several quantiles of a histogram, over everything."""
    return tuple(Query(quantile(q, metric, selector), f"p{q * 100:.0f}") for q in qs)


def _sum(by: Sequence[str]) -> str:
    return f"sum by ({', '.join(by)})" if by else "sum"


def _braces(selector: str) -> str:
    return f"{{{selector}}}" if selector else ""


def _target(query: Query, name: str) -> prometheus.Dataquery:
    target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend)
    return target.ref_id(name).range().datasource(DATASOURCE)


def _thresholds(steps: Steps, *, below: str = "green") -> dashboards.ThresholdsConfig:
    colours = [dashboard.Threshold(value=None, color=below)]
    colours += [dashboard.Threshold(value=value, color=colour) for value, colour in steps]
    return dashboards.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(colours)


def _variable(variable: Variable) -> dashboards.QueryVariable:
    return (
        dashboards.QueryVariable(variable.name)
        .label(variable.label)
        .datasource(DATASOURCE)
        .query({"qryType": 1, "query": variable.query, "refId": f"variable-{variable.name}"})
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.NATURAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(dashboard.VariableOption(selected=True, text="All", value="$__all"))
    )
