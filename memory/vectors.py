"""The vector and full-text index over memories: the only file that imports lancedb.

The invariant: a row here is a row of SQL's `memories` with its vector, and a search sees nothing outside the asked
scope. It holds no fact of its own, so it can be dropped and rebuilt; deleting a row and erasing its bytes are two
steps, because LanceDB keeps old versions on disk.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from threading import RLock
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import FTS, Bitmap, BTree
from numpy.typing import NDArray

from ..errors import StoreError

TABLE = "memories"
IDS_A_FILTER = 500
ADDS_BEFORE_OPTIMIZE = 100  # every add leaves a fragment, and fragments slow searches down
ROWS_BEFORE_OPTIMIZE = 5000  # rows that full text search has to scan until they are in its index
CONFLICTS = 20  # with other processes that make the same index, before giving up


@dataclass(frozen=True)
class IndexRow:
    id: str
    user_id: str
    agent_id: str
    session_id: str
    kind: str
    shared: bool
    text: str
    vector: NDArray[np.float32]


@dataclass(frozen=True)
class Hit:
    id: str
    dense: float  # cosine with the query
    words: float  # BM25; 0 = not among the best by words


class VectorIndex:
    """The table at `url` (a folder or an object store), opened when first needed."""

    def __init__(self, url: str, dimension: int, embedder_name: str) -> None:
        self.url, self.dimension, self.embedder_name = url, dimension, embedder_name
        self._lock = RLock()
        self._table: Any = None
        self._adds = self._rows = 0  # since the last optimize

    # -- writing ---

    def add(self, rows: Sequence[IndexRow]) -> None:
        if not rows:
            return
        with self._lock, _translated("write"):
            self._open().add(self._arrow(rows))
        self._adds, self._rows = self._adds + 1, self._rows + len(rows)
        if self._adds >= ADDS_BEFORE_OPTIMIZE or self._rows >= ROWS_BEFORE_OPTIMIZE:
            self.optimize()

    def delete(self, ids: Iterable[str]) -> None:
        """Hide rows from every later search; `erase` takes their bytes off the disk."""
        with self._lock, _translated("delete from"):
            for some in _filters(list(ids)):
                self._open().delete(some)

    def optimize(self) -> None:
        """Join small fragments and bring the indexes up to the newest rows."""
        with self._lock, _translated("optimize"):
            self._open().optimize()
        self._adds = self._rows = 0

    def erase(self) -> None:
        """Write the living rows anew and remove every older file, so that deleted rows leave no bytes behind."""
        with self._lock, _translated("erase from"):
            table = self._open()
            living = table.search().to_batches()
            self._table = self._connect().create_table(TABLE, living, schema=self._schema(), mode="overwrite")
            self._make_indexes()
            time.sleep(0.01)  # the clean-up spares what is younger than the age asked for, at least a millisecond
            self._table.optimize(cleanup_older_than=timedelta(milliseconds=1), delete_unverified=True)
        self._adds = self._rows = 0

    def drop(self) -> None:
        with self._lock, _translated("drop"):
            self._table = None
            self._connect().drop_table(TABLE, ignore_missing=True)

    # -- reading ---

    def search(self, vector: NDArray[np.float32], text: str, *, user_id: str, agent_id: str, limit: int) -> list[Hit]:
        """The `limit` best by cosine and the `limit` best by words, joined: rows of this user or shared ones."""
        scope = _scope(user_id, agent_id)
        with self._lock, _translated("search"):
            table = self._open()
            near = table.search(vector, vector_column_name="vector").distance_type("cosine").where(scope)
            dense = near.select(["id", "_distance"]).limit(limit).to_arrow().to_pylist()
            found = table.search(text, query_type="fts", fts_columns="text").where(scope)
            words = found.select(["id", "_score", "vector"]).limit(limit).to_arrow().to_pylist()
        bm25 = {row["id"]: float(row["_score"]) for row in words}
        hits = {row["id"]: Hit(row["id"], 1.0 - row["_distance"], bm25.get(row["id"], 0.0)) for row in dense}
        for row in words:
            cosine = float(np.asarray(row["vector"], dtype=np.float32) @ vector)
            hits.setdefault(row["id"], Hit(row["id"], cosine, bm25[row["id"]]))
        return list(hits.values())

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

    def count_visible(self, user_id: str, agent_id: str) -> int:
        with self._lock, _translated("read"):
            return int(self._open().count_rows(_scope(user_id, agent_id)))

    def ids(self) -> list[str]:
        """Every id, once a row: an id that was written twice is here twice."""
        with self._lock, _translated("read"):
            return [str(i) for i in self._open().search().select(["id"]).to_arrow()["id"].to_pylist()]

    # -- the table ---

    def _connect(self) -> Any:
        # Every read looks for newer versions: other processes write too.
        return lancedb.connect(self.url, read_consistency_interval=timedelta(0))

    def _open(self) -> Any:
        if self._table is None:
            connection = self._connect()
            if TABLE in connection.list_tables().tables:
                table = connection.open_table(TABLE)
                self._check_embedder(table.schema.metadata or {})
            else:
                table = connection.create_table(TABLE, schema=self._schema(), exist_ok=True)
            self._table = table
            self._make_indexes()
        return self._table

    def is_ours(self) -> bool:
        """Whether the table is of this embedder, or not made yet."""
        try:
            self.count()
        except StoreError:
            return False
        return True

    def _check_embedder(self, metadata: dict[bytes, bytes]) -> None:
        held = (metadata.get(b"embedder", b"?").decode(), metadata.get(b"dimension", b"?").decode())
        if held != (self.embedder_name, str(self.dimension)):
            raise StoreError(
                f"the index {self.url} holds vectors of {held[0]} ({held[1]} numbers each), the embedder is"
                f" {self.embedder_name} ({self.dimension}); run `nightschool memory rebuild`"
            )

    def _make_indexes(self) -> None:
        """Those that are missing. Another process may be making them too: who comes second finds them made."""
        for column, config in {"id": BTree(), "user_id": BTree(), "shared": Bitmap(), "text": FTS()}.items():
            for attempt in range(CONFLICTS):
                if any(column in index.columns for index in self._table.list_indices()):
                    break
                try:
                    self._table.create_index(column, config=config)
                except RuntimeError as error:
                    if "commit conflict" not in str(error) or attempt + 1 == CONFLICTS:
                        raise
                    self._table.checkout_latest()

    def _schema(self) -> pa.Schema:
        names = ("id", "user_id", "agent_id", "session_id", "kind", "text")
        fields = [pa.field(name, pa.string()) for name in names]
        fields += [pa.field("shared", pa.bool_()), pa.field("vector", pa.list_(pa.float32(), self.dimension))]
        return pa.schema(fields, metadata={"embedder": self.embedder_name, "dimension": str(self.dimension)})

    def _arrow(self, rows: Sequence[IndexRow]) -> pa.Table:
        columns = {name: [getattr(r, name) for r in rows] for name in self._schema().names if name != "vector"}
        flat = pa.array(np.concatenate([row.vector for row in rows]).astype(np.float32))
        columns["vector"] = pa.FixedSizeListArray.from_arrays(flat, self.dimension)
        return pa.table(columns, schema=self._schema())


def _scope(user_id: str, agent_id: str) -> str:
    user, agent = _quoted(user_id), _quoted(agent_id)
    return f"shared OR (user_id = {user} AND (agent_id = {agent} OR agent_id = ''))"


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
    except (OSError, RuntimeError, ValueError, pa.ArrowException) as error:
        cause = str(error).splitlines()[0]
        raise StoreError(f"cannot {action} the index: {cause}; `nightschool memory rebuild` makes it anew") from error
