"""What a ranker predicts of an impression: one task, or several that learn together.

    label              a conversion of ``data.label_kinds``, whatever they are
    click              a click, with or without a conversion after it
    click_conversion   a click and a conversion after it
    view_conversion    a conversion without a click

Each is defined over all impressions, conversions too: the chance of a click *and* a conversion, not of a conversion
given a click. So every task learns from every row, none from a selection that serving does not know, and all chances
can be compared (Ma et al., Entire Space Multi-Task Model, SIGIR 2018, https://arxiv.org/abs/1804.07931: CTCVR). A row
has no label of a task where it is older than the first such event of the log: that was not recorded then.

Shapes: N rows, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data.errors import UserError
from data.log import Log
from data.tables import KINDS

LABEL = "label"
_OUTCOMES = {
    "click": ("click", "click_conversion"),
    "click_conversion": ("click_conversion",),
    "view_conversion": ("view_conversion",),
}
TASKS = (LABEL, *_OUTCOMES)


def kinds_of(task: str, log: Log) -> tuple[int, ...]:
    """Codes of the kinds of events that are a task's outcome in a log."""
    return log.label_kinds if task == LABEL else tuple(KINDS.index(kind) for kind in _OUTCOMES[task])


def check_tasks(tasks: Sequence[str], log: Log) -> None:
    """Refuses a task that the span ``ranker_fit`` has nothing to learn of.

    Raises:
        UserError: names the tasks that the log has.
    """
    first, last = log.split.ranker_fit
    within = (log.events.period >= first) & (log.events.period <= last)
    there = set(np.unique(log.events.kind[within]).tolist())
    known = [task for task in TASKS if there.intersection(kinds_of(task, log))]
    lacking = [task for task in tasks if task not in known]
    if lacking:
        raise UserError(
            f"ranker.tasks names {', '.join(lacking)}, of which the span ranker_fit has no event",
            expected=f"some of {', '.join(known) or 'no task at all'}",
            action="name tasks that the data has in ranker.tasks, or take data with clicks, e.g. data=simulator",
        )


def labels_of(
    tasks: Sequence[str], log: Log, happened_N: NDArray[np.integer], period_N: NDArray[np.integer]
) -> NDArray[np.float32]:
    """Labels of impressions.

    Args:
        tasks: of `TASKS`.
        log: the log.
        happened_N: what became of each row, as `Log.outcomes` tells it.
        period_N: of each row.

    Returns:
        ``(N, T)``: 1 where the outcome came about, 0 where not, NaN where the log did not record it yet.
    """
    columns = []
    for task in tasks:
        kinds = kinds_of(task, log)
        label_N = ((happened_N & sum(1 << kind for kind in kinds)) > 0).astype(np.float32)
        if task != LABEL:
            recorded = log.events.period[np.isin(log.events.kind, kinds)].min(initial=np.iinfo(np.int32).max)
            label_N[period_N < recorded] = np.nan
        columns.append(label_N)
    return np.stack(columns, axis=1)
