"""LoRA goes where it is asked to go, and nowhere else.

PEFT 0.21 rewrites the targets of MoE families for transformers 5: on a DeepSeek or Qwen shape any target that ends in
`gate_proj`, `up_proj` or `down_proj`, be it a dense MLP or a shared expert, becomes the fused routed experts, with a
warning at most, both when an adapter is made and when one is loaded. The invariant: inside `as_named`, a target is
the module that bears its name. Every `get_peft_model`, `PeftModel.from_pretrained` and `load_adapter` goes inside.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def as_named(model: Any) -> Iterator[None]:
    """Suspend PEFT's renaming for the family of `model`, and a warning that PEFT itself has to heed."""
    from peft.utils import transformers_weight_conversion as renaming

    families = renaming._MODEL_TO_CONVERSION_PATTERN
    family = model.config.model_type
    kept = families.pop(family, None)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            yield
    finally:
        if kept is not None:
            families[family] = kept
