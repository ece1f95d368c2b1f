"""`python -m charts.preview`: draws each shipped dashboard as it is, by Grafana's own component library in Chromium.

No Grafana server is needed or started: Prometheus answers the dashboards' queries, and the page in `page/` draws the answers.
That a panel looks right here says that its JSON is understood and its figures can be read; menus, variables and links are
not shown. It also has the TypeScript compiler hold the JSON against Grafana's published schema.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from charts.dashboards.reading import filled_in, panels
from charts.generate import DASHBOARDS, REPOSITORY
from charts.preview import sample
from e2e import prometheus
from e2e.cluster import binaries, cache, commands
from e2e.cluster.errors import ClusterError
from e2e.cluster.progress import Progress
from e2e.prometheus import Prometheus

PAGE: Final = Path(__file__).with_name("page")
OUTPUT: Final = REPOSITORY / "dist" / "dashboards"
CHROMIUM: Final = ("chromium", "chromium-browser", "google-chrome")
_HOUR: Final = sample.HOUR_SECONDS
_STEP_SECONDS: Final = 30
_RATE_INTERVAL: Final = "2m"
_ROW_PIXELS: Final = 38
_MARGIN_PIXELS: Final = 80
_WIDTH_PIXELS: Final = 1600


class PreviewError(ClusterError):
    """A dashboard could not be drawn, or does not follow Grafana's schema; the message says which panel."""


@dataclass(frozen=True)
class Hour:
    """A Prometheus, and which hour of it is drawn."""

    prometheus: Prometheus
    end: int
    source: str
    """Where the figures come from, as the pictures say."""


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m charts.preview", description="Draw the shipped dashboards.")
    parser.add_argument("--prometheus", metavar="URL", help="draw its last hour (default: an hour that is made up)")
    arguments = parser.parse_args()
    progress = Progress()
    try:
        draw(arguments.prometheus, progress)
    except ClusterError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


def draw(url: str | None, progress: Progress) -> None:
    """Write OUTPUT/NAME.png for each dashboard.

    Raises:
        PreviewError: a panel is empty or broken, or the JSON is not what Grafana expects.
        RequirementError, CommandError: a program is missing or failed.
    """
    browser = _browser()
    site = _site(progress)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    boards = {path.stem: json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))}
    with progress.step("Grafana's schema"):
        _check_schema(site, boards)
    broken = []
    with _hour(url, progress) as hour:
        for name, board in boards.items():
            with progress.step(f"dashboard {name}") as step:
                (site / "data.js").write_text(f"window.PREVIEW = {json.dumps(_preview(board, hour))};")
                picture = OUTPUT / f"{name}.png"
                if problem := _draw(browser, site, board, picture):
                    broken.append(f"{name}: {problem}")
                step.detail = str(picture.relative_to(REPOSITORY))
    if broken:
        raise PreviewError("Panels that could not be drawn, or have no data. " + "; ".join(broken))


@contextmanager
def _hour(url: str | None, progress: Progress) -> Iterator[Hour]:
    end = int(time.time())
    if url:
        yield Hour(Prometheus(url), end, f"figures of {url}")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "series").write_text(sample.openmetrics(end))
        promtool = binaries.build([binaries.PROMETHEUS], progress=progress)["promtool"]
        commands.run(promtool, "tsdb", "create-blocks-from", "openmetrics", folder / "series", folder / "data")
        with prometheus.running({}, folder, progress=progress) as found:
            yield Hour(found, end, "figures made up")


def _preview(board: Mapping[str, Any], hour: Hour) -> dict[str, Any]:
    """What the page draws: the dashboard, and the answer to each query of each panel."""
    begin = hour.end - _HOUR
    answers: dict[str, list[list[dict[str, Any]]]] = {}
    for panel in panels(board):
        exprs = [filled_in(target["expr"], rate_interval=_RATE_INTERVAL) for target in panel["targets"]]
        answers[panel["id"]] = [_answer(hour, expr, now=panel["type"] == "table") for expr in exprs]
    return {"dashboard": board, "answers": answers, "from": begin, "to": hour.end, "source": hour.source}


