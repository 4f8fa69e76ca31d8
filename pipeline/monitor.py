"""Whether forecasts still say what happens, as ``adsid priors monitor`` shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from data.errors import UserError
from pipeline.forecasts import open_prior
from priors.fit import rows_of, sample_rows
from priors.forecast import TableForecast
from priors.metrics import expected_calibration_error
from priors.monitor import PeriodDrift, calibration_curves, drift
from priors.table import PriorTable


@dataclass(frozen=True)
class Monitored:
    """What a table's forecasts said and what happened.

    Attributes:
        evaluate: span whose targets are looked at.
        periods: predicted and observed mass of each.
        ece: calibration error on the span's prompts, ``before`` and ``after`` the fit of the temperatures.
        curves: reliability of both.
    """

    evaluate: str
    periods: list[PeriodDrift]
    ece: dict[str, float]
    curves: dict[str, dict[str, list[float]]]


def monitor(run: Path, priors: Path, overrides: Sequence[str] = ()) -> Monitored:
    """Compare a table with the evaluated span of a run.

    Args:
        run: directory of a run whose stage prior is done.
        priors: directory of the table.
        overrides: of single keys.

    Raises:
        UserError: no such run or table, or nothing happened to those it forecasts.
    """
    config, log, prior = open_prior(run, overrides, read=("prior.evaluation_prompts", "prior.seed", "evaluate"))
    table = PriorTable.load(priors, log)
    targets = rows_of(log.advertiser_targets(log.evaluate), table.user_R)
    periods = drift(TableForecast(table, prior.base, arm="lm", keep=False), targets)
    if not periods:
        raise UserError(
            f"{priors}, without a forecast for anyone who converted in the {log.evaluate} span",
            expected="forecasts made at or before that span",
            action="give such a table, or generate one: adsid priors generate",
        )
    sample = sample_rows(targets, config.prior.evaluation_prompts, config.prior.seed)
    curves = calibration_curves(prior, sample, config.prior)
    ece = {name: expected_calibration_error(curve) for name, curve in curves.items()}
    return Monitored(log.evaluate, periods, ece, curves)


def to_console(monitored: Monitored) -> Group:
    """The comparison for people."""
    table = Table(
        "period", "requests", "listed, predicted", "observed", "z", "farthest prefix", "predicted", "observed", "z", ""
    )
    for column in table.columns:
        column.justify = "right"
    for one in monitored.periods:
        code = "-" if one.code is None else f"<adv_1_{one.code}>"
        table.add_row(
            str(one.period), str(one.requests), f"{one.predicted:.3f}", f"{one.observed:.3f}", f"{one.z:+.1f}", code,
            f"{one.code_predicted:.3f}", f"{one.code_observed:.3f}", f"{one.code_z:+.1f}", "drifted" * one.drifted,
        )  # fmt: skip
    drifted = [str(one.period) for one in monitored.periods if one.drifted]
    verdict = f"drifted in {', '.join(drifted)}" if drifted else "no period is farther off than chance"
    ece = monitored.ece
    return Group(
        table,
        Text(verdict),
        Text(f"calibration error {ece['before']:.3f} before the fit of the temperatures, {ece['after']:.3f} after"),
    )
