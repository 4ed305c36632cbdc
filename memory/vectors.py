"""The vector and full-text index over memories: the only file that imports lancedb.

The invariant: a row here is a row of SQL's `memories` with its vectors, and a search sees nothing outside the asked
scope. It holds no fact of its own, so it can be dropped and rebuilt; deleting a row and erasing its bytes are two
steps, because LanceDB keeps old versions on disk. Who may see a row is one indexed column, and what ranking needs of
it is one other: LanceDB reads scattered rows column by column, each at nearly the price of a row.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from threading import RLock
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import FTS, Bitmap, BTree
from numpy.typing import NDArray

from ..errors import StoreError
from .passages import IndexRow

TABLE = "memories"
LAYOUT = "3"  # of the columns; raised whenever an older index cannot be read as this one
SHARED = "shared"  # the scope of rows that everybody sees; a private one is a JSON list
IDS_A_FILTER = 500
ADDS_BEFORE_GATHER = 40  # every add leaves a fragment, and ten of them slow a search down by a millisecond
MOST_FRAGMENTS = 2 * ADDS_BEFORE_GATHER  # that a process finds there and leaves
FEW = 100  # rows; an add of more is a fragment worth keeping
ROWS_BEFORE_OPTIMIZE = 5000  # rows that full text search has to scan until they are in its index
SHARE_BEFORE_OPTIMIZE = 0.02  # of all rows, since optimizing writes every row of a table under a million anew
KEPT_VERSIONS = timedelta(minutes=10)  # what another process may still be reading
CONFLICTS = 20  # with other processes that make the same index, before giving up
HALF = np.dtype("<f2")
FAULTS = (OSError, RuntimeError, ValueError, pa.ArrowException)  # what LanceDB raises
# of each request to a store of objects, which else is tried for minutes while every writer waits
PATIENCE = {"timeout": "30s", "connect_timeout": "5s", "client_max_retries": "3", "client_retry_timeout": "30"}

INDEXES = {
    "id": BTree(),
    "scope": BTree(),
    "session_id": BTree(),
    "created_utc": BTree(),
    "kind": Bitmap(),
    # The words come as stems that ranking counts too: nothing is left for the index to change.
    "words": FTS(
        base_tokenizer="whitespace",
        max_token_length=None,
        stem=False,
        remove_stop_words=False,
        lower_case=False,
        ascii_folding=False,
    ),
}


class VectorIndex:
    """The table at `url`, which LanceDB is given as it is (a folder, `s3://…`), opened when first needed."""

    def __init__(self, url: str, dimension: int, embedder_name: str, store_id: str = "") -> None:
        self.url, self.dimension, self.embedder_name, self.store_id = url, dimension, embedder_name, store_id
        self._lock = RLock()
        self._connection: Any = None
        self._table: Any = None
        self._new = self._due = 0  # rows since the last optimize, and at how many the next is due
        self._few: list[list[str]] = []  # the ids of small adds since the last gathering

    # -- writing ---

    def add(self, rows: Sequence[IndexRow]) -> None:
        if not rows:
            return
        with self._lock, _translated("write"):
            first = not self._new
            self._open().add(self._arrow(rows))
            self._new += len(rows)
            if len(rows) <= FEW:
                self._few.append([row.id for row in rows])
            if self._new >= max(self._due, ROWS_BEFORE_OPTIMIZE) or (first and self._is_scattered()):
                self.optimize()
            elif len(self._few) >= ADDS_BEFORE_GATHER:
                self._gather()

    def delete(self, ids: Iterable[str]) -> None:
        """Hide rows from every later search; `erase` takes their bytes off the disk."""
        with self._lock, _translated("delete from"):
            for some in _filters(list(ids)):
                self._open().delete(some)

    def optimize(self) -> None:
        """Join all fragments, bring the indexes up to the newest rows, and remove versions of some time ago."""
        with self._lock, _translated("optimize"):
            self._open().optimize(cleanup_older_than=KEPT_VERSIONS)
            self._settled()

    def _is_scattered(self) -> bool:
        """Whether many processes that each wrote a little have left as many fragments."""
        return int(self._open().stats()["fragment_stats"]["num_fragments"]) >= MOST_FRAGMENTS

    def _gather(self) -> None:
        """Join the fragments of small adds by writing their rows anew, as they are now, and no others."""
        table = self._open()
        for some in _filters([i for ids in self._few for i in ids]):
            rows = table.search().where(some).to_arrow()
            held = Counter(rows["id"].to_pylist())
            once = [held[i] == 1 for i in rows["id"].to_pylist()]  # a doubled row is left to `reconcile`
            table.merge_insert("id").when_matched_update_all().execute(rows.filter(once))
        self._few = []

    def _settled(self) -> None:
        self._new, self._few = 0, []
        self._due = int(SHARE_BEFORE_OPTIMIZE * self._open().count_rows())

    def erase(self) -> None:
        """Write the living rows anew and remove every older file, so that deleted rows leave no bytes behind."""
        with self._lock, _translated("erase from"):
            table = self._open()
            before, living = table.version, table.search().to_batches()
            self._table = self._connect().create_table(TABLE, living, schema=self._schema(), mode="overwrite")
            self._make_indexes()
            time.sleep(0.01)  # the clean-up spares what is younger than the age asked for, at least a millisecond
            self._table.optimize(cleanup_older_than=timedelta(milliseconds=1), delete_unverified=True)
            if any(left["version"] <= before for left in self._table.list_versions()):
                self._make_again()  # a clock that is ahead of this one wrote them, or this one was set back
            self._settled()

    def _make_again(self) -> None:
        """The table anew with the same rows. Where it is broken off the next opening finds them in SQL."""
        living = self._open().to_arrow()
        self._drop()
        self._table = self._connect().create_table(TABLE, living, schema=self._schema())
        self._make_indexes()

    def drop(self) -> None:
        with self._lock, _translated("drop"):
            self._drop()

    def _drop(self) -> None:
        self._table = None
        self._connect().drop_table(TABLE, ignore_missing=True)
        self._new, self._due, self._few = 0, 0, []

    # -- reading ---

    def count_where(self, condition: str) -> int:
        with self._lock, _translated("read"):
            return int(self._open().count_rows(condition))

    def rows(self, condition: str, limit: int) -> list[IndexRow]:
        """Some `limit` of the rows that meet `condition`, in no order."""
        with self._lock, _translated("read"):
            return self._read(self._open().search().where(condition).select(["payload"]).limit(limit))

    def near(self, vector: NDArray[np.float32], condition: str, limit: int) -> list[IndexRow]:
        """The `limit` rows with the greatest cosine of the whole."""
        with self._lock, _translated("search"):
            found = self._open().search(vector, vector_column_name="vector").distance_type("cosine").where(condition)
            return self._read(found.select(["payload", "_distance"]).limit(limit))

    def matching(self, terms: Sequence[str], condition: str, limit: int) -> list[IndexRow]:
        """The `limit` best by BM25 over `terms`."""
        if not terms:
            return []
        with self._lock, _translated("search"):
            found = self._open().search(" ".join(terms), query_type="fts", fts_columns="words").where(condition)
            return self._read(found.select(["payload", "_score"]).limit(limit))

    def vectors(self, ids: Iterable[str]) -> dict[str, NDArray[np.float32]]:
        """The vectors of those `ids` that are here."""
        found: dict[str, NDArray[np.float32]] = {}
        with self._lock, _translated("read"):
            for some in _filters(list(ids)):
                table = self._open().search().where(some).select(["id", "vector"]).to_arrow()
                flat = table["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
                found.update(zip(table["id"].to_pylist(), flat.reshape(-1, self.dimension), strict=True))
        return found

    def count(self) -> int:
        with self._lock, _translated("read"):
            return int(self._open().count_rows())

    def ids(self) -> list[str]:
        """Every id, once a row: an id that was written twice is here twice."""
        with self._lock, _translated("read"):
            return [str(i) for i in self._open().search().select(["id"]).to_arrow()["id"].to_pylist()]

    def _read(self, query: Any) -> list[IndexRow]:
        made = _unpacked(query.to_arrow()["payload"].to_pylist(), self.dimension)
        return list({row.id: row for row in made}.values())

    # -- the table ---

    def _connect(self) -> Any:
        """One connection for good: what is in `memory://` is known to the connection alone."""
        if self._connection is None:
            self._make_private()
            # Every read looks for newer versions: other processes write too.
            options = PATIENCE if "://" in self.url and not self.url.startswith("memory:") else None
            self._connection = lancedb.connect(
                self.url, read_consistency_interval=timedelta(0), storage_options=options
            )
        return self._connection

    def _open(self) -> Any:
        if self._table is None:
            connection = self._connect()
            try:
                table = connection.open_table(TABLE)
            except ValueError:  # it is not there, or another process has only begun to make it
                table = connection.create_table(TABLE, schema=self._schema(), exist_ok=True)
            self._check_made(table.schema.metadata or {})
            self._table = table
            self._make_indexes()
        return self._table

    def _make_private(self) -> None:
        """Make its folder, where it is one, for its owner alone: it holds what people said, in words."""
        if "://" not in self.url:
            with suppress(OSError):  # then LanceDB says why
                Path(self.url).mkdir(mode=0o700, parents=True, exist_ok=True)

    def is_ours(self) -> bool:
        """Whether the table is of this embedder, or not made yet."""
        try:
            self.count()
        except StoreError:
            return False
        return True

    def name(self) -> str:
        """That of its store; empty if it bears none, or is not made yet."""
        with self._lock, _translated("read"), suppress(ValueError):
            return str((self._connect().open_table(TABLE).schema.metadata or {}).get(b"store", b"").decode())
        return ""

    def is_there(self) -> bool:
        self.check_reachable()
        with self._lock, _translated("read"):
            return TABLE in self._connect().list_tables().tables

    def check_reachable(self) -> None:
        """StoreError, with its URL, if no index can be there."""
        try:
            with self._lock:
                self._connect().list_tables(limit=1)
        except FAULTS as error:
            cause = str(error).splitlines()[0][:200]
            raise StoreError(f"memory.index_url is {self.url}, and cannot be opened: {cause}") from error

    def check_owner(self) -> None:
        """StoreError if it is the index of another store. One that cannot be read, or is not there yet, is nobody's."""
        with self._lock, suppress(*FAULTS):
            self._check_owner(self._connect().open_table(TABLE).schema.metadata or {})

    def _check_owner(self, metadata: Mapping[bytes, bytes]) -> None:
        held = metadata.get(b"store", b"").decode()
        if held and self.store_id and held != self.store_id:
            raise self.of_another()

    def of_another(self) -> StoreError:
        return StoreError(
            f"the index {self.url} is of another memory; give this one its own memory.index_url, or delete that one; or"
            " name the database that the index is of in memory.database_url; homes of one database share one index"
        )

    def _check_made(self, metadata: Mapping[bytes, bytes]) -> None:
        self._check_owner(metadata)
        if metadata.get(b"layout", b"1") != LAYOUT.encode():
            raise StoreError(f"the index {self.url} was made by another version; run `nightschool memory rebuild`")
        held = (metadata.get(b"embedder", b"?").decode(), metadata.get(b"dimension", b"?").decode())
        if held != (self.embedder_name, str(self.dimension)):
            raise StoreError(
                f"the index {self.url} holds vectors of {held[0]} ({held[1]} numbers each), the embedder is"
                f" {self.embedder_name} ({self.dimension}); run `nightschool memory rebuild`"
            )

    def _make_indexes(self) -> None:
        """Those that are missing. Another process may be making them too: who comes second finds them made."""
        for column, config in INDEXES.items():
            conflicts = 0
            while not any(column in index.columns for index in self._table.list_indices()):
                try:
                    self._table.create_index(column, config=config)
                except RuntimeError as error:
                    conflicts += 1
                    if "commit conflict" not in str(error) or conflicts == CONFLICTS:
                        raise
                    self._table.checkout_latest()

    def _schema(self) -> pa.Schema:
        fields = [pa.field(name, pa.string()) for name in ("id", "scope", "session_id", "kind", "words")]
        fields += [pa.field("created_utc", pa.float64()), pa.field("position", pa.int64())]
        fields += [pa.field("payload", pa.large_binary()), pa.field("vector", pa.list_(pa.float32(), self.dimension))]
        made = {"layout": LAYOUT, "embedder": self.embedder_name, "dimension": str(self.dimension)}
        made["store"] = self.store_id
        return pa.schema(fields, metadata=made)

    def _arrow(self, rows: Sequence[IndexRow]) -> pa.Table:
        columns: dict[str, Any] = {name: [getattr(r, name) for r in rows] for name in ("id", "session_id", "kind")}
        columns["created_utc"] = [row.created_utc for row in rows]
        columns["position"] = [row.position for row in rows]
        columns["scope"] = [SHARED if row.shared else _private(row.user_id, row.agent_id) for row in rows]
        columns["words"] = [" ".join(row.lines) for row in rows]
        columns["payload"] = [_packed(row) for row in rows]
        flat = pa.array(np.concatenate([row.vectors[0] for row in rows]).astype(np.float32))
        columns["vector"] = pa.FixedSizeListArray.from_arrays(flat, self.dimension)
        return pa.table({name: columns[name] for name in self._schema().names}, schema=self._schema())


