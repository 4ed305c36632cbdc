"""Nightschool: a self-evolving assistant with long-term memory."""

from .errors import NightschoolError
from .sdk import Assistant, AsyncAssistant, Reply, open
from .settings import Settings, load_settings

__all__ = ["Assistant", "AsyncAssistant", "NightschoolError", "Reply", "Settings", "load_settings", "open"]
__version__ = "0.1.0"
