"""What happens to IDs when the catalogue changes: cold advertisers, and a refit after drift.

    python -m benchmarks.semantic_ids_cold                      all, of The Complete Journey, in a temporary folder
    python -m benchmarks.semantic_ids_cold cold /data/tables    one of cold, drift; of tables prepared before

*Cold*: a tenth of the advertisers is left out of every table, IDs are made of the rest, and the tenth gets IDs by
``adsid ids assign``. Bar: no existing ID changes, and the share of their ten nearest old advertisers that have their
level-1 code is at least 0.9 of the same share among the old ones. Nearest is by what is known of an advertiser: of
a cold one its text, of an old one text and co-conversions. A second row goes by text alone on both sides, a third by
the embeddings that the cold ones have once their customers are known.

*Drift*: IDs made of weeks 1-20 are refitted on weeks 1-30; the ratio is over what a fit from scratch keeps.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.measure import row
from data.artifacts import Manifest, hash_directory, to_plain
from data.log import load_log
from data.prepare import prepare
from pipeline.config import AdsidConfig, compose
from pipeline.engine import Context
from pipeline.ids import assign_file, refit_directory
from pipeline.quiet import quiet_libraries
from pipeline.stages import make_semantic_ids
from semantic_ids.change import TOLERANCE, IdArtifact, compare, prefix_share
from semantic_ids.tokenize import entity_embeddings

SEEDS, TOKENIZERS = (0, 1, 2), ("rqvae", "rqkmeans")
HELD_OUT = 0.1
BASE = ("data=complete_journey", "experiment=full", "trainer.progress_bar=false", "trainer.accelerator=cpu")
EARLY, LATE = "data.split.prior_fit=[1,20]", "data.split.prior_fit=[1,30]"


def main() -> None:
    """Run the benchmarks that the command line names."""
    benchmarks: dict[str, Callable[[Path], None]] = {"cold": cold, "drift": drift}
    wanted = [name for name in sys.argv[1:] if name in benchmarks] or list(benchmarks)
    folders = [name for name in sys.argv[1:] if name not in benchmarks]
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        tables = Path(folders[0] if folders else temporary)
        if not folders:
            prepare(compose(list(BASE)).data, tables)
        for name in wanted:
            benchmarks[name](tables)


def cold(tables: Path) -> None:
    """A tenth of the advertisers as new ones."""
    for tokenizer, seed in product(TOKENIZERS, SEEDS):
        with tempfile.TemporaryDirectory() as temporary:
            _cold(tables, Path(temporary), tokenizer, seed)


def _cold(tables: Path, folder: Path, tokenizer: str, seed: int) -> None:
    config, name = compose([*BASE, f"semantic_ids={tokenizer}", f"seed={seed}"]), f"{tokenizer}, seed {seed}: "
    advertisers = pl.read_parquet(tables / "advertisers.parquet")
    held_out = advertisers.sample(fraction=HELD_OUT, seed=seed).sort("advertiser_id")
    leave_out(tables, held_out["advertiser_id"], folder / "tables")
    held_out.write_parquet(folder / "new.parquet")
    ids = make_ids(folder / "tables", config, folder / "ids")
    manifest = assign_file(folder / "new.parquet", ids, folder / "grown")
    old, grown = IdArtifact.load(ids), IdArtifact.load(folder / "grown")
    found = compare(old.ids, grown.ids)
    changed = found.n_changed + found.n_gone + len(found.books_changed)
    row(f"{name}existing IDs that changed", changed, "IDs")
    row(f"{name}cold IDs moved from their greedy codes", manifest.metrics["assigned"]["moved_share"], "share")

    is_new = grown.entities["advertiser_id"].is_in(held_out["advertiser_id"].implode()).to_numpy()
    codes_A1, codes_N1 = old.ids.codes_AL[:, :1], grown.ids.codes_AL[is_new, :1]
    vectors_ND = grown.embeddings.vectors_AD[is_new]
    trained = prefix_share(old.embeddings, codes_A1)[0]
    trained_text = prefix_share(old.embeddings, codes_A1, sources=("text",))[0]
    new = prefix_share(old.embeddings, codes_A1, vectors_ND, codes_N1)[0]
    row(f"{name}nearest old with their level-1 code, cold over trained", new, "share", ratio=new / trained)
    row(f"{name}the same, nearest by text on both sides", new, "share", ratio=new / trained_text)

    log = load_log(tables, config.data, evaluate="validation")
    whole = entity_embeddings(log, config.semantic_ids)
    in_new = np.isin(log.advertiser_ids, held_out["advertiser_id"].to_numpy())
    rest = replace(whole, vectors_AD=whole.vectors_AD[~in_new])
    true_new = prefix_share(rest, codes_A1, whole.vectors_AD[in_new], codes_N1)[0]
    true_old = prefix_share(rest, codes_A1)[0]
    row(f"{name}the same, nearest by text and customers", true_new, "share", ratio=true_new / true_old)


def drift(tables: Path) -> None:
    """Ten more weeks."""
    for tokenizer, seed in product(TOKENIZERS, SEEDS):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            early = compose([*BASE, f"semantic_ids={tokenizer}", f"seed={seed}", EARLY])
            ids = make_ids(tables, early, folder / "ids")
            for tolerance in (0.0, TOLERANCE):
                _drift(ids, folder, f"{tokenizer}, seed {seed}, tolerance {tolerance}: ", tolerance)


def _drift(ids: Path, folder: Path, name: str, tolerance: float) -> None:
    data, output = ids.with_suffix(".data"), folder / f"refit-{tolerance}"
    figures = refit_directory(ids, data, output, [LATE], tolerance=tolerance).metrics["refit"]
    scratch = max(figures["scratch_kept_share"], 1e-9)
    row(f"{name}IDs kept", figures["kept_share"], "share", ratio=figures["kept_share"] / scratch)
    for level, kept in enumerate(figures["kept_share_by_level"], 1):
        from_scratch = figures["scratch_kept_share_by_level"][level - 1]
        row(f"{name}first {level} codes kept", kept, "share", ratio=kept / max(from_scratch, 1e-9))
    error, greedy = figures["reconstruction_error_ids"], figures["reconstruction_error_greedy"]
    row(f"{name}reconstruction error, over that of greedy codes", error, "of variance", ratio=error / greedy)


def make_ids(tables: Path, config: AdsidConfig, output: Path) -> Path:
    """The artifact of the stage ``semantic_ids``, made of links to the tables with a manifest beside them."""
    data, work = output.with_suffix(".data"), output.with_suffix(".work")
    for folder in (output, data, work):
        folder.mkdir()
    for table in tables.glob("*.parquet"):
        (data / table.name).symlink_to(table.resolve())
    Manifest("data", "", config=to_plain(config.data), content_hash=hash_directory(data)).write(data)
    make_semantic_ids(Context(config=config, inputs={"data": data}, output=output, work=work, shared={}))
    return output


def leave_out(tables: Path, held_out: pl.Series, output: Path) -> None:
    """Write the tables as if some advertisers had never been there."""
    output.mkdir()
    known = ~pl.col("advertiser_id").is_in(held_out.implode()) | pl.col("advertiser_id").is_null()
    for name in ("advertisers", "ads", "events"):
        pl.scan_parquet(tables / f"{name}.parquet").filter(known).sink_parquet(output / f"{name}.parquet")
    ads = pl.read_parquet(output / "ads.parquet")["ad_id"]
    placements = pl.scan_parquet(tables / "placements.parquet").filter(pl.col("ad_id").is_in(ads.implode()))
    placements.sink_parquet(output / "placements.parquet")
    pl.read_parquet(tables / "users.parquet").write_parquet(output / "users.parquet")


if __name__ == "__main__":
    main()
