"""Small directories in the shapes ``data.sequences`` and ``data.amazon`` read, and the same with another future."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from data.config import DataConfig
from data.split import SplitConfig

N_ITEMS = 40
PERIODS = 12
DAYS = 28
START = datetime(2012, 3, 5)
"""Where period 1 of the reviews begins: there is a review in its first minutes."""
AMAZON_SPLIT = SplitConfig(
    prior_fit=(1, 5), prior_select=(6, 6), ranker_fit=(7, 8), ranker_stop=(9, 9), validation=(10, 11), test=(12, 12)
)
BRANDS = ("Acme", "Bolt & Co", "Corvid", "Dune", "Ember", "")
KINDS_OF_GOODS = ("Pens", "Paper", "Staplers", "Labels")
AMAZON_FORMATS = ("2014", "2018", "2023", "2023 parquet")

Sequences = dict[str, list[str]]
Review = tuple[str, str, datetime]


def sequences_config(path: Path, /, **changes: object) -> DataConfig:
    """The config of ``configs/data/sequences.yaml`` for a directory of :func:`write_sequences`."""
    values: dict[str, object] = {
        "source": "sequences",
        "path": str(path),
        "origin": "2000-01-01",
        "label_window_days": 1,
        "label_kinds": ["click_conversion"],
        "split": SplitConfig(by="leave_one_out"),
        "ad_columns": ["category"],
        "impressions_per_visit": 4,
    }
    return DataConfig(**(values | changes))  # type: ignore[arg-type]


def amazon_config(path: Path, /, **changes: object) -> DataConfig:
    """The config of ``configs/data/amazon.yaml`` for a directory of :func:`write_amazon`, with spans of its periods."""
    values: dict[str, object] = {
        "source": "amazon",
        "path": str(path),
        "origin": None,
        "label_window_days": DAYS,
        "label_kinds": ["click_conversion"],
        "split": AMAZON_SPLIT,
        "ad_columns": ["category"],
        "impressions_per_visit": 4,
    }
    return DataConfig(**(values | changes))  # type: ignore[arg-type]


def item_id(number: int) -> str:
    return f"B{number:09}"


def sequences(*, seed: int = 0, users: int = 60) -> Sequences:
    """Items of each user, oldest first: 5 to 12, some of them twice."""
    rng = np.random.default_rng(seed)
    return {f"u{user}": [item_id(n) for n in rng.integers(0, N_ITEMS, rng.integers(5, 13))] for user in range(users)}


def write_sequences(directory: Path, rows: Sequences | None = None) -> Path:
    """Write ``sequences.txt`` and ``items.tsv``; the items have a column ``description`` more than they must."""
    directory.mkdir(exist_ok=True, parents=True)
    lines = ["item_id\tbrand\tcategories\ttitle\tdescription"]
    for number in range(N_ITEMS):
        good = KINDS_OF_GOODS[number % 4]
        path = "" if number == 7 else f"Office > {good}"
        brand = BRANDS[number % len(BRANDS)]
        lines.append(f"{item_id(number)}\t{brand}\t{path}\t{good} No. {number}\tThe {good.lower()} you want, {number}")
    (directory / "items.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _write_rows(directory / "sequences.txt", sequences() if rows is None else rows)
    return directory


def change_future_sequences(directory: Path) -> None:
    """Replace every user's last item by another one, so that the events of the test period alone change."""
    path = directory / "sequences.txt"
    rows = {user: items for user, *items in (line.split() for line in path.read_text(encoding="utf-8").splitlines())}
    _write_rows(path, {user: [*items[:-1], _other(items[-1])] for user, items in rows.items()})


def _write_rows(path: Path, rows: Sequences) -> None:
    lines = (" ".join([user, *items]) + "\n" for user, items in rows.items())
    path.write_text("".join(lines), encoding="utf-8")


def _other(item: str) -> str:
    return item_id((int(item[1:]) * 7 + 3) % N_ITEMS)


def reviews(*, seed: int = 0, users: int = 50) -> list[Review]:
    """One to three reviews a user in most periods of 28 days, by the day, several of some days."""
    rng = np.random.default_rng(seed)
    rows = [("U0", item_id(0), START)]
    for period in range(PERIODS):
        for user in range(users):
            if rng.random() < 0.3:
                continue
            day = START + timedelta(days=DAYS * period + int(rng.integers(DAYS)))
            rows += [
                (f"U{user}", item_id(int(item)), day + timedelta(days=int(rng.integers(2)) if n else 0))
                for n, item in enumerate(rng.choice(N_ITEMS, rng.integers(1, 4), replace=False))
            ]
    end = START + timedelta(days=DAYS * PERIODS)
    return [row for row in dict.fromkeys(rows) if row[2] < end]


