"""Embedding, reward and classification models, and those that run code of transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from workbench.quality.architectures import dense
from workbench.quality.published import Published, of_transformers

_CODE = "sglang/srt/models/"
_ALL = (".*", "")


def _made(source: str, architecture: str, changes: dict[str, Any] | None = None, **fields: Any) -> Published:
    """A checkpoint that transformers makes of another architecture: it has the names, and none comes from SGLang."""
    return Published(source, of_transformers(architecture, **(changes or {})), (_ALL,), beside=architecture, **fields)


def _run(source: str, architecture: str, named: str = "", *, is_embedding: bool = False) -> Published:
    """The same, loaded with transformers' own code, which SGLang picks by the architecture `named`."""
    options = {"model_impl": "transformers", "is_embedding": is_embedding}
    return _made(source, architecture, named_in_config=named or architecture, server_args=options)


_QWEN3, _QWEN3_MOE = "https://huggingface.co/Qwen/Qwen3-8B", "https://huggingface.co/Qwen/Qwen3-30B-A3B"
_QWEN2_5_VL = "https://huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct"
_GLM4V_MOE = "https://huggingface.co/zai-org/GLM-4.5V"
_OF_GLM4V_MOE = "Glm4vMoeForConditionalGeneration"

ARCHITECTURES: dict[str, Published] = {
    "Contriever": _made(
        "https://huggingface.co/facebook/contriever",
        "BertModel",
        # Transformers wrote it in those days.
        adjust=lambda tensors: {**tensors, "embeddings.position_ids": ((1, 512), torch.int64)},
    ),
    "EmbeddingGemmaModel": _made(
        "https://huggingface.co/google/embeddinggemma-300m",
        "Gemma3TextModel",
        {"use_bidirectional_attention": True},
        named_in_config="Gemma3TextModel",
    ),
    "InternLM2ForRewardModel": replace(
        dense.ARCHITECTURES["InternLM2ForCausalLM"],
        source="https://huggingface.co/internlm/internlm2-7b-reward, modeling_internlm2.py",
    ),
    "Lfm2BidirectionalModel": _made(f"{_CODE}lfm2.py", "Lfm2Model"),
    "LlamaEmbeddingModel": _made(f"{_CODE}llama_embedding.py", "LlamaModel"),
    "LlamaForClassification": Published(
        f"{_CODE}llama_classification.py",
        of_transformers("LlamaForCausalLM", classification_out_size=2),
        server_args={"is_embedding": True},
    ),
    "LlamaForSequenceClassificationWithNormal_Weights": Published(
        f"{_CODE}llama_reward.py",
        of_transformers("LlamaForSequenceClassification", id2label={str(label): str(label) for label in range(10)}),
    ),
    "Qwen2ForRewardModel": Published(
        "https://huggingface.co/Qwen/Qwen2.5-Math-RM-72B, modeling_qwen2_rm.py", of_transformers("Qwen2ForCausalLM")
    ),
    "Qwen3ForRewardModel": Published(f"{_CODE}qwen3_rm.py", of_transformers("Qwen3ForCausalLM")),
    "TransformersForCausalLM": _run(_QWEN3, "Qwen3ForCausalLM"),
    "TransformersEmbeddingModel": _run(_QWEN3, "Qwen3ForCausalLM", is_embedding=True),
    "TransformersForSequenceClassification": _run(f"{_CODE}transformers.py", "LlamaForSequenceClassification"),
    "TransformersMoEForCausalLM": _run(_QWEN3_MOE, "Qwen3MoeForCausalLM"),
    "TransformersMoEEmbeddingModel": _run(_QWEN3_MOE, "Qwen3MoeForCausalLM", is_embedding=True),
    "TransformersMoEForSequenceClassification": _run(
        f"{_CODE}transformers.py", "Qwen3MoeForSequenceClassification", is_embedding=True
    ),
    "TransformersMultiModalForCausalLM": _run(_QWEN2_5_VL, "Qwen2_5_VLForConditionalGeneration"),
    "TransformersMultiModalEmbeddingModel": _run(_QWEN2_5_VL, "Qwen2_5_VLForConditionalGeneration", is_embedding=True),
    "TransformersMultiModalForSequenceClassification": _run(
        f"{_CODE}transformers.py", "Gemma3ForSequenceClassification", is_embedding=True
    ),
    "TransformersMultiModalMoEForCausalLM": _run(_GLM4V_MOE, _OF_GLM4V_MOE),
    "TransformersMultiModalMoEEmbeddingModel": _run(_GLM4V_MOE, _OF_GLM4V_MOE, is_embedding=True),
    "TransformersMultiModalMoEForSequenceClassification": _run(
        _GLM4V_MOE, _OF_GLM4V_MOE, "Glm4vMoeForSequenceClassification", is_embedding=True
    ),
}
