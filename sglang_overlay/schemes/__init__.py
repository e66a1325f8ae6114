# SPDX-License-Identifier: Apache-2.0
"""Quantization schemes: what SGLang serves a bf16 checkpoint's layers as. One file each; ``registry`` finds them."""