def visible(user_id: str, agent_id: str) -> str:
    """The condition that holds for what this user and agent may see, and for nothing else."""
    scopes = {SHARED, _private(user_id, ""), _private(user_id, agent_id)}
    return f"scope IN ({', '.join(map(_quoted, sorted(scopes)))})"


def narrowed(
    scope: str,
    *,
    sessions: Iterable[str] | None = None,
    kind: str | None = None,
    since: float | None = None,
    until: float | None = None,
) -> str:
    """`scope` narrowed to these sessions, this kind, and times from `since` to before `until`."""
    parts = [scope]
    if sessions is not None:
        parts.append(f"session_id IN ({', '.join(map(_quoted, sessions))})")
    if kind is not None:
        parts.append(f"kind = {_quoted(kind)}")
    parts += [f"created_utc {sign} {float(time)!r}" for sign, time in ((">=", since), ("<", until)) if time is not None]
    return " AND ".join(parts)


def beside(scope: str, places: Mapping[str, Iterable[int]]) -> str:
    """`scope` narrowed to these places, by session."""
    parts = [
        f"(session_id = {_quoted(session)} AND position IN ({', '.join(map(str, some))}))"
        for session, some in places.items()
    ]
    return f"{scope} AND ({' OR '.join(parts)})"


def _private(user_id: str, agent_id: str) -> str:
    return json.dumps([user_id, agent_id])


