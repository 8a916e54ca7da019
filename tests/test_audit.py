"""The audit's chain: whatever is altered, removed or moved shows, by whoever has no key; prompts can be forgotten."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from saferedir.engines.errors import AuditError
from saferedir.runtime.serve.audit import Audit, Entry

RECORDS = 40


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "audit.db"


@pytest.fixture
def audit(place: Path) -> Iterator[Audit]:
    audit = Audit(f"sqlite:///{place}", key=b"key", keep_prompts=True)
    audit.append(
        [Entry(f"img_{number}", {"seed": number, "outcome": "drawn"}, f"prompt {number}") for number in range(RECORDS)]
    )
    yield audit
    audit.close()


def change(place: Path, *statements: str) -> None:
    with sqlite3.connect(place) as connection:
        for statement in statements:
            connection.execute(statement)


def test_a_chain_that_nobody_touched_is_whole(audit: Audit) -> None:
    assert list(audit.verify()) == []


@pytest.mark.parametrize("number", [1, 2, RECORDS // 2, RECORDS])
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit_records SET body = replace(body, 'drawn', 'blocked') WHERE number = {number}",
        "UPDATE audit_records SET id = 'img_other' WHERE number = {number}",
        "DELETE FROM audit_records WHERE number = {number}",
        "DELETE FROM audit_records WHERE number >= {number}",
    ],
    ids=["altered", "renamed", "removed", "cut off"],
)
def test_what_was_done_to_a_record_is_found(audit: Audit, place: Path, statement: str, number: int) -> None:
    change(place, statement.format(number=number))
    assert [problem.number for problem in audit.verify()]


@pytest.mark.parametrize("number", [1, 7, RECORDS - 1])
def test_two_records_that_change_places_are_found(audit: Audit, place: Path, number: int) -> None:
    change(
        place,
        f"UPDATE audit_records SET number = -1 WHERE number = {number}",
        f"UPDATE audit_records SET number = {number} WHERE number = {number + 1}",
        f"UPDATE audit_records SET number = {number + 1} WHERE number = -1",
    )
    assert list(audit.verify())


def test_a_chain_that_was_written_anew_without_the_key_is_found(audit: Audit, place: Path) -> None:
    with sqlite3.connect(place) as connection:
        (body,) = connection.execute("SELECT body FROM audit_records WHERE number = 40").fetchone()
        forged = hashlib.sha256(body.encode()).hexdigest()
        connection.execute("UPDATE audit_records SET hash = ? WHERE number = 40", (forged,))
        connection.execute("UPDATE audit_head SET hash = ?", (forged,))
    assert list(audit.verify())


def test_many_writers_make_one_chain(audit: Audit, place: Path) -> None:
    others = [Audit(f"sqlite:///{place}", key=b"key") for _ in range(3)]

    def write(number: int) -> None:
        others[number % 3].append([Entry(f"more_{number}", {"seed": number}, None)])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, range(30)))
    assert list(audit.verify()) == []
    assert audit.find("more_29")[0]["seed"] == 29


def test_a_prompt_is_committed_to_and_can_be_forgotten(audit: Audit, place: Path) -> None:
    body, prompt = audit.find("img_3")
    assert prompt == "prompt 3"
    assert "prompt 3" not in str(body)
    with sqlite3.connect(place) as connection:
        (salt,) = connection.execute("SELECT salt FROM audit_texts WHERE id = 'img_3'").fetchone()
    assert body["prompt_commitment"] == hashlib.sha256((salt + "prompt 3").encode()).hexdigest()
    assert audit.forget("img_3")
    assert not audit.forget("img_3")
    assert audit.find("img_3")[1] is None
    assert list(audit.verify()) == []


def test_by_default_no_text_is_kept(place: Path) -> None:
    audit = Audit(f"sqlite:///{place}")
    audit.append([Entry("one", {}, "a prompt that nobody else is to read")])
    assert audit.find("one")[1] is None
    assert b"nobody else" not in place.read_bytes()


def test_of_records_that_belong_together_all_are_written_or_none(audit: Audit) -> None:
    with pytest.raises(AuditError, match="could not be written"):
        audit.append([Entry("new", {}, None), Entry("img_3", {}, None)])
    with pytest.raises(AuditError, match="has no record 'new'"):
        audit.find("new")
    assert list(audit.verify()) == []


def test_a_database_that_cannot_be_opened_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="cannot be opened"):
        Audit(f"sqlite:///{tmp_path / 'missing' / 'audit.db'}")
    with pytest.raises(AuditError, match="cannot be opened"):
        Audit("nonsense")
