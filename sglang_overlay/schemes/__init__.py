# SPDX-License-Identifier: Apache-2.0
"""Quantization schemes: what SGLang serves a bf16 checkpoint's layers as.

- Schemes: ``block``, ``int8``, ``granularity`` (``tensor`` and ``channel``).
- SGLang's own: ``stock_linear``, ``stock_experts``, ``mxfp8``.
- To build on: ``scheme`` (the interface), ``layer_plan``, ``serialized_plan``, ``expert_rows``, ``rows_over_ranks``,
  ``stored_format``, ``arithmetic``, ``capabilities``.
- Which layer has which: ``choice``, ``selection``, ``registry``.
"""
