"""The HTML pages' templates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jinja2


def template(name: str, **filters: Callable[..., Any]) -> jinja2.Template:
    """A template of ``pipeline/templates``; text is escaped, and a name it does not get is an error.

    Args:
        name: of its file.
        filters: functions it may call on values, by name.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(name)
