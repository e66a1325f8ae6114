# SPDX-License-Identifier: Apache-2.0
"""Measure what loads cost (time, memory, operations), and write the charts and pages that show it."""
