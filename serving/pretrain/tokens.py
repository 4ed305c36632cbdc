"""From conversations to batches: the tokenizer, and rows of token ids with the weight of each.

The invariant: what a step is trained on follows from seed, step and stage, so a run can be stopped and
resumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import corpus
from .scenes import Conversation

VOCABULARY = 4096
ROLES = ("system", "user", "assistant", "tool")
SPECIAL = ["<|pad|>", *(f"<|{role}|>" for role in ROLES), "<|end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(dialogues: Sequence[Conversation], seed: int, vocabulary: int = VOCABULARY) -> Any:
    """Byte-level BPE; every digit is a token of its own, so that numbers can be copied figure by figure."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_text(dialogues, seed), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        model_max_length=2048,
        extra_special_tokens=[f"<|{role}|>" for role in ROLES],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _text(dialogues: Sequence[Conversation], seed: int) -> Iterator[str]:
    rng = Random(f"{seed}:tokenizer")
    for talk in rng.sample(list(dialogues), min(len(dialogues), 12000)):
        yield from (turn["content"] for turn in talk)
    for _ in range(6000):
        yield from (turn["content"] for turn in corpus.conversation(rng))


@dataclass(frozen=True)
class Weights:
    """What a token's loss counts in written conversations, against 1 in real dialogue."""

    answer: float = 2.5  # what is copied
    context: float = 0.25  # what it is copied from: invented, so mostly noise


class Batch(NamedTuple):
    """What one step is trained on, each (rows, length): `talks` numbers the conversations of a row."""

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    talks: Tensor


class Batches:
    """Rows of whole conversations, cut only at the end of a row; a share `real` of the tokens is real dialogue."""

    def __init__(
        self,
        tokenizer: Any,
        dialogues: Sequence[Conversation],
        seed: int,
        tokens: int,
        weights: Weights,
        real: float = 0.5,
    ) -> None:
        self.tokenizer, self.dialogues, self.real = tokenizer, dialogues, real
        self.seed, self.tokens, self.weights = seed, tokens, weights
        self.role = {role: tokenizer.convert_tokens_to_ids(f"<|{role}|>") for role in ROLES}
        self.end = tokenizer.convert_tokens_to_ids("<|end|>")

    def encode(self, talk: Conversation, weigh: Weights) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        weights: list[float] = []
        said = [turn["content"] for turn in talk]
        texts = self.tokenizer.backend_tokenizer.encode_batch(said, add_special_tokens=False)
        for turn, text in zip(talk, texts, strict=True):
            weight = weigh.answer if turn["role"] == "assistant" else weigh.context
            ids += [self.role[turn["role"]], *text.ids, self.end]
            weights += [weigh.context] + [weight] * (len(text.ids) + 1)
        return ids, weights

    def at(self, step: int, stage: int = 0) -> Batch:
        """The batch of one step, of written conversations as in that `stage` of a run (`corpus.STAGES`).

        Every fourth has rows of twice the length, each one conversation from end to end.

        Otherwise the conversations of a row are apart, as they are when served: what was said in one is not known in
        the next. The long rows teach to look far back, which few single conversations do.
        """
        rng = Random(f"{self.seed}:{step}")
        long = step % 4 == 3
        length = 512 if long else 256
        rows: list[list[tuple[int, float, int]]] = []
        written = real = 0
        for _ in range(max(1, self.tokens // length)):
            row: list[tuple[int, float, int]] = []
            number = 0
            while len(row) < length + 1:
                if real * (1 - self.real) <= written * self.real:
                    ids, weights = self.encode(rng.choice(self.dialogues), Weights(1.0, 1.0))
                    real += len(ids)
                else:
                    ids, weights = self.encode(corpus.conversation(rng, stage), self.weights)
                    written += len(ids)
                row += zip(ids, weights, [number] * len(ids), strict=True)
                number += not long
            rows.append(row[: length + 1])
        ids_of, weights_of, talks_of = (torch.tensor([[cell[i] for cell in row] for row in rows]) for i in range(3))
        return Batch(ids_of[:, :-1], ids_of[:, 1:].contiguous(), weights_of[:, 1:].contiguous(), talks_of[:, :-1])
