# SPDX-License-Identifier: Apache-2.0
"""One model load, from ``create_weights`` to the end of loading: who owns what is streamed, and what is said of it."""
