"""Quantize the weights of a high-precision checkpoint to fp8 while they are loaded.

With ``--quantization fp8`` a model would otherwise be loaded in bf16 and quantized after that. Here a weight has no
memory while the model is built (``placeholders.py``). What a weight loader writes to it is caught (``capture.py``), and
sorted into the units of which each scale is computed (``regions.py``, ``units.py``). A unit, such as one expert's w13,
is quantized as soon as the checkpoint has filled it (``stream.py``), so hardly anything waits in high precision. A
model whose loaders do more than write is loaded a second time, without streaming (``loading.py``).
"""
