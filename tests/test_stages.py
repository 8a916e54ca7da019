"""Which of several results of the same attacks a table and the list of limits show."""

from __future__ import annotations

from typing import Any

from benchmarks.limits import limits
from benchmarks.stages import STAGES, LatestRows


def result(module: str | None, *families: str, asr: float = 0.5, pictures: int = 960) -> dict[str, Any]:
    stated = {} if module is None else {"module": module}
    row = {"is_attack": True, "asr": {"share": asr}, "pictures": pictures}
    return {"concept": "ink", **stated, "families": {family: dict(row) for family in families}}


def test_a_row_is_superseded_by_a_later_stage_of_the_same_family_alone() -> None:
    families = ("typos", "spacing", "typos")
    first, second, present = (result(stage, family) for stage, family in zip((*STAGES[:2], None), families, strict=True))
    latest = LatestRows([first, second, present])
    assert latest.superseded(first, "typos")
    assert not latest.superseded(second, "spacing")
    assert not latest.superseded(present, "typos")


def test_of_one_stage_the_row_of_more_pictures_is_shown() -> None:
    fewer, more = result(None, "buried", pictures=960), result(None, "buried", pictures=1280)
    latest = LatestRows([more, fewer])
    assert latest.superseded(fewer, "buried")
    assert not latest.superseded(more, "buried")


def test_rows_of_another_module_stand_beside_those_of_the_shipped_one() -> None:
    other, present = result("before hardening", "typos"), result(None, "typos")
    assert not LatestRows([other, present]).superseded(other, "typos")


def test_limits_name_the_latest_figure_of_each_family() -> None:
    said = limits(
        {
            "attacks_ink": result(STAGES[0], "typos", "spacing"),
            "attacks_ink_anew": result(None, "typos", asr=0.25),
            "unhardened_attacks_ink": result("before hardening", "homoglyphs"),
        }
    )
    assert said[0].endswith(f"get through: ink, {STAGES[0]}, spacing: 50.0 %; ink, typos: 25.0 %.")


def test_limits_take_the_first_judge_s_figure_where_too_few_are_an_attack_to_both() -> None:
    buried = result(None, "buried", asr=0.25)
    buried["families"]["buried"]["agreed"] = {"is_attack": False}
    assert limits({"attacks_ink": buried})[0].endswith("get through: ink, buried: 25.0 %.")
