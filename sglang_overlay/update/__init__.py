# SPDX-License-Identifier: Apache-2.0
"""Weight updates of a model that is being served: sessions, how they capture writes, and how they are undone."""
