# SPDX-License-Identifier: Apache-2.0
"""Write what an online load computes as a checkpoint that stock SGLang loads.

``trace`` (offline/tracing.py) asks SGLang's own loader where each checkpoint tensor goes; ``plan`` decides what each
becomes and in which file it lies; ``writing`` quantizes and writes file by file; ``journal`` remembers what is done.
"""
