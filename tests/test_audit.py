"""The audit's chain, in both databases: whatever is altered, removed or moved shows; prompts can be forgotten."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from postgresql import postgresql
from sqlalchemy import create_engine, text

from saferedir.engines.errors import AuditError, RequestError
from saferedir.runtime.serve.audit import Audit, Entry

RECORDS = 500
DATABASES = ("sqlite", "postgresql")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgresql() as url:
        yield url


@pytest.fixture(params=DATABASES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/audit.db"
    found: str = request.getfixturevalue("server")
    execute(found, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public")
    return found


@pytest.fixture
def audit(url: str) -> Iterator[Audit]:
    audit = Audit(url, key=b"key", keep_prompts=True)
    audit.append(
        [
            Entry(f"img_{number}", {"seed": number, "outcome": "drawn"}, {"prompt": f"prompt {number}"})
            for number in range(RECORDS)
        ]
    )
    yield audit
    audit.close()


def execute(url: str, *statements: str, **values: Any) -> Any:
    """What the last statement gives, one value."""
    engine = create_engine(url)
    with engine.begin() as connection:
        for statement in statements:
            done = connection.execute(text(statement), values)
        found = done.scalar() if done.returns_rows else None
    engine.dispose()
    return found


def test_a_chain_that_nobody_touched_is_whole(audit: Audit) -> None:
    assert list(audit.verify()) == []


ATTACKS = {
    "altered": ["UPDATE audit_records SET body = replace(body, 'drawn', 'blocked') WHERE number = {number}"],
    "renamed": ["UPDATE audit_records SET id = 'img_other' WHERE number = {number}"],
    "removed": ["DELETE FROM audit_records WHERE number = {number}"],
    "cut off": ["DELETE FROM audit_records WHERE number >= {number}"],
    "swapped": [
        "UPDATE audit_records SET number = -1 WHERE number = {number}",
        "UPDATE audit_records SET number = {number} WHERE number = {other}",
        "UPDATE audit_records SET number = {other} WHERE number = -1",
    ],
    "given another's hash": [
        "UPDATE audit_records SET hash = (SELECT hash FROM audit_records WHERE number = {other}) WHERE number = {number}"
    ],
    "written twice": [
        "INSERT INTO audit_records SELECT {more}, 'img_more', body, hash FROM audit_records WHERE number = {number}"
    ],
    "head moved back": [
        "UPDATE audit_head SET number = {number}, hash = (SELECT hash FROM audit_records WHERE number = {number})"
    ],
}  # fmt: skip
ATTACKS["cut off, and the head moved back"] = ATTACKS["cut off"] + [
    "UPDATE audit_head SET number = {number} - 1, hash = (SELECT hash FROM audit_records WHERE number = {number} - 1)"
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_was_done_to_a_record_is_found(audit: Audit, url: str, attack: str) -> None:
    number = random.Random(attack).randint(1, RECORDS - 1)
    places = {"number": number, "other": number % (RECORDS - 1) + 1, "more": RECORDS + 1}
    execute(url, *(statement.format(**places) for statement in ATTACKS[attack]))
    assert list(audit.verify())


def test_every_record_that_is_altered_removed_or_swapped_is_found(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/audit.db"
    audit = Audit(url, key=b"key")
    audit.append([Entry(f"img_{number}", {"seed": number}, {}) for number in range(RECORDS)])
    engine = create_engine(url)
    with engine.connect() as connection:
        for number in range(1, RECORDS + 1):
            for statement in (
                "UPDATE audit_records SET body = body || ' ' WHERE number = :number",
                "DELETE FROM audit_records WHERE number = :number",
                "UPDATE audit_records SET number = 501 - number WHERE number = :number AND number <> 501 - number",
            ):
                connection.execute(text("SAVEPOINT before"))
                try:
                    changed = connection.execute(text(statement), {"number": number}).rowcount
                except Exception:  # the number is taken: the database itself refuses
                    connection.execute(text("ROLLBACK TO before"))
                    continue
                assert changed == 1 and list(audit._problems(connection)), (statement, number)
                connection.execute(text("ROLLBACK TO before"))
        assert list(audit._problems(connection)) == []
    engine.dispose()
    audit.close()


def test_a_chain_that_was_written_anew_without_the_key_is_found(audit: Audit, url: str) -> None:
    body = execute(url, f"SELECT body FROM audit_records WHERE number = {RECORDS}")
    forged = hashlib.sha256(body.encode()).hexdigest()
    execute(url, f"UPDATE audit_records SET hash = :forged WHERE number = {RECORDS}", forged=forged)
    execute(url, "UPDATE audit_head SET hash = :forged", forged=forged)
    assert list(audit.verify())


def test_many_writers_make_one_chain(audit: Audit, url: str) -> None:
    others = [Audit(url, key=b"key") for _ in range(3)]

    def write(number: int) -> None:
        others[number % 3].append([Entry(f"more_{number}", {"seed": number}, {})])

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, range(30)))
    assert list(audit.verify()) == []
    assert audit.find("more_29")[0]["seed"] == 29
    for other in others:
        other.close()


def test_a_prompt_is_committed_to_and_can_be_forgotten(audit: Audit, url: str) -> None:
    body, prompt = audit.find("img_3")
    assert prompt == {"prompt": "prompt 3"}
    assert "prompt 3" not in str(body)
    assert audit.are_of("img_3", {"prompt": "prompt 3"}) is True
    assert audit.are_of("img_3", {"prompt": "prompt 4"}) is False
    assert audit.forget("img_3")
    assert not audit.forget("img_3")
    assert audit.find("img_3") == (body, None)
    assert audit.are_of("img_3", {"prompt": "prompt 3"}) is None
    assert list(audit.verify()) == []


def test_every_character_of_a_prompt_is_kept(url: str) -> None:
    audit, prompt = Audit(url, keep_prompts=True), {"prompt": "a \0 cat \U0001f408 \u202e and 'quotes'"}
    audit.append([Entry("one", {"user": "\0"}, {**prompt})])
    assert audit.find("one")[1] == prompt
    assert list(audit.verify()) == []
    audit.close()


def test_by_default_no_text_is_kept(tmp_path: Path) -> None:
    place = tmp_path / "audit.db"
    audit = Audit(f"sqlite:///{place}")
    audit.append([Entry("one", {}, {"prompt": "a prompt that nobody else is to read"})])
    assert audit.find("one")[1] is None
    assert not any(b"nobody else" in path.read_bytes() for path in tmp_path.iterdir())


def test_of_records_that_belong_together_all_are_written_or_none(audit: Audit) -> None:
    with pytest.raises(AuditError, match="could not be written"):
        audit.append([Entry("new", {}, {}), Entry("img_3", {}, {})])
    with pytest.raises(RequestError, match="has no record 'new'"):
        audit.find("new")
    assert list(audit.verify()) == []


def test_a_request_that_comes_again_has_one_record(audit: Audit) -> None:
    for seed in (1, 2):
        audit.append([Entry("same", {"seed": seed, "pixels": "a"}, {"prompt": "a cat"}, again=True)])
    assert audit.find("same")[0]["seed"] == 1
    with pytest.raises(AuditError, match="a record already, of another picture"):
        audit.append([Entry("same", {"pixels": "b"}, {"prompt": "a cat"}, again=True)])
    assert list(audit.verify()) == []


def test_prompts_that_were_changed_beside_the_chain_are_found(audit: Audit, url: str) -> None:
    execute(url, "UPDATE audit_texts SET texts = :other WHERE id = 'img_3'", other='{"prompt": "another"}')
    assert [(found.number, found.what) for found in audit.verify()] == [
        (4, "the prompts that were kept are not those it was written of")
    ]


def test_an_audit_that_was_emptied_is_not_taken_for_a_new_one(audit: Audit, url: str) -> None:
    execute(url, "DELETE FROM audit_records", "DELETE FROM audit_head")
    opened = Audit(url, key=b"key", make=False)
    assert [found.what for found in opened.verify()] == ["the head of the chain is missing"]
    opened.close()
    with pytest.raises(AuditError, match="was emptied"):
        Audit(url, key=b"key")


def test_an_older_copy_that_was_put_back_lacks_the_head_that_was_kept(audit: Audit, url: str) -> None:
    older, seal = audit.head(), execute(url, "SELECT seal FROM audit_head")
    assert older is not None
    audit.append([Entry("img_last", {"seed": 1, "outcome": "drawn"}, {"prompt": "a cat"})])
    kept = audit.head()
    assert kept is not None
    assert list(audit.verify(older)) == list(audit.verify(kept)) == []
    number, _, last = older.partition(":")
    execute(url, "DELETE FROM audit_records WHERE id = 'img_last'")
    execute(url, f"UPDATE audit_head SET number = {number}, hash = :last, seal = :seal", last=last, seal=seal)
    assert list(audit.verify()) == []
    assert [found.number for found in audit.verify(kept)] == [RECORDS + 1]
    with pytest.raises(RequestError, match="NUMBER:HASH"):
        list(audit.verify("501"))


def test_where_there_is_no_audit_none_is_begun_to_look_at_it(url: str) -> None:
    for _ in range(2):
        with pytest.raises(AuditError, match="holds no audit"):
            Audit(url, make=False)


def test_a_database_that_cannot_be_opened_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="cannot be opened"):
        Audit(f"sqlite:///{tmp_path / 'missing' / 'audit.db'}")
    with pytest.raises(AuditError, match="cannot be opened"):
        Audit("nonsense")
