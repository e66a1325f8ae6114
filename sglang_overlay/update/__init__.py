# SPDX-License-Identifier: Apache-2.0
"""Weight updates of a model that is being served: what one is, how it captures, how it is undone."""
