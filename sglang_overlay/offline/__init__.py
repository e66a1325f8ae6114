# SPDX-License-Identifier: Apache-2.0
"""Planning a load, and exporting a checkpoint: both simulate SGLang's loader, without a server."""
