"""The report of semantic IDs: what a good, a collapsed, a random and a reversed tokenizer get, and the pages."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray
from rich.console import Console
from safetensors.numpy import load_file, save_file

from data.artifacts import to_plain
from data.errors import UserError
from pipeline.grids import NONE
from pipeline.ids_report import IdsQuality, quality_of, render_ids_report, sections, to_console, write_ids_report
from semantic_ids.advertiser_ids import AdvertiserIds
from semantic_ids.unique import resolve_collisions
from tests.pipeline.test_report import Elements, text_of

SIZES = (4, 6, 16)
GOODS = ("coffee", "bread", "soap", "cheese")
KINDS = ("plain", "organic", "budget", "premium", "imported", "local")
N, DIMS = 480, (12, 4)
MARKUP = "<script>alert(1)</script>[bold]"


class Made:
    """Embeddings in 4 groups of 6 of 20, and the codes of a tokenizer that knows it."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.books = [rng.normal(size=(size, sum(DIMS))).astype(np.float32) for size in SIZES]
        for book, length in zip(self.books, (8.0, 3.0, 0.7), strict=True):
            book *= length / np.linalg.norm(book, axis=1, keepdims=True)
        row = rng.permutation(N)
        self.good, self.kind = row % 4, row // 4 % 6
        self.greedy = np.stack([self.good, self.kind, rng.integers(0, SIZES[2], N)], axis=1)
        noise = rng.normal(size=(N, sum(DIMS))) * 0.05
        self.vectors = (self.decoded(self.greedy) + noise).astype(np.float32)

    def decoded(self, codes: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.asarray(sum(book[codes[:, level]] for level, book in enumerate(self.books)), dtype=np.float32)

    def unique(self, greedy: NDArray[np.int64], start: int = 2) -> NDArray[np.int64]:
        """Codes of three levels made unique by a level more, as many as the largest group has."""
        _, group = np.unique(greedy, axis=0, return_inverse=True)
        order = np.argsort(group.reshape(-1), kind="stable")
        ordered = group.reshape(-1)[order]
        first = np.searchsorted(ordered, ordered)
        extra = np.empty(len(greedy), dtype=np.int64)
        extra[order] = np.arange(len(greedy)) - first
        return np.column_stack([greedy, extra])

    def texts(self) -> list[str]:
        return [
            f"{KINDS[kind]} {GOODS[good]} number {place}"
            for place, (good, kind) in enumerate(zip(self.good, self.kind, strict=True))
        ]

    def write(
        self,
        directory: Path,
        *,
        greedy: NDArray[np.int64] | None = None,
        books: Sequence[NDArray[np.float32]] | None = None,
        vectors: NDArray[np.float32] | None = None,
        reconstruction: NDArray[np.float32] | None = None,
        names: Sequence[str | None] | None = None,
        entity: str = "advertiser",
    ) -> Path:
        """The files of the stage, collisions resolved by an extra level."""
        greedy = self.greedy if greedy is None else greedy
        books = list(self.books if books is None else books)
        vectors = self.vectors if vectors is None else vectors
        if reconstruction is None:
            reconstruction = np.asarray(sum(book[greedy[:, level]] for level, book in enumerate(books)))
        codes = self.unique(greedy)
        books = [*books, np.zeros((int(codes[:, -1].max()) + 1, sum(DIMS)), dtype=np.float32)]
        directory.mkdir(parents=True, exist_ok=True)
        ids = np.arange(N) + 1000
        AdvertiserIds(ids, codes, books, extra_level=True, entity=entity).save(directory)
        arrays = {
            "vectors_AD": vectors,
            "greedy_AL": greedy.astype(np.int32),
            "reconstruction_AD": reconstruction.astype(np.float16),
        }
        save_file(
            {name: np.ascontiguousarray(array) for name, array in arrays.items()}, directory / "embeddings.safetensors"
        )
        facts = {
            "source_names": ["text", "collaborative"],
            "source_dims": list(DIMS),
            "entity": entity,
            "config": {"tokenizer": "rqvae"},
        }
        (directory / "embeddings.json").write_text(json.dumps(facts))
        names = [f"shop {place}" for place in range(N)] if names is None else names
        pl.DataFrame({"advertiser_id": ids, "name": names, "text": self.texts()}).write_parquet(
            directory / "entities.parquet"
        )
        return directory


MADE = Made()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MADE.write(tmp_path_factory.mktemp("ids") / "good")


@pytest.fixture(scope="module")
def found(folder: Path) -> IdsQuality:
    return quality_of(folder)


def console_text(quality: IdsQuality, width: int = 160) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(to_console(quality))
    return console.export_text()


# Figures


def test_a_good_tokenizer(found: IdsQuality) -> None:
    assert (found.entity, found.entities, found.level_sizes, found.tokenizer) == ("advertiser", N, SIZES, "rqvae")
    assert [level.dead for level in found.levels] == [0, 0, 0]
    assert found.levels[0].entropy_ratio == pytest.approx(1)
    assert found.levels[0].gini == pytest.approx(0)
    assert sum(found.levels[2].usage) == N
    error = np.square(MADE.vectors - MADE.decoded(MADE.greedy)).sum()
    assert found.reconstruction_error == pytest.approx(error / (MADE.vectors.var(0).sum() * N), rel=1e-2)
    near = [depth.near for depth in found.depths]
    assert near[0] is not None
    assert near[0].share == near[0].preservation == pytest.approx(1)
    assert near[0].share_random == pytest.approx(0.25, abs=0.01)
    assert near[1] is not None
    assert near[1].preservation > 0.95
    assert found.levels[0].explained is not None
    assert found.levels[0].explained > 0.8
    assert found.unknown_share == found.resolving.identical_share == 0
    assert found.findings == ()


def test_collisions_are_counted_before_and_moves_after(found: IdsQuality, folder: Path) -> None:
    _, counts = np.unique(MADE.greedy, axis=0, return_counts=True)
    extra = pl.read_parquet(folder / "codes.parquet")["c4"].to_numpy()
    resolving = found.resolving
    assert resolving.collision_rate == pytest.approx(counts[counts > 1].sum() / N)
    assert resolving.largest_collision == counts.max() == resolving.extra_codes
    assert resolving.groups == {size: int((counts == size).sum()) for size in np.unique(counts).tolist()}
    assert resolving.moved_share == resolving.extra_share == pytest.approx((extra > 0).mean())
    assert resolving.moved_at == pytest.approx((0, 0, 0, (extra > 0).mean()))
    assert resolving.displacement == 0
    assert resolving.collision_rate_random == pytest.approx(1 - (1 - 1 / 384) ** (N - 1))


def test_prefixes_are_covered(found: IdsQuality) -> None:
    assert [depth.possible for depth in found.depths] == [4, 24, 384]
    assert [depth.used for depth in found.depths] == [4, 24, len(np.unique(MADE.greedy, axis=0))]
    last = found.depths[2]
    assert last.of_possible == pytest.approx(last.used / 384)
    assert last.per_advertiser == pytest.approx(last.used / N)
    assert last.coverage == pytest.approx(last.used / 384)
    assert last.used_by_random == pytest.approx(384 * (1 - (1 - 1 / 384) ** N))
    assert found.depths[1].largest == N / 24


def test_codes_moved_at_a_level_of_the_tokenizer(tmp_path: Path) -> None:
    greedy = MADE.greedy.copy()
    directory = MADE.write(tmp_path / "ids", greedy=greedy)
    big = [*MADE.books[:2], np.concatenate([MADE.books[2], MADE.books[2] + 0.01])]
    codes, big = resolve_collisions(MADE.vectors, greedy, big)
    assert codes.shape[1] == 3
    AdvertiserIds(np.arange(N) + 1000, codes, big).save(directory)
    found = quality_of(directory)
    moved = (codes != greedy).any(1).mean()
    assert found.resolving.moved_share == pytest.approx(moved)
    assert sum(found.resolving.moved_at) == pytest.approx(moved)
    assert found.resolving.extra_codes is None
    assert found.resolving.extra_share == 0
    assert found.resolving.displacement is not None
    assert 0 < found.resolving.displacement < 0.1
    assert found.depths[2].near is None
    assert "told apart by an extra level none" in text_of(render_ids_report(found))


# Bad tokenizers


def collapsed() -> dict[str, Any]:
    return {"greedy": np.zeros_like(MADE.greedy)}


def random() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {"greedy": np.stack([rng.integers(0, size, N) for size in SIZES], axis=1)}


def misaligned() -> dict[str, Any]:
    return {"greedy": MADE.greedy[np.random.default_rng(2).permutation(N)]}


def levels_reversed() -> dict[str, Any]:
    return {"greedy": MADE.greedy[:, ::-1].copy(), "books": MADE.books[::-1]}


def half_collapsed() -> dict[str, Any]:
    greedy = MADE.greedy.copy()
    greedy[:, 0] = 0
    return {"greedy": greedy}


def figures(quality: IdsQuality) -> Iterator[tuple[str, float, bool]]:
    """Every figure with a direction: its name, its value so that more is better, may random codes win it."""
    for place, level in enumerate(quality.levels, 1):
        yield f"live codes {place}", -level.dead, False
        yield f"perplexity {place}", level.perplexity / level.codes, True
        yield f"entropy ratio {place}", level.entropy_ratio, True
        yield f"gini {place}", -level.gini, True
    for place, depth in enumerate(quality.depths, 1):
        for name in ("used", "coverage", "of_possible", "per_advertiser"):
            yield f"{name} {place}", getattr(depth, name), True
        yield f"largest {place}", -depth.largest, True
        yield f"preservation {place}", depth.near.preservation if depth.near else 0.0, False
        yield f"explained {place}", depth.explained or 0.0, False
    resolving = quality.resolving
    yield "collision rate", -resolving.collision_rate, True
    yield "largest collision", -resolving.largest_collision, True
    yield "moved", -resolving.moved_share, True
    yield "extra", -resolving.extra_share, True
    yield "reconstruction error", -(quality.reconstruction_error or 0), False


@pytest.mark.parametrize("bad", [collapsed, half_collapsed])
def test_a_collapsed_tokenizer_improves_no_figure(bad: Any, found: IdsQuality, tmp_path: Path) -> None:
    worse = quality_of(MADE.write(tmp_path / "ids", **bad()))
    for (name, value, _), (_, good, _) in zip(figures(worse), figures(found), strict=True):
        assert value <= good + 1e-9, name
    assert worse.findings[0].startswith("Level 1 has collapsed")
    assert (
        sum(value < good - 1e-9 for (_, value, _), (_, good, _) in zip(figures(worse), figures(found), strict=True)) > 8
    )


def test_one_code_for_all_scores_zero(tmp_path: Path) -> None:
    worst = quality_of(MADE.write(tmp_path / "ids", **collapsed()))
    assert worst.resolving.collision_rate == 1
    assert worst.resolving.largest_collision == N
    assert worst.resolving.moved_share == pytest.approx(1 - 1 / N)
    assert all(depth.near is not None and depth.near.preservation == 0 for depth in worst.depths)
    assert all(depth.explained == 0 for depth in worst.depths)
    assert all(level.perplexity == 1 and level.entropy_ratio == 0 for level in worst.levels)


@pytest.mark.parametrize("bad", [random, misaligned])
def test_codes_that_know_nothing_win_only_where_the_report_says_so(bad: Any, found: IdsQuality, tmp_path: Path) -> None:
    worse = quality_of(MADE.write(tmp_path / "ids", **bad()))
    for (name, value, random_may_win), (_, good, _) in zip(figures(worse), figures(found), strict=True):
        assert random_may_win or value <= good + 1e-9, name
    assert "no more often than by chance" in worse.findings[0]
    assert "random codes have all three" in worse.findings[0]
    assert worse.reconstruction_error is not None
    assert worse.reconstruction_error > 1
    assert worse.depths[0].explained == pytest.approx(0, abs=0.02)
    assert worse.depths[1].explained == pytest.approx(0, abs=0.05)


def test_random_codes_reach_what_the_report_says_they_do(tmp_path: Path) -> None:
    dealt = quality_of(MADE.write(tmp_path / "ids", **random()))
    assert dealt.resolving.collision_rate == pytest.approx(dealt.resolving.collision_rate_random, abs=0.05)
    for depth in dealt.depths:
        assert depth.used == pytest.approx(depth.used_by_random, rel=0.06)


def test_levels_in_reversed_order_are_worse_or_said_to_be(found: IdsQuality, tmp_path: Path) -> None:
    worse = quality_of(MADE.write(tmp_path / "ids", **levels_reversed()))
    for depth, good in zip(worse.depths[:2], found.depths, strict=False):
        assert depth.near is not None
        assert good.near is not None
        assert depth.near.preservation < good.near.preservation
        assert depth.explained is not None
        assert good.explained is not None
        assert depth.explained < good.explained
    assert any("do not go from coarse to fine: level 3 alone" in finding for finding in worse.findings)
    assert worse.resolving.collision_rate == found.resolving.collision_rate
    assert worse.reconstruction_error == pytest.approx(found.reconstruction_error, rel=1e-3)


def test_dead_codes_and_uneven_use_are_said(tmp_path: Path) -> None:
    greedy = MADE.greedy.copy()
    greedy[:, 2] //= 2
    greedy[greedy[:, 0] == 3, 0] = 0
    greedy[(greedy[:, 0] == 1) & (np.arange(N) % 10 > 0), 0] = 0
    said = " ".join(quality_of(MADE.write(tmp_path / "ids", greedy=greedy)).findings)
    assert "8 of 16 codes of level 3 are dead" in said
    assert "Level 1 is used unevenly" in said


# What the embeddings know


def test_zero_blocks_are_counted_and_have_no_neighbours(tmp_path: Path) -> None:
    vectors = MADE.vectors.copy()
    vectors[: N // 4, DIMS[0] :] = 0
    vectors[: N // 8] = 0
    found = quality_of(MADE.write(tmp_path / "ids", vectors=vectors))
    assert [source.known for source in found.sources] == pytest.approx([7 / 8, 3 / 4])
    assert found.unknown_share == pytest.approx(1 / 8)
    assert found.neighbours_of == N * 7 // 8
    assert found.resolving.identical_share == pytest.approx(1 / 8)
    assert "12.5 % of the advertisers have a zero embedding" in " ".join(found.findings)
    assert "have the embedding of another" in " ".join(found.findings)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_embeddings_have_a_report_without_nan(value: float, tmp_path: Path) -> None:
    vectors = np.full_like(MADE.vectors, value)
    found = quality_of(MADE.write(tmp_path / "ids", vectors=vectors))
    assert found.reconstruction_error is None
    assert found.depths[0].explained is None
    check_plain(found)


# JSON, page, terminal


def check_plain(found: IdsQuality) -> None:
    def numbers(value: Any) -> Iterator[float]:
        for one in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
            yield from numbers(one)
        if isinstance(value, float):
            yield value

    plain = to_plain(found)
    assert json.loads(json.dumps(plain, allow_nan=False))["entities"] == found.entities
    assert all(math.isfinite(number) for number in numbers(asdict(found)))
    for text in (text_of(render_ids_report(found)), console_text(found)):
        assert not re.search(r"\b(nan|None|inf)\b", text)


def test_it_is_json(found: IdsQuality) -> None:
    check_plain(found)


def test_the_same_files_give_the_same_report(found: IdsQuality, folder: Path, tmp_path: Path) -> None:
    write_ids_report(quality_of(folder), tmp_path / "new" / "ids.html")
    assert (tmp_path / "new" / "ids.html").read_text(encoding="utf-8") == render_ids_report(found)


def test_every_figure_is_on_the_page_and_on_the_terminal(found: IdsQuality) -> None:
    page, terminal = text_of(render_ids_report(found)), " ".join(console_text(found).split())
    for section in sections(found):
        assert section.title in page
        for text in (*section.notes, *(" ".join(filter(None, line)) for grid in section.grids for line in grid.lines)):
            assert " ".join(text.split()) in page
            assert " ".join(text.split()) in terminal
    for example in found.examples:
        for text in (*example.prefix, *(member.name for member in example.members)):
            assert text in page
            assert text in terminal


def test_the_page_stands_on_its_own(found: IdsQuality) -> None:
    page = render_ids_report(found)
    assert page.startswith("<!DOCTYPE html>")
    elements = Elements(page)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in elements.tags}
    assert not re.search(r"url\(|@import|https?:", page)
    anchors = {given["href"] for tag, given in elements.tags if tag == "a"}
    assert anchors == {f"#{given['id']}" for tag, given in elements.tags if tag == "section"}
    assert page.count('<svg class="figure') == 3


def test_findings_stand_before_the_figures(tmp_path: Path) -> None:
    bad = quality_of(MADE.write(tmp_path / "ids", **random()))
    page = text_of(render_ids_report(bad))
    assert page.index(bad.findings[0]) < page.index("reconstruction error")
    assert console_text(bad, width=400).splitlines()[1].endswith(bad.findings[0])


def test_items_are_called_items(tmp_path: Path) -> None:
    found = quality_of(MADE.write(tmp_path / "ids", entity="item"))
    assert "480 items" in text_of(render_ids_report(found))
    assert "advertiser" not in text_of(render_ids_report(found))


@pytest.mark.parametrize("width", [80, 100])
def test_the_terminal_may_be_narrow(width: int, found: IdsQuality) -> None:
    text = console_text(found, width=width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text


# Words


def test_prefixes_are_shown_by_what_they_sell(found: IdsQuality) -> None:
    level_1 = [example for example in found.examples if len(example.prefix) == 1]
    level_2 = [example for example in found.examples if len(example.prefix) == 2]
    assert len(level_1) == 4  # all there are
    assert len(level_2) == 6
    assert [example.chosen for example in level_2] == ["largest"] * 3 + ["median size"] * 3
    for example in found.examples:
        code, goods = int(re.findall(r"\d+", example.prefix[0])[1]), example.words
        assert GOODS[code] in goods
        assert all(GOODS[code] in member.text for member in example.members)
        assert len(example.members) == 5
    for example in level_2:
        assert KINDS[int(re.findall(r"\d+", example.prefix[1])[1])] in example.words


def test_texts_are_escaped_and_cut(tmp_path: Path) -> None:
    names: list[str | None] = [f"{MARKUP} {'long ' * 60}"] * N
    found = quality_of(MADE.write(tmp_path / "ids", names=names))
    page = render_ids_report(found)
    assert "<script>" not in page
    assert "[bold]" in text_of(page)
    assert MARKUP in console_text(found)
    assert max(len(member.name) for example in found.examples for member in example.members) <= 120


def test_names_may_be_missing(tmp_path: Path) -> None:
    found = quality_of(MADE.write(tmp_path / "ids", names=pl.Series([None] * N, dtype=pl.String).to_list()))
    assert all(member.name == "" for example in found.examples for member in example.members)
    assert NONE not in {member.text for example in found.examples for member in example.members}


# Bad input


@pytest.mark.parametrize("name", ["embeddings.safetensors", "embeddings.json", "entities.parquet", "ids.json"])
def test_an_artifact_without_its_files_says_to_make_the_ids_again(name: str, tmp_path: Path) -> None:
    directory = MADE.write(tmp_path / "ids")
    (directory / name).unlink()
    with pytest.raises(UserError, match=f"without {name}[\\s\\S]*make the IDs again"):
        quality_of(directory)


def test_a_run_is_told_from_its_stage(tmp_path: Path) -> None:
    MADE.write(tmp_path / "run" / "semantic_ids")
    with pytest.raises(UserError, match=r"give .*run/semantic_ids"):
        quality_of(tmp_path / "run")
    with pytest.raises(UserError, match="is no folder"):
        quality_of(tmp_path / "nowhere")


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    directory = MADE.write(tmp_path / "ids")
    (directory / "embeddings.json").write_text("{")
    with pytest.raises(UserError, match="as they were written"):
        quality_of(directory)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda a: {**a, "vectors_AD": a["vectors_AD"][:-1]}, "480 IDs stand beside 479 embeddings"),
        (lambda a: {**a, "greedy_AL": a["greedy_AL"] + 4}, "outside their codebooks"),
        (lambda a: {**a, "greedy_AL": a["greedy_AL"][:, :2]}, "3 levels of the tokenizer and greedy codes 2"),
        (lambda a: {**a, "reconstruction_AD": a["reconstruction_AD"][:, :3]}, "different numbers of features"),
        (lambda a: {**a, "vectors_AD": a["vectors_AD"] * np.float32(np.nan)}, "no numbers"),
    ],
)
def test_files_that_do_not_belong_together(change: Any, problem: str, tmp_path: Path) -> None:
    directory = MADE.write(tmp_path / "ids")
    arrays = change(load_file(directory / "embeddings.safetensors"))
    save_file(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()}, directory / "embeddings.safetensors"
    )
    with pytest.raises(UserError, match=problem):
        quality_of(directory)


def test_entities_of_another_order(tmp_path: Path) -> None:
    directory = MADE.write(tmp_path / "ids")
    pl.read_parquet(directory / "entities.parquet").reverse().write_parquet(directory / "entities.parquet")
    with pytest.raises(UserError, match="another order"):
        quality_of(directory)
