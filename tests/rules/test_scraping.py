"""Scraping: what the documentation tells a plain Prometheus to do is valid, and what the tests' own Prometheus does."""

from pathlib import Path

import yaml

from e2e import prometheus
from tests.rules import promtool


def test_prometheus_takes_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "kubeconfig").write_text("{}")
    config = tmp_path / "prometheus.yaml"
    config.write_text(yaml.safe_dump(prometheus.watching(tmp_path / "kubeconfig")))
    done = promtool.run("check", "config", config)
    assert done.returncode == 0, done.stdout


def test_the_documented_jobs_need_nothing_but_the_pods_token() -> None:
    jobs = yaml.safe_load(prometheus.SCRAPE_CONFIG.read_text())["scrape_configs"]
    assert [discovery.keys() for job in jobs for discovery in job["kubernetes_sd_configs"]] == [
        {"role", "selectors"}
    ] * 2
