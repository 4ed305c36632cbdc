"""Nightschool: a self-evolving assistant with long-term memory."""

from .errors import NightschoolError
from .replies import Reply, ReplyStream
from .sdk import Assistant, AsyncAssistant, open
from .settings import Settings, load_settings

__all__ = [
    "Assistant",
    "AsyncAssistant",
    "NightschoolError",
    "Reply",
    "ReplyStream",
    "Settings",
    "load_settings",
    "open",
]
__version__ = "0.1.0"
