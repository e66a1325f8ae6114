# SPDX-License-Identifier: Apache-2.0
"""Models that treat their parameters as upstream models do or might: SGLang loads them as an external model package."""