def _packed(row: IndexRow) -> bytes:
    """Vectors in half precision, then the rest as JSON, then how long that is in four bytes."""
    rest = {name: value for name, value in vars(row).items() if name != "vectors"}
    text = json.dumps(rest).encode()
    return bytes(row.vectors.astype(HALF).tobytes() + text + len(text).to_bytes(4, "little"))


def _unpacked(payloads: Sequence[bytes], dimension: int) -> list[IndexRow]:
    starts = [len(p) - 4 - int.from_bytes(p[-4:], "little") for p in payloads]
    texts = b",".join(p[start:-4] for p, start in zip(payloads, starts, strict=True))
    rests = json.loads(b"[%b]" % texts)  # at once, which is quicker than one by one
    vectors = (
        np.frombuffer(p, HALF, start // HALF.itemsize).reshape(-1, dimension)
        for p, start in zip(payloads, starts, strict=True)
    )
    return [IndexRow(**r | {"lines": tuple(r["lines"])}, vectors=v) for r, v in zip(rests, vectors, strict=True)]


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _filters(ids: Sequence[str]) -> Iterator[str]:
    for start in range(0, len(ids), IDS_A_FILTER):
        yield "id IN (" + ", ".join(map(_quoted, ids[start : start + IDS_A_FILTER])) + ")"


@contextmanager
def _translated(action: str) -> Iterator[None]:
    """LanceDB raises built-in exceptions for everything; here they become one of ours, with the cause kept."""
    try:
        yield
    except FAULTS as error:
        cause = str(error).splitlines()[0]
        raise StoreError(f"cannot {action} the index: {cause}; `nightschool memory rebuild` makes it anew") from error
