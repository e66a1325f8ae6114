# SPDX-License-Identifier: Apache-2.0
"""Capture a weight loader's writes and quantize them unit by unit. Imports torch only, knows nothing of SGLang.

Data flows one way::

    checkpoint tensor -> capture.py -> regions.py -> units.py -> staging.py -> quantizers.py -> fp8 parameter
                         (a write)     (where)       (which units) (not yet whole)  (whole)
    stream.py ties one parameter's steps together, layer.py one layer's parameters.
"""
