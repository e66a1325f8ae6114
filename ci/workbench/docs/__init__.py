# SPDX-License-Identifier: Apache-2.0
"""The documentation site, and the demo."""
