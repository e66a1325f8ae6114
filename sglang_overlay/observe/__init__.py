# SPDX-License-Identifier: Apache-2.0
"""Measure what a load costs, and show it: memory, reports, progress, charts. Nothing here changes a load."""
