# SPDX-License-Identifier: Apache-2.0
"""Everything this package knows about SGLang, but for what schemes and ``cpu_reference`` use of it."""
