# SPDX-License-Identifier: Apache-2.0
"""Accuracy of schemes, and the sweep over architectures."""
