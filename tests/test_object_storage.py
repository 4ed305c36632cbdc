"""The index where a URL says, which LanceDB is given as it is; SQL and the exports stay in the home."""

from __future__ import annotations

import os
from dataclasses import replace
from uuid import uuid4

import numpy as np
import pytest
from nightschool.memory.store import MemoryStore
from nightschool.settings import MemorySettings, load_settings

SECRET = "the vault opens with 8842071355"


def said(store, words, user="ann"):
    return store.record([{"role": "user", "content": words}], "ok", user_id=user, session_id="s")


def told_and_forgotten(store):
    """What is written is found at once, what is forgotten is not; SQL and the index agree."""
    said(store, SECRET)
    said(store, "when do you open?", user="bob")
    store.remember("the vault is blue", user_id="ann", shared=True)
    found = {r.memory.text for r in store.recall("the vault", user_id="ann", threshold=0.0)}
    assert found == {f"{SECRET}\nok", "the vault is blue"}
    store.forget_apply(store.forget(user_id="ann"))
    assert store.recall("the vault", user_id="ann", threshold=0.0) == []
    assert len(store.recall("open", user_id="bob", threshold=0.0)) == 1
    assert store.verify() == []
    assert store.rebuild_index() == 1
    before, after = store.compact()
    assert before and after
    assert store.verify() == []


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_url_is_never_taken_for_a_path(settings, hash_embedder, tmp_path, monkeypatch, scheme):
    monkeypatch.chdir(tmp_path)
    url = "memory://nightschool" if scheme == "memory" else f"file://{tmp_path}/elsewhere"
    memory = MemorySettings(index_url=url)
    with MemoryStore(replace(settings, memory=memory), embedder=hash_embedder) as store:
        told_and_forgotten(store)
    made = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert made == {"memory": set(), "file": {"elsewhere"}}[scheme]


def test_index_by_url_keeps_no_byte_of_what_was_forgotten(settings, hash_embedder, tmp_path, bytes_in_home):
    memory = MemorySettings(index_url=f"file://{tmp_path}/elsewhere")
    with MemoryStore(replace(settings, memory=memory), embedder=hash_embedder) as store:
        said(store, SECRET)
        planted = hash_embedder.embed([SECRET])[0].tobytes()
        assert any(name.startswith("elsewhere/") for name in bytes_in_home(planted))
        store.forget_apply(store.forget(user_id="ann"))
        assert bytes_in_home(planted) + bytes_in_home(b"8842071355") == []


def test_index_that_was_lost_with_its_process_is_made_again_from_sql(settings, hash_embedder):
    memory = MemorySettings(index_url="memory://nightschool")
    for _ in range(2):
        with MemoryStore(replace(settings, memory=memory), embedder=hash_embedder) as store:
            note = store.remember("the vault is blue", user_id="ann")
            assert [r.memory for r in store.recall("vault", user_id="ann", threshold=0.0)] == [note]


def test_url_of_the_environment_reaches_the_store_as_it_was_written(tmp_path):
    env = {"NIGHTSCHOOL_MEMORY_INDEX_URL": "s3://bucket/a//b?x=%20y"}
    assert load_settings(tmp_path, env).index_url == "s3://bucket/a//b?x=%20y"


S3 = "127.0.0.1:5555"  # such as `moto_server -p 5555`


@pytest.mark.s3
def test_everything_works_on_s3_and_forgetting_leaves_no_object_with_the_bytes(settings, hash_embedder, monkeypatch):
    from pyarrow.fs import FileSelector, S3FileSystem

    name = "nightschool-" + uuid4().hex
    storage = S3FileSystem(
        access_key="x", secret_key="y", endpoint_override=S3, scheme="http", region="us-east-1",
        allow_bucket_creation=True, allow_bucket_deletion=True, connect_timeout=2, request_timeout=5,
    )  # fmt: skip
    try:
        storage.create_dir(name)
    except OSError as error:
        pytest.skip(f"no S3 answers at {S3}: {str(error).splitlines()[0]}")
    for variable, value in {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_ENDPOINT": f"http://{S3}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(variable, value)

    def objects_with(wanted: bytes) -> list[str]:
        files = (f for f in storage.get_file_info(FileSelector(name, recursive=True)) if f.is_file)
        return [f.path for f in files if wanted in storage.open_input_file(f.path).readall()]

    planted = hash_embedder.embed([SECRET])[0].astype(np.float32).tobytes()
    memory = MemorySettings(index_url=f"s3://{name}/index")
    try:
        with MemoryStore(replace(settings, memory=memory), embedder=hash_embedder) as store:
            said(store, SECRET)
            assert objects_with(planted)
            store.forget_apply(store.forget(user_id="ann"))
            assert objects_with(planted) + objects_with(b"8842071355") == []
            told_and_forgotten(store)
            assert objects_with(planted) == []
        with MemoryStore(replace(settings, memory=memory), embedder=hash_embedder) as store:
            assert len(store.recall("open", user_id="bob", threshold=0.0)) == 1
        assert not os.path.exists(settings.home / "index")
    finally:
        storage.delete_dir(name)
