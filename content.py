"""What is said, and how content is named: a chat `Message`, canonical JSON, and ids made of content.

The invariant: the same content has the same id on every machine and in every process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from math import isfinite
from pathlib import Path
from typing import Any, Literal, TypedDict

Role = Literal["system", "user", "assistant", "tool"]


class Message(TypedDict):
    role: Role
    content: str


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces; NaN and infinities are refused (ValueError)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same with infinities as text, which JSON has no number for."""
    return {name: str(v) if isinstance(v, float) and not isfinite(v) else v for name, v in fields.items()}


def content_id(value: object) -> str:
    """`b2:` and 128 bits of BLAKE2b over the canonical JSON of `value`."""
    return "b2:" + blake2b(canonical_json(value).encode(), digest_size=16).hexdigest()


def files_id(paths: list[Path]) -> str:
    """`b2:` and 128 bits of BLAKE2b over the names and bytes of `paths`, in order of name."""
    digest = blake2b(digest_size=16)
    for path in sorted(paths, key=lambda p: p.name):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return "b2:" + digest.hexdigest()
