"""A plugin for vLLM on a CPU, for tests.

LoRA is on attention alone, so experts need no backend that knows of LoRA: with any LoRA enabled the server asks for
expert kernels that are only written for GPUs. And rows without an adapter stay without: the products for a CPU give
them the weights of the last slot, since -1 stands for none (in 0.32.0; the kernels for GPUs skip such rows).
"""

import functools
import sys
from typing import Any


def register() -> None:
    _attention_only()
    _none_is_none()


def _attention_only() -> None:
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    choose = unquantized.select_unquantized_moe_backend

    @functools.wraps(choose)
    def without_lora(moe_config: Any) -> Any:
        moe_config.is_lora_enabled = False
        return choose(moe_config)

    for name, module in list(sys.modules.items()):
        if name.startswith("vllm") and getattr(module, choose.__name__, None) is choose:
            setattr(module, choose.__name__, without_lora)


def _none_is_none() -> None:
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    shrink = lora_ops.bgmv_shrink

    @functools.wraps(shrink)
    def of_rows_with_lora(inputs: Any, weights: Any, output: Any, indices: Any, scaling: float = 1.0) -> None:
        shrink(inputs * (indices >= 0).unsqueeze(1), weights, output, indices, scaling)

    lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = of_rows_with_lora
