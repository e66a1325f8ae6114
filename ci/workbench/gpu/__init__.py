# SPDX-License-Identifier: Apache-2.0
"""The check that runs on a GPU machine, and the pieces that are carried there."""
