"""Load a checkpoint in real SGLang, run a ragged batch through it, and save what the last layer's modules saw.

Runs in a process of its own: ``python layer_capture.py CHECKPOINT OUT``. Two models: "float32", unquantized, in which
what differs from float64 is the computation and not the rounding between its steps; and "fp8", as it is served.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

# Before SGLang's modules, as in a scheduler process: it loads the plugins.
from workbench.loads import load_worker  # isort: skip
from workbench.loads import runtime
from workbench.loads.job import LoadJob
from workbench.loads.loads import free_port

#: Two requests of different length, then this many decode steps of both.
PROMPTS = ((3, 50, 97, 120, 7), (200, 201, 30, 31, 32, 33, 34, 8, 9))
DECODE_STEPS = 3


def record(store: list[dict[str, Any]], module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    named = {**{f"arg{number}": value for number, value in enumerate(args)}, **kwargs}
    kept = {name: value.clone() for name, value in named.items() if isinstance(value, torch.Tensor)}
    if "topk_output" in named or (len(args) > 1 and hasattr(args[1], "topk_ids")):
        topk = named.get("topk_output", args[1] if len(args) > 1 else None)
        kept |= {"topk_ids": topk.topk_ids.clone(), "topk_weights": topk.topk_weights.clone()}
    output = output[0] if isinstance(output, tuple) else output
    store.append({**kept, "output": output.clone()})


def tensors_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    return named | {name: getattr(module, name).clone() for name in ("w_kc", "w_vc") if hasattr(module, name)}


def run(job: LoadJob) -> dict[str, Any]:
    runner = load_worker.build_runner(job, 0, free_port())
    runtime.get_ready_to_generate(runner)
    layer = runner.model.model.layers[-1]
    modules = {"attention": layer.self_attn, "linear": layer.self_attn.o_proj, "experts": layer.mlp.experts}
    calls: dict[str, list[dict[str, Any]]] = {name: [] for name in modules}
    for name, module in modules.items():
        module.register_forward_hook(partial(record, calls[name]), with_kwargs=True)
    requests = [load_worker._request(number, prompt, job.new_tokens) for number, prompt in enumerate(PROMPTS)]
    next_ids, _, batch = runtime.one_batch.extend(requests, runner)
    for _ in range(DECODE_STEPS):
        next_ids, _ = runtime.one_batch.decode(next_ids, batch, runner)
    return {"calls": calls, "tensors": {name: tensors_of(module) for name, module in modules.items()}}


def run_and_clean_up(job: LoadJob) -> dict[str, Any]:
    try:
        return run(job)
    finally:
        runtime.take_down()


def main(checkpoint: str, out: str) -> None:
    new_tokens = DECODE_STEPS + 1
    jobs = {
        "float32": LoadJob(
            Path(checkpoint), quantization=None, server_args={"dtype": "float32"}, new_tokens=new_tokens
        ),
        "fp8": LoadJob(Path(checkpoint), new_tokens=new_tokens),
    }
    torch.save({name: run_and_clean_up(job) for name, job in jobs.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
