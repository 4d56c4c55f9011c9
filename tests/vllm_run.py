"""Run in vLLM's own environment: greedy tokens of a directory, and how sparse they were -> JSON.

One line of JSON comes in: ``options`` of vllm.LLM, ``prompts`` of token ids, ``new_tokens``, and
``adapters``, a LoRA directory or null for each prompt. ``before`` are options of other models that
the process runs first; ``whole_compile`` asks for vLLM's compilation as it is on GPUs. What goes
out on the last line: ``tokens``, ``sparsity`` over what ran, ``sites``, and of each prompt how
many tokens were ``cached``.
"""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    asked = json.loads(sys.stdin.readline())
    sizes = (f"{kind}_parallel_size" for kind in ("tensor", "pipeline"))
    ranks = math.prod(asked["options"].get(size, 1) for size in sizes)
    if ranks == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that the shards can be looked at
    else:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(ranks)))
    if asked.get("whole_compile"):
        compile_as_on_gpus()
    from vllm import LLM, SamplingParams

    sizes = {"max_model_len": 256, "max_num_seqs": 4}
    others = [LLM(**sizes, **options) for options in asked.get("before") or []]
    llm = LLM(**(sizes | asked["options"]))
    seen: dict[str, list[int]] = {}
    if asked.get("count"):
        llm.apply_model(lambda model: count(model, seen))
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in asked["prompts"]],
        SamplingParams(temperature=0, max_tokens=asked["new_tokens"], ignore_eos=True),
        lora_request=asked.get("adapters") and [request(path) for path in asked["adapters"]],
        use_tqdm=False,
    )
    del others
    kept, total = (sum(values[i] for values in seen.values()) for i in (0, 1))
    found = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "cached": [output.num_cached_tokens for output in outputs],
        "sparsity": 1 - kept / total if total else None,
        "sites": sorted(seen),
    }
    print("\n" + json.dumps(found))


def compile_as_on_gpus() -> None:
    """vLLM's own backend, which keeps what it compiled for other processes. On the CPU vLLM takes
    plain Inductor, and what that keeps is never loaded."""
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.platforms.cpu import CpuPlatform

    plain = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, config: Any) -> None:
        wanted = config.compilation_config
        mode, backend = wanted.mode, wanted.backend
        plain(cls, config)
        wanted.mode, wanted.backend, wanted.compile_sizes = mode, backend, []

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    FixFunctionalizationPass.__call__ = lambda self, graph: None  # it names ops of GPUs


def request(path: str | None) -> Any:
    from vllm.lora.request import LoRARequest

    return path and LoRARequest(path, 1 + hash(path) % 2**31, path)


def count(model: Any, seen: dict[str, list[int]]) -> None:
    """Hang a counter on every shard: what the first decision keeps, and of how many."""
    from catsparse.vllm_plugin.layers import shards_of

    for key, shard in shards_of(model).items():
        counts = seen.setdefault(key, [0, 0])

        def note(keep: Any, kept: Any, counts: list[int] = counts) -> None:
            counts[0] += int(keep.sum())
            counts[1] += keep.numel()

        shard.catsparse_counter = note


if __name__ == "__main__":
    main()
