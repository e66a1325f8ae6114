# SPDX-License-Identifier: Apache-2.0
"""Environments, patch series and what a new SGLang release needs."""
