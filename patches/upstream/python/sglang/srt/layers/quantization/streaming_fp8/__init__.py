# SPDX-License-Identifier: Apache-2.0
"""Quantize a high-precision checkpoint to fp8 while it is read, so that loading peaks near the fp8 model's own size.

A write of a weight loader goes this way::

    checkpoint tensor -> capture.py -> regions.py -> units.py -> staging.py -> quantizers.py -> fp8 parameter
                         (a write)     (where)       (which units) (not yet whole)  (whole)

``stream.py`` ties the steps together for one parameter, ``layer.py`` for one layer, ``load.py`` for one model.
``hooks.py`` says where SGLang's own code calls in.
"""
