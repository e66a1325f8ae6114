# SPDX-License-Identifier: Apache-2.0
"""Everything this package knows about SGLang. Nothing outside this folder and ``cpu_reference`` imports sglang."""
