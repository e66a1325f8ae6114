# SPDX-License-Identifier: Apache-2.0
"""How SGLang is hooked: the catalogue (data), applying it, the releases that fit, and the hooks themselves."""
