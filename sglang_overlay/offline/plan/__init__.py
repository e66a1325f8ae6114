# SPDX-License-Identifier: Apache-2.0
"""The planner: will a model load, and with what peak? Works without the hardware and without reading a weight.

``checkpoint`` and ``from_config`` list the tensors, ``weightless`` runs code on tensors without memory, ``account``
counts their memory over time, ``simulate`` loads one rank in one mode, ``planner`` distributes that over processes, and
``document``, ``table`` and ``timeline`` show the results. All knowledge of SGLang is in ``offline/simulation.py``.
"""
