"""A plugin for vLLM on a CPU, for tests: LoRA on attention alone, so experts need no backend that knows of LoRA.

With any LoRA enabled the server asks for expert kernels that are only written for GPUs.
"""

import functools
import sys
from typing import Any


def register() -> None:
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    choose = unquantized.select_unquantized_moe_backend

    @functools.wraps(choose)
    def without_lora(moe_config: Any) -> Any:
        moe_config.is_lora_enabled = False
        return choose(moe_config)

    for name, module in list(sys.modules.items()):
        if name.startswith("vllm") and getattr(module, choose.__name__, None) is choose:
            setattr(module, choose.__name__, without_lora)
