# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, and real SGLang loading them in processes of their own."""
