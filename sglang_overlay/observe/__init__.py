# SPDX-License-Identifier: Apache-2.0
"""What a load costs and how to show it: memory, report, progress, chart. Nothing here changes a load."""