def write_amazon(directory: Path, year: str = "2018", rows: Sequence[Review] | None = None, *, core: str = "") -> Path:
    """Write a file of reviews and one of items.

    Args:
        directory: where to.
        year: one of :data:`AMAZON_FORMATS`.
        rows: the reviews.
        core: ``"_5"`` for the name of a 5-core file.
    """
    directory.mkdir(exist_ok=True, parents=True)
    review_name, meta_name = {
        "2014": (f"reviews_Office{core}.json.gz", "meta_Office.json.gz"),
        "2018": (f"Office{core}.json.gz", "meta_Office.json.gz"),
        "2023": ("Office.jsonl", "meta_Office.jsonl"),
        "2023 parquet": ("Office.parquet", "meta_Office.parquet"),
    }[year]
    given = reviews() if rows is None else rows
    _write_records(directory / review_name, [_review(year, row) for row in given])
    items = [_item(year, number) for number in range(N_ITEMS)]
    if year == "2014":
        _write_lines(directory / meta_name, map(repr, items))
    else:
        _write_records(directory / meta_name, items)
    return directory


def _review(year: str, row: Review) -> dict[str, Any]:
    user, item, moment = row
    seconds = (moment - datetime(1970, 1, 1)) // timedelta(seconds=1)
    if year.startswith("2023"):
        review = {"rating": 5.0, "title": "Good", "text": "Very good.", "asin": f"{item}-red", "parent_asin": item}
        return review | {"user_id": user, "timestamp": seconds * 1000, "verified_purchase": True}
    review = {"reviewerID": user, "asin": item, "reviewerName": "N. N.", "reviewText": "Very good.", "overall": 5.0}
    return review | {"summary": "Good", "unixReviewTime": seconds, "reviewTime": f"{moment:%m %d, %Y}"}


def _item(year: str, number: int) -> dict[str, Any]:
    """An item of the catalogue, the same in all years."""
    good, brand = KINDS_OF_GOODS[number % 4], BRANDS[number % len(BRANDS)]
    title, path, price = f"{good} No. {number}", ["Office", good], 1.5 * number if number % 3 else None
    item: dict[str, Any] = {"title": title}
    if year == "2014":
        item |= {"asin": item_id(number), "categories": [path, ["Sale", good]], "related": {"also_bought": ["B1"]}}
        item |= {"brand": brand} if brand else {}
        item |= {"price": price} if price else {}
    elif year == "2018":
        dollars = f"${price}" if price else ""
        item |= {"asin": item_id(number), "category": path, "brand": brand, "price": dollars, "details": {}}
    else:
        details = {"Brand": brand} if number % 2 else {}
        item |= {"parent_asin": item_id(number), "categories": path, "main_category": "All Office"}
        item |= {"details": details, "store": brand or None, "price": price, "average_rating": 4.5}
        if year == "2023 parquet":
            item |= {"details": json.dumps(details), "price": str(price)}
    return item


def change_future_amazon(directory: Path, cut: datetime) -> None:
    """Rewrite all reviews at or after a moment: other items and times, other users, one of them new, a third gone."""
    path = next(path for path in directory.iterdir() if not path.name.startswith("meta_"))
    rows = read_records(path)
    time, unit = ("timestamp", 1000) if "timestamp" in rows[0] else ("unixReviewTime", 1)
    user, item = ("user_id", "parent_asin") if "user_id" in rows[0] else ("reviewerID", "asin")
    first = (cut - datetime(1970, 1, 1)) // timedelta(seconds=1) * unit
    last = max(row[time] for row in rows)
    for number, row in enumerate([row for row in rows if row[time] >= first]):
        if number % 3 == 2:
            rows.remove(row)
            continue
        row[item] = _other(row[item])
        row[user] = f"U{int(row[user][1:]) * 3 % 50 if number else 50}"
        row[time] = last - (row[time] - first)
    _write_records(path, rows)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of reviews."""
    if path.suffix == ".parquet":
        return pl.read_parquet(path).to_dicts()
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in raw.splitlines()]


def _write_records(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        pl.DataFrame(rows).write_parquet(path)
    else:
        _write_lines(path, map(json.dumps, rows))


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    content = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