def _answer(hour: Hour, expr: str, *, now: bool) -> list[dict[str, Any]]:
    """Series as Prometheus gives them over time: of the hour, or with one value, of its end."""
    if not now:
        return hour.prometheus.matrix(expr, start=hour.end - _HOUR, end=hour.end, step=_STEP_SECONDS)
    samples = hour.prometheus.query(expr, at=hour.end)
    return [{"metric": sample.labels, "values": [(hour.end, str(sample.value))]} for sample in samples]


def _draw(browser: str, site: Path, board: Mapping[str, Any], picture: Path) -> str:
    """Draw one dashboard; what is wrong with it, "" if nothing."""
    height = _MARGIN_PIXELS + _ROW_PIXELS * max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in board["panels"])
    with tempfile.TemporaryDirectory() as profile:
        command = (
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            "--virtual-time-budget=15000",
            f"--user-data-dir={profile}",
            f"--window-size={_WIDTH_PIXELS},{height}",
        )
        page = (site / "index.html").as_uri()
        document = commands.run(*command, "--dump-dom", page, timeout_seconds=120)
        commands.run(*command, f"--screenshot={picture}", page, timeout_seconds=120)
    title = re.search(r"<title>(.*?)</title>", document)
    said = title.group(1) if title else "no page"
    return "" if said == "drawn, 0 broken" else said


def _site(progress: Progress) -> Path:
    """The folder with the bundled page, built once for each version of its sources."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(PAGE.iterdir()))).hexdigest()[:12]
    site = cache.root() / "preview" / digest
    if (site / "page.js").exists():
        return site
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            raise PreviewError(f"The previews need {program}: install Node.js 20 or newer.")
    shutil.copytree(PAGE, site, dirs_exist_ok=True)
    with progress.step("packages of the page, from npm"):
        _run(site, "npm", "ci", "--ignore-scripts", "--legacy-peer-deps", "--no-audit", "--no-fund")
    with progress.step("the page"):
        # Grafana's packages can be bundled as what they are to `require`, not as modules: hence two steps.
        esbuild = "node_modules/.bin/esbuild"
        _run(site, esbuild, "main.tsx", "frames.ts", "--format=cjs", "--outdir=cjs", "--log-level=error")
        loaders = [f"--loader:.{kind}=dataurl" for kind in ("ttf", "svg", "woff2", "woff", "png", "gif")]
        defines = ("--define:global=window", '--define:process.env.NODE_ENV="production"')
        _run(site, esbuild, "cjs/main.js", "--bundle", *defines, *loaders, "--outfile=page.js", "--log-level=error")
    return site


def _check_schema(site: Path, boards: Mapping[str, Mapping[str, Any]]) -> None:
    """Hold dashboards and panel options against the types that Grafana publishes; unknown fields are errors.

    The types' enums are loosened to the strings that JSON has.
    """
    lines = [
        "type Loose<T> = T extends string ? T | `${T}` : T extends number ? number :",
        "  T extends (infer U)[] ? Loose<U>[] : T extends object ? { [K in keyof T]: Loose<T[K]> } : T;",
        "import type { Dashboard } from '@grafana/schema';",
    ]
    kinds = sorted({panel["type"] for board in boards.values() for panel in panels(board)})
    lines += [
        f"import type {{ Options as {kind} }} from "
        f"'./node_modules/@grafana/schema/dist/types/raw/composable/{kind}/panelcfg/x/types.gen';"
        for kind in kinds
    ]
    for name, board in boards.items():
        variable = name.replace("-", "_")
        lines.append(f"export const {variable}: Loose<Dashboard> = {json.dumps(board)};")
        lines += [
            f"export const {variable}_{panel['id']}: Loose<{panel['type']}> = {json.dumps(panel['options'])};"
            for panel in panels(board)
        ]
    (site / "check.ts").write_text("\n".join(lines))
    _run(site, "node_modules/.bin/tsc", "--noEmit", "--strict", "--skipLibCheck", "--moduleResolution", "bundler",
         "--module", "esnext", "--target", "es2022", "check.ts")  # fmt: skip


def _run(site: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=site, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PreviewError(f"`{' '.join(command[:3])} …` failed in {site}:\n{(done.stdout + done.stderr)[-3000:]}")


def _browser() -> str:
    for name in CHROMIUM:
        if found := shutil.which(name):
            return found
    raise PreviewError(
        "The previews need Chromium or Chrome. On Debian: apt-get install --no-install-recommends chromium"
    )


if __name__ == "__main__":
    sys.exit(main())
