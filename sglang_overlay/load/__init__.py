# SPDX-License-Identifier: Apache-2.0
"""One model load, from ``create_weights`` to its end: its state, its fallbacks, and its diagnostics and reports."""
