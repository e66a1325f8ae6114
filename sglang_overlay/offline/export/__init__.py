# SPDX-License-Identifier: Apache-2.0
"""Write the results of an online load as a checkpoint that stock SGLang loads.

``trace`` (offline/tracing.py) asks SGLang's own loader where each checkpoint tensor goes; ``plan`` decides what each
becomes and which file it goes to; ``writing`` quantizes and writes file by file; ``journal`` records what is done.
"""
