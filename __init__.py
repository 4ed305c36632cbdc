"""Nightschool: a self-evolving assistant with long-term memory."""

from .aio import AsyncAssistant
from .content import Message
from .errors import NightschoolError
from .memory.types import Feedback, ForgetPlan, ForgetReceipt, Interaction, Memory, Recall
from .replies import AsyncReplyStream, Reply, ReplyStream
from .sdk import Assistant, open
from .settings import Settings, load_settings

__all__ = [
    "Assistant",
    "AsyncAssistant",
    "AsyncReplyStream",
    "Feedback",
    "ForgetPlan",
    "ForgetReceipt",
    "Interaction",
    "Memory",
    "Message",
    "NightschoolError",
    "Recall",
    "Reply",
    "ReplyStream",
    "Settings",
    "load_settings",
    "open",
]
__version__ = "0.1.0"
