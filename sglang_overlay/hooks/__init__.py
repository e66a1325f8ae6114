# SPDX-License-Identifier: Apache-2.0
"""How SGLang is hooked: the catalogue (data), how it is applied, which releases fit, and the hooks themselves."""
