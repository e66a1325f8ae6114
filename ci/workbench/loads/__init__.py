# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, and real SGLang that loads them in separate processes."""
