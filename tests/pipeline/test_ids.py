"""`adsid ids`: new advertisers beside the old, a refit after drift, and what cannot be done is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner, Result

import cli
from data.artifacts import Manifest, fingerprint, hash_directory, to_plain
from data.log import load_log
from data.writer import write_tables
from pipeline.commands.terminal import OUR_MISTAKE, USER_MISTAKE
from semantic_ids import change, tokenize
from semantic_ids.advertiser_ids import AdvertiserIds
from semantic_ids.change import IdArtifact, compare
from tests.logs import tiny_config, tiny_tables
from tests.semantic_ids.test_change import bag, config, make, some


@pytest.fixture(autouse=True)
def words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tokenize, "text_embeddings", bag)
    monkeypatch.setattr(change, "text_embeddings", bag)
    monkeypatch.chdir(tmp_path)


@dataclass(frozen=True)
class Run:
    """A run directory with the artifacts ``data`` and ``semantic_ids``."""

    folder: Path

    @property
    def ids(self) -> Path:
        return self.folder / "semantic_ids"

    @property
    def data(self) -> Path:
        return self.folder / "data"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    found = Run(tmp_path_factory.mktemp("run"))
    found.data.mkdir()
    write_tables(tiny_tables(), found.data)
    manifest = Manifest("data", "", config=to_plain(tiny_config()), content_hash=hash_directory(found.data))
    manifest.write(found.data)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tokenize, "text_embeddings", bag)
        make(load_log(found.data, tiny_config(), evaluate="validation"), config(), found.ids)
    return found


@pytest.fixture
def new(tmp_path: Path) -> Path:
    some((99, 300)).write_parquet(tmp_path / "new.parquet")
    return tmp_path / "new.parquet"


def adsid(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["ids", *map(str, arguments)])


def test_assign_writes_a_whole_artifact_with_its_manifest(run: Run, new: Path) -> None:
    before = hash_directory(run.folder)
    result = adsid("assign", new, "--ids", run.folder, "--out", "grown/today")
    assert result.exit_code == 0, result.output
    assert "2 new IDs beside 30, of which none changed" in result.output
    assert "first 2 codes" in result.output
    assert str(Path("grown/today").absolute()) in result.output.replace("\n", "")
    out = Path("grown/today")
    assert compare(AdvertiserIds.load(run.ids), AdvertiserIds.load(out)).only_grew
    manifest = Manifest.read(out)
    assert manifest.kind == "semantic_ids"
    assert manifest.inputs["semantic_ids"] == hash_directory(run.ids)
    assert manifest.content_hash == hash_directory(out)
    assert manifest.metrics["assigned"]["new"] == 2
    assert manifest.metrics["advertisers"] == 32
    assert hash_directory(run.folder) == before
    assert sorted(path.name for path in Path("grown").iterdir()) == ["today"]


def test_the_report_reads_what_assign_and_refit_wrote(run: Run, new: Path) -> None:
    adsid("assign", new, "--ids", run.ids, "--out", "grown")
    assert adsid("report", "grown").exit_code == 0
    assert Path("grown.html").exists()
    assert '"entities": 32' in adsid("report", "grown", "--json").output


def test_ids_of_yesterday_are_grown_again_and_written_over(run: Run, new: Path) -> None:
    adsid("assign", new, "--ids", run.ids, "--out", "one")
    some((300, 301)).write_parquet("more.parquet")
    again = adsid("assign", "more.parquet", "--ids", "one", "--out", "two", "--skip-known")
    assert again.exit_code == 0
    assert "1 new IDs beside 32" in again.output
    assert adsid("assign", new, "--ids", run.ids, "--out", "two").exit_code == 0  # earlier IDs of `adsid ids`
    assert len(AdvertiserIds.load(Path("two"))) == 32


def test_refit_says_what_was_kept(run: Run) -> None:
    span = ["data.split.prior_fit=[1,4]", "data.split.prior_select=[5,6]"]
    result = adsid(
        "refit", *span, "semantic_ids.trainer.max_epochs=2", "--ids", run.ids, "--data", run.data, "--out", "new"
    )
    assert result.exit_code == 0, result.output
    assert "30 IDs before and after, 0 new, 0 gone" in result.output
    assert "whole IDs" in result.output
    manifest, artifact = Manifest.read(Path("new")), IdArtifact.load(Path("new"))
    assert manifest.config["data"]["split"]["prior_fit"] == [1, 4]
    assert artifact.cfg.trainer.max_epochs == 2
    assert artifact.cfg.rqvae == config().rqvae
    assert set(manifest.inputs) == {"semantic_ids", "data"}
    refit = manifest.metrics["refit"]
    assert refit["tolerance"] == change.TOLERANCE
    assert refit["kept_share"] == refit["kept_share_by_level"][-1]
    assert f"{refit['kept_share']:.1%}" in result.output
    assert f"{refit['scratch_kept_share']:.1%}" in result.output


def test_the_tolerance_is_an_option(run: Run) -> None:
    options: list[str | Path] = ["--ids", run.ids, "--data", run.data, "--out", "new"]
    assert adsid("refit", *options, "--tolerance", "1e9").exit_code == 0
    assert Manifest.read(Path("new")).metrics["refit"]["kept_share"] == 1.0
    wrong = adsid("refit", *options, "--tolerance", "-1")
    assert wrong.exit_code == USER_MISTAKE
    assert "tolerance=-1.0" in wrong.stderr


def _something_else(run: Run) -> list[str | Path]:
    Path("precious").mkdir()
    Path("precious/thesis.txt").write_text("years of work")
    return ["assign", "new.parquet", "--ids", run.ids, "--out", "precious"]


def _a_run(run: Run) -> list[str | Path]:
    Manifest("semantic_ids", fingerprint([])).write(_made("other"))
    return ["assign", "new.parquet", "--ids", run.ids, "--out", "other"]


def _no_parquet(run: Run) -> list[str | Path]:
    Path("new.csv").write_text("advertiser_id,name,text\n1,a,b\n")
    return ["assign", "new.csv", "--ids", run.ids, "--out", "out"]


def _made(name: str) -> Path:
    Path(name).mkdir()
    return Path(name)


REFUSED: dict[str, tuple[Callable[[Run], list[str | Path]], list[str]]] = {
    "no such file": (
        lambda run: ["assign", "nowhere.parquet", "--ids", run.ids, "--out", "out"],
        ["nowhere.parquet", "a Parquet file with advertiser_id, name and text"],
    ),
    "no Parquet": (_no_parquet, ["new.csv", "write_parquet"]),
    "no IDs there": (
        lambda run: ["assign", "new.parquet", "--ids", run.data, "--out", "out"],
        ["without semantic IDs", "runs/quickstart/semantic_ids"],
    ),
    "onto the old ones": (
        lambda run: ["assign", "new.parquet", "--ids", run.ids, "--out", run.ids],
        ["the folder of the old IDs", "name another folder"],
    ),
    "onto the old ones of a run": (
        lambda run: ["refit", "--ids", run.folder, "--data", run.data, "--out", run.ids],
        ["the folder of the old IDs"],
    ),
    "onto something else": (_something_else, ["holds something else than IDs"]),
    "onto the IDs of another run": (_a_run, ["holds something else than IDs that `adsid ids` wrote"]),
    "no tables": (
        lambda run: ["refit", "--ids", run.ids, "--data", "nowhere", "--out", "out"],
        ["nowhere", "advertisers.parquet"],
    ),
    "another tokenizer": (
        lambda run: ["refit", "--ids", run.ids, "--data", run.data, "--out", "out", "semantic_ids.tokenizer=rqkmeans"],
        ["semantic_ids.tokenizer=rqkmeans for IDs made with rqvae"],
    ),
    "an unknown key": (
        lambda run: ["refit", "--ids", run.ids, "--data", run.data, "--out", "out", "semantic_ids.rqvea.latent=3"],
        ["unknown key semantic_ids.rqvea.latent", "did you mean"],
    ),
}


@pytest.mark.parametrize(("arguments", "told"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_done_is_told_and_writes_nothing(
    arguments: Callable[[Run], list[str | Path]], told: list[str], run: Run, new: Path
) -> None:
    given = arguments(run)
    before = hash_directory(Path()), hash_directory(run.folder)
    result = adsid(*given)
    assert result.exit_code == USER_MISTAKE, result.output
    assert all(part in result.stderr for part in told), result.stderr
    assert (hash_directory(Path()), hash_directory(run.folder)) == before
    assert not Path("out").exists()


def test_a_bad_file_is_told_all_at_once(run: Run) -> None:
    some((100, 100)).drop("text").write_parquet("bad.parquet")
    result = adsid("assign", "bad.parquet", "--ids", run.ids, "--out", "out")
    assert result.exit_code == USER_MISTAKE
    assert "without text" in result.stderr
    assert "1 ids in more than one row, e.g. 100" in result.stderr
    assert not Path("out").exists()


def test_a_failed_write_leaves_nothing_behind(run: Run, new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(change, "quality", fail)  # after most files were written
    assert adsid("assign", new, "--ids", run.ids, "--out", "out").exit_code == OUR_MISTAKE
    assert [path.name for path in Path().iterdir()] == ["new.parquet"]


def test_the_grown_table_is_in_the_order_of_the_grown_log(run: Run, new: Path, tmp_path: Path) -> None:
    tables = tiny_tables()
    both = pl.concat([tables.advertisers, pl.read_parquet(new).select(tables.advertisers.columns)])
    (tmp_path / "tables").mkdir()
    write_tables(replace(tables, advertisers=both), tmp_path / "tables")
    adsid("assign", new, "--ids", run.ids, "--out", "grown")
    log = load_log(tmp_path / "tables", tiny_config(), evaluate="validation")
    assert AdvertiserIds.load(Path("grown")).advertiser_ids.tolist() == log.advertiser_ids.tolist()
