# SPDX-License-Identifier: Apache-2.0
"""The planner: will a model load, and with what peak, without the hardware and without reading a weight.

``checkpoint`` and ``from_config`` say which tensors there are, ``weightless`` runs code on tensors without memory,
``account`` counts them over time, ``simulate`` loads one rank in one way, ``planner`` spreads that over processes, and
``document``, ``table`` and ``timeline`` say what came out. What this knows of SGLang is in ``upstream.simulation``.
"""
