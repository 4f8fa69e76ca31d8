from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline import doctor


def test_it_finds_what_the_tests_need_and_predicts_a_time(tmp_path: Path) -> None:
    found = doctor.examine(tmp_path)
    assert set(found.packaged.values()) == {"found"}
    assert {"python", "torch", "lightning"} <= set(found.versions)
    assert found.matmul_gflops["float32"] > 1
    text = doctor.to_text(found)
    assert f"about {found.quickstart_seconds / 60:.0f} minutes" in text
    assert json.loads(doctor.to_json(found))["cpu"]["cores"] >= 1


def test_a_faster_machine_is_done_earlier_but_not_in_no_time() -> None:
    slow, fast, faster = (doctor.expected_seconds(rate) for rate in (40, 400, 4000))
    assert slow > fast > faster > doctor.INSTALL_SECONDS


def test_a_missing_package_comes_with_the_command_that_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.PACKAGED, "A model", ("no_such_package_anywhere", "pip install a-model"))
    found = doctor.examine(tmp_path)
    assert any("A model is not installed: pip install a-model" in problem for problem in found.problems)
    assert "to mend" in doctor.to_text(found)
