"""The audit: one record a picture, in a chain of hashes, durable before the picture leaves.

A record says what was asked for, under which policy, what every step saw and decided, and how it ended. Its hash covers that of
the record before, and the head of the chain stands in a table of its own, so that whatever is altered, removed or moved shows.
With a key (HMAC) nobody without it can write the chain anew. Prompts are not in it: a salted commitment is. The salt, and the
text where the operator keeps it, stand beside, to be deleted when they have to be; the commitment then tells nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    delete,
    event,
    insert,
    inspect,
    select,
    update,
)
from sqlalchemy.exc import SQLAlchemyError

from saferedir.engines.errors import AuditError, RequestError

#: What the first record follows.
ORIGIN = "0" * 64
SALT_BYTES = 16
#: Seconds that a writer waits for another, and for the database to answer.
BUSY = 10
#: The same in the words of each database's driver.
_PATIENCE: dict[str, dict[str, Any]] = {
    "sqlite": {"timeout": BUSY},
    "postgresql": {"connect_timeout": BUSY, "options": f"-c lock_timeout={BUSY}s -c statement_timeout={BUSY}s"},
}

_METADATA = MetaData()
RECORDS = Table(
    "audit_records", _METADATA,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("id", String(64), nullable=False, unique=True),
    Column("body", Text, nullable=False),
    Column("hash", String(64), nullable=False),
)  # fmt: skip
TEXTS = Table(
    "audit_texts", _METADATA,
    Column("id", String(64), primary_key=True),
    Column("salt", String(2 * SALT_BYTES), nullable=False),
    Column("texts", Text, nullable=True),  # as JSON: no database stores every character
)  # fmt: skip
#: One row: how many records there are, the hash of the last, and a seal over both, which needs the key.
HEAD = Table(
    "audit_head", _METADATA,
    Column("one", Integer, primary_key=True, autoincrement=False),
    Column("number", Integer, nullable=False),
    Column("hash", String(64), nullable=False),
    Column("seal", String(64), nullable=False),
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """What is written of one picture."""

    id: str
    #: Everything but the prompt, as JSON takes it.
    body: dict[str, Any]
    #: What was written by people: the prompt and the negative prompt, by name. None of it is in the body.
    texts: dict[str, str | None]
    #: Whether a record of this id may be there already, of the same pixels, and then stays.
    again: bool = False


@dataclass(frozen=True)
class Problem:
    """What is wrong with the chain."""

    #: Of the record, from 1.
    number: int
    what: str


class Audit:
    """Records in a database: `sqlite:///FILE`, or PostgreSQL by its URL. Safe for several threads, processes and machines."""

    def __init__(self, url: str, *, key: bytes = b"", keep_prompts: bool = False, make: bool = True) -> None:
        """`key` keeps others from writing the chain anew; `keep_prompts` keeps the text of prompts beside their salt.

        An audit is begun where there is none, if `make` says so; one that was emptied is not taken for a new one.

        Raises:
            AuditError: the database cannot be opened, is not one of an audit, or was emptied.
        """
        self._key, self._keep_prompts = key, keep_prompts
        try:
            self._engine = _engine(url)
            #: Does not keep writers waiting.
            self._reader = self._engine.execution_options(reads=True)
            if self._engine.dialect.name == "postgresql":  # head and records as of one moment
                self._reader = self._reader.execution_options(isolation_level="REPEATABLE READ")
            with self._engine.begin() as connection:
                if not inspect(connection).has_table(HEAD.name):
                    if not make:
                        raise AuditError("the database holds no audit; is it the right one?")
                    _METADATA.create_all(connection)
                    connection.execute(insert(HEAD).values(one=1, number=0, hash=ORIGIN, seal=self._seal(0, ORIGIN)))
                elif make and connection.execute(select(HEAD)).first() is None:
                    raise AuditError("the audit was emptied: the head of its chain is missing. Begin another in another place")
        except (SQLAlchemyError, ImportError, ValueError) as error:
            raise AuditError(f"the audit's database cannot be opened: {_first_line(error)}") from error
        except AuditError:
            self._engine.dispose()
            raise

    def append(self, entries: Sequence[Entry]) -> None:
        """Write records, all or none; they are durable when this returns.

        Raises:
            AuditError: they could not be written. No picture of theirs may leave.
        """
        try:
            with self._engine.begin() as connection:
                number, last = self._locked_head(connection)
                for entry in entries:
                    if entry.again and (known := self._body(connection, entry.id)) is not None:
                        if json.loads(known)["pixels"] != entry.body["pixels"]:
                            raise AuditError(f"{entry.id} has a record already, of another picture")
                        continue
                    number += 1
                    last = self._write(connection, number, last, entry)
                connection.execute(update(HEAD).values(number=number, hash=last, seal=self._seal(number, last)))
        except SQLAlchemyError as error:
            raise AuditError(f"the audit could not be written: {_first_line(error)}") from error

    def find(self, id: str) -> tuple[dict[str, Any], dict[str, str | None] | None]:
        """A record's body, and its prompts where they were kept.

        Raises:
            RequestError: there is none of that name.
            AuditError: the database cannot be read.
        """
        try:
            with self._reader.connect() as connection:
                body = connection.execute(select(RECORDS.c.body).where(RECORDS.c.id == id)).scalar()
                texts = connection.execute(select(TEXTS.c.texts).where(TEXTS.c.id == id)).scalar()
        except SQLAlchemyError as error:
            raise AuditError(f"the audit cannot be read: {_first_line(error)}") from error
        if body is None:
            raise RequestError(f"the audit has no record {id!r}")
        return json.loads(body), None if texts is None else json.loads(texts)

    def are_of(self, id: str, texts: dict[str, str | None]) -> bool | None:
        """Whether these are the prompts of a record; None where its salt was deleted."""
        body, _ = self.find(id)
        with self._reader.connect() as connection:
            salt = connection.execute(select(TEXTS.c.salt).where(TEXTS.c.id == id)).scalar()
        return None if salt is None else _commitment(salt, texts) == body["prompts"]

    def bodies(self) -> Iterator[dict[str, Any]]:
        """The bodies of all records, each with its `id`, in their order."""
        with self._reader.connect() as connection:
            query = select(RECORDS.c.id, RECORDS.c.body).order_by(RECORDS.c.number)
            for id, body in connection.execution_options(yield_per=1000).execute(query):
                yield {"id": id, **json.loads(body)}

    def latest(
        self, wanted: Callable[[dict[str, Any]], bool], *, before: int | None = None, limit: int
    ) -> list[dict[str, Any]]:
        """The latest records that are `wanted`, with number, id and, where they were kept, texts; the newest first.

        Raises:
            AuditError: the database cannot be read.
        """
        found: list[dict[str, Any]] = []
        query = select(RECORDS.c.number, RECORDS.c.id, RECORDS.c.body, TEXTS.c.texts).outerjoin(
            TEXTS, RECORDS.c.id == TEXTS.c.id
        )
        if before is not None:
            query = query.where(RECORDS.c.number < before)
        try:
            with self._reader.connect() as connection:
                rows = connection.execution_options(yield_per=500).execute(query.order_by(RECORDS.c.number.desc()))
                for number, id, body, texts in rows:
                    record = json.loads(body)
                    if wanted(record):
                        found.append(
                            {**record, "number": number, "id": id, "texts": None if texts is None else json.loads(texts)}
                        )
                    if len(found) == limit:
                        break
        except SQLAlchemyError as error:
            raise AuditError(f"the audit cannot be read: {_first_line(error)}") from error
        return found

    def forget(self, id: str) -> bool:
        """Delete a prompt's salt, and its text where it was kept. Whether there was one."""
        with self._engine.begin() as connection:
            return connection.execute(delete(TEXTS).where(TEXTS.c.id == id)).rowcount > 0

    def head(self) -> str | None:
        """`NUMBER:HASH` of the last record, to be kept elsewhere: no chain shows by itself that an older copy was put back.

        Raises:
            AuditError: the database cannot be read.
        """
        try:
            with self._reader.connect() as connection:
                found = connection.execute(select(HEAD.c.number, HEAD.c.hash)).first()
        except SQLAlchemyError as error:
            raise AuditError(f"the audit cannot be read: {_first_line(error)}") from error
        return None if found is None else f"{found.number}:{found.hash}"

    def verify(self, since: str | None = None) -> Iterator[Problem]:
        """What is wrong with the chain, record by record; nothing where it is whole. `since`: a head that it had before.

        Raises:
            RequestError: `since` is no head.
            AuditError: the database cannot be read.
        """
        kept = None if since is None else _parse_head(since)
        try:
            with self._reader.connect() as connection:
                yield from self._problems(connection)
                if kept is not None and kept != (0, ORIGIN):
                    own = connection.execute(select(RECORDS.c.hash).where(RECORDS.c.number == kept[0])).scalar()
                    if own != kept[1]:
                        yield Problem(kept[0], "it is not the record that the given head names: an older copy was put back")
        except SQLAlchemyError as error:
            raise AuditError(f"the audit cannot be read: {_first_line(error)}") from error

    def _problems(self, connection: Connection) -> Iterator[Problem]:
        stated = connection.execute(select(HEAD)).first()
        expected, last = 1, ORIGIN
        query = select(RECORDS, TEXTS.c.salt, TEXTS.c.texts).outerjoin(TEXTS, RECORDS.c.id == TEXTS.c.id)
        rows = connection.execution_options(yield_per=1000).execute(query.order_by(RECORDS.c.number))
        for number, id, body, own, salt, texts in rows:
            if number != expected:
                yield Problem(expected, f"records {expected} to {number - 1} are missing")
            if not hmac.compare_digest(self._hash(number, last, id, body), own):
                yield Problem(number, "it is not what was written, or does not follow the record before")
            elif texts is not None and _commitment(salt, json.loads(texts)) != json.loads(body)["prompts"]:
                yield Problem(number, "the prompts that were kept are not those it was written of")
            expected, last = number + 1, own
        if stated is None:
            yield Problem(expected, "the head of the chain is missing")
        elif (stated.number, stated.hash) != (expected - 1, last):
            yield Problem(stated.number, f"the head of the chain names record {stated.number}, the last is {expected - 1}")
        elif not hmac.compare_digest(self._seal(stated.number, stated.hash), stated.seal):
            yield Problem(stated.number, "the head of the chain was written by someone else, or with another key")

    def close(self) -> None:
        self._engine.dispose()

    def _body(self, connection: Connection, id: str) -> str | None:
        return connection.execute(select(RECORDS.c.body).where(RECORDS.c.id == id)).scalar()

    def _locked_head(self, connection: Connection) -> tuple[int, str]:
        found = connection.execute(select(HEAD.c.number, HEAD.c.hash).with_for_update()).one()
        return found.number, found.hash

    def _write(self, connection: Connection, number: int, last: str, entry: Entry) -> str:
        salt = secrets.token_hex(SALT_BYTES)
        body = json.dumps({**entry.body, "prompts": _commitment(salt, entry.texts)}, sort_keys=True, allow_nan=False)
        own = self._hash(number, last, entry.id, body)
        connection.execute(insert(RECORDS).values(number=number, id=entry.id, body=body, hash=own))
        texts = json.dumps(entry.texts) if self._keep_prompts else None
        connection.execute(insert(TEXTS).values(id=entry.id, salt=salt, texts=texts))
        return own

    def _seal(self, number: int, last: str) -> str:
        return hmac.digest(self._key, f"{number} {last}".encode(), "sha256").hex()

    def _hash(self, number: int, last: str, id: str, body: str) -> str:
        said = json.dumps([number, last, id, body]).encode()
        return hmac.digest(self._key, said, "sha256").hex()


def _parse_head(text: str) -> tuple[int, str]:
    """
    Raises:
        RequestError: it is no `NUMBER:HASH`.
    """
    number, _, own = text.partition(":")
    if not (number.isdecimal() and number.isascii() and len(number) < 19 and len(own) == len(ORIGIN)):
        raise RequestError(f"{text!r} is no head of an audit; expected NUMBER:HASH, as `saferedir audit verify` prints it")
    return int(number), own


def _commitment(salt: str, texts: dict[str, str | None]) -> str:
    return hashlib.sha256((salt + json.dumps(texts, sort_keys=True)).encode()).hexdigest()


def _engine(url: str) -> Engine:
    engine = create_engine(url, pool_pre_ping=True, connect_args=_PATIENCE.get(url.split("+")[0].split(":")[0], {}))
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _: Any) -> None:
    """Durable at every commit, and one writer at a time from the beginning of its transaction."""
    connection.isolation_level = None  # transactions are begun by the listener
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    reads = connection.get_execution_options().get("reads", False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
