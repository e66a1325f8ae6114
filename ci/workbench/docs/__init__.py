# SPDX-License-Identifier: Apache-2.0
"""The site, and the demo."""
