# SPDX-License-Identifier: Apache-2.0
"""What needs no load: planning one, and exporting a checkpoint; both simulate SGLang's loader."""
