# SPDX-License-Identifier: Apache-2.0
"""Environments, patch series, and the steps for a new SGLang release."""
