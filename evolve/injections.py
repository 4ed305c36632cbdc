"""Turns that try to command the assistant rather than ask it: kept out of what is trained on, and reported.

Phrases that only such texts need count fully, phrases that honest requests use too count half; a text is suspected from
one full count on. Not covered: an instruction that stands alone and asks for something ordinary ("answer in French")
looks like a request, because it is one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from unicodedata import normalize

_OURS = r"\byour (response|reply|answer|output)\b"
_SURE = (
    r"(ignore|disregard|forget|override|bypass)\s+(\w+\s+){0,3}(previous|prior|above|earlier|preceding|foregoing)\s+"
    r"(\w+\s+){0,2}(instructions?|prompts?|rules?|directions?|messages|commands?|guidelines?|text|context)",
    r"(ignore|disregard|forget|override|bypass|(do not|don.?t) follow)\s+(\w+\s+){0,3}"
    r"((previous|prior|earlier)\s+|(?=\w+\s+(you were given|from above|above|before|earlier)))"
    r"(instructions?|prompts?|rules?|directions?|commands?|guidelines?)\b",
    r"(ignore|disregard|forget)\s+everything (above|before|prior|you were told)",
    r"(^|\n)\W{0,3}new (system )?instructions?\W{0,2}:|<\|(system|user|assistant)\|>",
    r"(ignore|disregard|forget|bypass|override|break|violate)\s+(all|any|your|every|these|those)\b[^.\n]{0,30}"
    r"\b(instructions?|rules?|guidelines?|polic(y|ies)|filters?|restrictions?|programming|guardrails?)",
    r"do anything now|\bDAN mode|jail\s?-?break|\bjailbroken",
    r"developer mode (enabled|output)|simulate\b[^.\n]{0,30}\bmode\b",
    r"(no|any|without( any)?|free (of|from)( all)?|not bound by( any)?) (ethical|moral|morals|ethics)\b",
    r"\b(uncensored|amoral|unhinged)\b",
    r"open\s?ai('?s|s)?\b[^.\n]{0,30}\b(polic|guideline|rule|restriction|content)",
    r"(broken free|breaks? free|freed) (of|from)\b",
    r"(reveal|print|repeat|show|output|leak)\b[^.\n]{0,30}"
    r"\b(system|initial|hidden|original) (prompt|instructions?)",
    r"stay in character|break(ing)? character|(remain|stay) in role|you are no longer",
    r"(no|not|never|don.?t|cannot)\b[^.\n]{0,40}\b(as an ai( language)? model|say that you (are|can))",
    r"from now on,?\s+(you (are|will|act|must act)|act as|chatgpt)\b",
    r"(you are|you're|you will|going to|i want you to|please|can you)\s+(\w+\s+){0,4}"
    r"(act like|pretend|pose as|immerse)",
    r"forget (everything|all)\b(?! (that|this|it|about)\b)",
    r"\byou are now an? (?!member|subscriber|customer|user|guest|citizen)",
    r"\b(inject|embed|weave|slip|infuse|integrate)\b[^.\n]{0,80}" + _OURS,
    r"\b(insert|add|include)\b[^.\n]{0,40}\b(advert\w*|promotions?|sponsor\w*|affiliate)\b[^.\n]{0,40}" + _OURS,
    _OURS + r"[^.\n]{0,40}\b(directing|leads? to|promot\w+|that'?s actually|hint(ing)? at|allud(e|ing) to)",
    _OURS + r" (by (mentioning|offering|suggesting|inviting)|to mention)\b",
    r"</?(information|system|instructions?|inst)>|\[/?(system|inst)\]|<<\/?SYS>>|<\|im_(start|end)\|>",
    r"###\s*(system|new instructions?)\b",
    r"\bgod mode\b|\bevil (confidant|bot|ai)\b|hypothetical (response|character|scenario|dialog)",
)
_HALF = (
    r"\b(unfiltered|unrestricted)\b",
    r"\b(modify|alter|augment|enhance|adjust|insert)\b[^.\n]{0,80}" + _OURS,
    r"\byou are now\b",
    r"\b(act as|role-?\s?play)\b",
    r"chat\s?gpt|language model|\bthe (ai|llm)\b|\bas an ai\b|\bopen\s?ai\b",
    r"\b(illegal|unethical|immoral|harmful|inappropriate|offensive|profanit(y|ies)|swear|curse|explicit|nsfw)\b",
    r"you (are|must|will|can|shall|have to)\b[^.\n]{0,60}\b(never|always|not|only|anything|everything|strictly)\b",
    r"(play|take on|in|your|the|a) role( of)?\b|\bcharacter\b|\bpersona\b|\bfictional\b",
    r"\b(rules?|restrictions?|guidelines?|instructions?|polic(y|ies))\b",
    r"\b(prompts?|respond|responses?|reply|output|tokens?)\b",
    r"\[[^\]\n]{2,40}\]|\{[a-z_ .]{2,30}\}",
    r"(system prompt|prompt injection|important message (from|to))",
    r"(no|any|without( any)?|free (of|from)( all)?|not bound by( any)?) (\w+ )?"
    r"(restrictions?|limitations?|censorship|filters?)\b",
    r"(enable|enter|activate|stay in)\b[^.\n]{0,30}\bmode\b",
    r"(no|not|never|don.?t|cannot)\b[^.\n]{0,40}\brefus(e|al)",
)
_FLAGS = re.IGNORECASE
_SURE_RE = re.compile("|".join(f"(?:{p})" for p in _SURE), _FLAGS)
_HALF_RES = tuple(re.compile(p, _FLAGS) for p in _HALF)
_UNSEEN = re.compile(r"[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]")  # and would part words
_ENOUGH = 3  # half counts: two of them are still met in honest requests about rules and roles


@lru_cache(maxsize=4096)  # notes and system texts come again and again
def is_injection(text: str) -> bool:
    """Whether `text` tries to take command of the assistant, in whatever letters of Unicode it is set."""
    text = _UNSEEN.sub("", normalize("NFKC", text))
    return bool(_SURE_RE.search(text)) or sum(bool(r.search(text)) for r in _HALF_RES) >= _ENOUGH


def any_injection(texts: Sequence[str]) -> bool:
    return any(map(is_injection, texts))
