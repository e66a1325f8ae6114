# SPDX-License-Identifier: Apache-2.0
"""What loads cost: time, memory, operations; the charts and pages that say so."""
