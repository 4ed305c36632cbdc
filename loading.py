"""How models are built: one at a time in a process, and without a progress bar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

_ALONE = RLock()


@contextmanager
def loading() -> Iterator[None]:
    """Held while transformers builds a model.

    It switches torch for the whole process meanwhile: of two that are built at once, one may be left without weights
    (https://github.com/huggingface/transformers/issues/41782).
    """
    from transformers.utils import logging

    with _ALONE:
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            if shown:
                logging.enable_progress_bar()
