"""The quality of semantic IDs (`pipeline.ids_quality`) as a page with plots, and as tables on the terminal.

Both show the same figures from the same grids. The page stands on its own, in the look of the report; what is wrong
is said in words before any figure.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from data.artifacts import atomic_write_text
from pipeline.figures import code_usage, group_sizes, neighbours_by_depth
from pipeline.grids import NONE, Grid, Plot, Section, console_parts, count, percent
from pipeline.ids_quality import Example, IdsQuality, Member, quality_of
from pipeline.pages import template
from pipeline.verdict import number

__all__ = ["IdsQuality", "quality_of", "render_ids_report", "sections", "to_console", "write_ids_report"]


def write_ids_report(found: IdsQuality, path: Path) -> None:
    """Write the page, whole or not at all.

    Args:
        found: of `quality_of`.
        path: of the HTML file; missing folders are made.

    Raises:
        UserError: the file cannot be written.
    """
    atomic_write_text(path, render_ids_report(found))


def render_ids_report(found: IdsQuality) -> str:
    """The text of the page."""
    return template("ids_report.html.j2", title_of=_title, words_of=_words).render(
        scope=scope(found),
        findings=found.findings,
        sections=sections(found),
        plots=_plots(found),
        examples=found.examples,
    )


def to_console(found: IdsQuality) -> Group:
    """The figures for the terminal."""
    parts: list[Text | Table] = [
        Text(scope(found)),
        *(Text(f"! {finding}", style="yellow") for finding in found.findings),
    ]
    for section in sections(found):
        parts += console_parts(section)
    for example in found.examples:
        parts.append(Text.assemble("\n", (" ".join(example.prefix), "bold"), f"  {_title(example)}"))
        if example.words:
            parts.append(Text(f"  {', '.join(example.words)}", style="dim"))
        parts += [Text(f"  · {_words(member)}") for member in example.members]
    return Group(*parts)


def scope(found: IdsQuality) -> str:
    """What the figures are of."""
    sizes = " × ".join(count(size) for size in found.level_sizes)
    extra = f", and an extra level of {count(found.resolving.extra_codes)}" if found.resolving.extra_codes else ""
    tokenizer = f"Tokenizer {found.tokenizer}. " if found.tokenizer else ""
    return f"{count(found.entities)} {found.entity}s, {sizes} codes{extra}. {tokenizer}Version {found.version[:12]}."


def sections(found: IdsQuality) -> tuple[Section, ...]:
    """All figures, as text."""
    return (
        _summary(found),
        _use(found),
        _prefixes(found),
        _near(found),
        _collisions(found),
        _embeddings(found),
        _in_words(found),
    )


def _summary(q: IdsQuality) -> Section:
    resolving, first, last = q.resolving, q.depths[0], q.depths[-1]
    beyond = first.near.preservation if first.near else None
    n_dead, n_codes = sum(level.dead for level in q.levels), sum(level.codes for level in q.levels)
    lines = (
        ("share with the ID of another, before resolving", percent(resolving.collision_rate), _random_collisions(q)),
        ("largest group with one ID", count(resolving.largest_collision), ""),
        ("dead codes", f"{count(n_dead)} of {count(n_codes)}", ""),
        ("entropy ratio of level 1", number(q.levels[0].entropy_ratio), ""),
        ("IDs in use before resolving", count(last.used), number(last.used_by_random, 0)),
        ("reconstruction error", _number(q.reconstruction_error), "above 1"),
        ("nearest with the same level 1, beyond chance", _number(beyond), "0"),
        ("variance explained by level 1", percent(first.explained), "0"),
        ("share moved by resolving", percent(resolving.moved_share), percent(1 - last.used_by_random / q.entities)),
    )
    notes = (
        "Use, coverage and collisions are those of the tokenizer, before collisions are resolved. Random codes are "
        "used evenly and collide rarely: only with neighbours preserved and variance explained is that worth anything.",
    )
    return Section("summary", "In short", notes, (Grid(("", "these IDs", "random codes"), lines),))


def _use(q: IdsQuality) -> Section:
    lines = tuple(
        (
            str(place),
            count(level.codes),
            count(level.dead),
            number(level.perplexity, 1),
            number(level.entropy_ratio),
            number(level.gini),
            percent(level.explained),
        )
        for place, level in enumerate(q.levels, 1)
    )
    columns = ("level", "codes", "dead", "perplexity", "entropy ratio", "Gini", "explains")
    notes = (
        f"Before resolving. Entropy ratio: 1 where all codes have as many {q.entity}s. Explains: share of the "
        "embeddings' variance that lies between the level's codes, beyond chance; level 1, the coarsest, has the most.",
    )
    return Section("use", "Use of codes", notes, (Grid(columns, lines),))


def _prefixes(q: IdsQuality) -> Section:
    covered = tuple(
        (
            _reach(place),
            count(depth.possible),
            count(depth.used),
            number(depth.used_by_random, 0),
            percent(depth.of_possible),
            percent(depth.coverage),
        )
        for place, depth in enumerate(q.depths, 1)
    )
    members = tuple(
        (
            _reach(place),
            number(depth.per_advertiser),
            count(depth.largest),
            number(depth.median, 1),
            count(depth.used_after),
            count(depth.largest_after),
        )
        for place, depth in enumerate(q.depths, 1)
    )
    notes = (
        f"Different prefixes that {q.entity}s have before resolving, by length; the most is what is possible or one "
        f"for each {q.entity}, whichever is less. Random codes cover more: they know nothing of what belongs together.",
    )
    grids = (
        Grid(("levels", "possible", "used", "random", "of possible", "of the most"), covered),
        Grid(("levels", f"per {q.entity}", "largest", "median", "used, resolved", "largest, resolved"), members),
    )
    return Section("prefixes", "Coverage of prefixes", notes, grids)


def _near(q: IdsQuality) -> Section:
    lines = tuple(
        (
            _reach(place),
            number(depth.near.share_greedy),
            number(depth.near.share),
            number(depth.near.share_random),
            f"{number(depth.near.preservation)} ± {number(2 * depth.near.error)}",
            percent(depth.explained),
        )
        for place, depth in enumerate(q.depths, 1)
        if depth.near
    )
    columns = ("levels", "before resolving", "IDs", "dealt at random", "beyond chance", "variance explained")
    whose = "all" if q.neighbours_of == q.entities else f"{count(q.neighbours_of)} of them"
    notes = (
        f"Of the {q.neighbours} {q.entity}s with the nearest embeddings, how many share the prefix: the mean over "
        f"{whose}, looked up among all. Dealt at random: the same IDs, given to others. Beyond chance: 1 where all "
        f"nearest share it, 0 as at random; ± twice the standard error. Whole IDs are unique, so none is shared."
        if q.neighbours
        else f"No two {q.entity}s have an embedding, so there are no neighbours.",
    )
    return Section("neighbours", "Neighbours", notes, (Grid(columns, lines or ((NONE,) * len(columns),)),))


def _collisions(q: IdsQuality) -> Section:
    r = q.resolving
    levels = [f"· first at level {level}" for level in range(1, len(q.levels) + 1)]
    levels += ["· by the extra level alone"] * (r.extra_codes is not None)
    lines = (
        ("with the ID of another, before resolving", percent(r.collision_rate)),
        ("· as random codes would have", _random_collisions(q)),
        ("· with the embedding of another", percent(r.identical_share)),
        ("largest group with one ID", count(r.largest_collision)),
        ("moved by resolving", percent(r.moved_share)),
        *((name, percent(share)) for name, share in zip(levels, r.moved_at, strict=True)),
        ("told apart by an extra level", percent(r.extra_share) if r.extra_codes else NONE),
        *((("codes of the extra level", count(r.extra_codes)),) if r.extra_codes else ()),
        ("displacement over the codes' variance", _number(r.displacement, 4)),
    )
    notes = (
        f"All {q.entity}s, before and after collisions are resolved. Displacement: squared distance from the vector "
        "of the tokenizer's codes to that of the unique ID.",
    )
    return Section("collisions", "Collisions and resolving", notes, (Grid(("", ""), lines),))


def _embeddings(q: IdsQuality) -> Section:
    lines = (
        *(
            (source.name, count(source.dims), percent(source.known), _number(source.reconstruction_error))
            for source in q.sources
        ),
        (
            "all",
            count(sum(source.dims for source in q.sources)),
            percent(1 - q.unknown_share),
            _number(q.reconstruction_error),
        ),
    )
    notes = (
        "A source that knows nothing of one has a block of zeros there. Error: squared error of the reconstruction "
        "over the variance, 0 perfect, 1 as good as the mean; of a source where it is known, of all with the zeros.",
    )
    columns = ("", "features", "known", "error")
    return Section("embeddings", "Embeddings", notes, (Grid(columns, lines),))


def _in_words(q: IdsQuality) -> Section:
    notes = (
        "The largest prefixes of levels 1 and 2 and those of median size, of those that are shared at all. Members "
        "from the nearest to the prefix's mean to the farthest, at even steps; words that stand in more of the "
        "members' texts than elsewhere."
        if q.examples
        else f"No two {q.entity}s share a prefix.",
    )
    return Section("examples", "What shares a prefix", notes, ())


def _plots(q: IdsQuality) -> dict[str, list[Plot]]:
    """The plots by section."""
    return {
        "use": [
            Plot(
                code_usage([level.usage for level in q.levels]),
                "Use of codes",
                f"{q.entity.capitalize()}s under each code before resolving, the most used first. Dashed: even use.",
            )
        ],
        "neighbours": [
            Plot(
                neighbours_by_depth([(d.near.share, d.near.share_random) for d in q.depths if d.near]),
                "Neighbours by prefix length",
                f"Share of the {q.neighbours} nearest with the same prefix; grey: the same IDs dealt at random.",
            )
        ],
        "collisions": [
            Plot(
                group_sizes(q.resolving.groups),
                "Sizes of groups",
                f"{q.entity.capitalize()}s by how many have the same ID before resolving; grey: alone with it.",
            )
        ],
    }


def _title(example: Example) -> str:
    return f"{count(example.size)}, {example.chosen}"


def _words(member: Member) -> str:
    both = [part for part in (member.name, member.text) if part]
    return ": ".join(dict.fromkeys(both)) or "no name, no text"


def _reach(depth: int) -> str:
    return "1" if depth == 1 else f"1–{depth}"


def _random_collisions(q: IdsQuality) -> str:
    return percent(q.resolving.collision_rate_random)


def _number(value: float | None, digits: int = 3) -> str:
    return NONE if value is None else number(value, digits)
