# SPDX-License-Identifier: Apache-2.0
"""The check on a GPU machine, and the pieces that are carried there."""
