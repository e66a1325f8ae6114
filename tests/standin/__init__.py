# SPDX-License-Identifier: Apache-2.0
"""Stand-in GPUs: real SGLang takes the branches of a named GPU on a machine that has none.

Nearly all that differs on a GPU while a model is loaded is Python branches, memory, devices and kernel contracts. These
run anywhere, in four layers:

1. ``cuda_runtime.c`` takes the place of CUDA's runtime (``LD_PRELOAD``). Device memory is host memory. torch's own
   caching allocator, streams, events, current devices and copies run on it as they are, so device indices, peaks
   (``torch.cuda.max_memory_allocated``) and out-of-memory errors are torch's. Nothing can be launched. Memory can be
   mapped and unmapped, so torch_memory_saver's own library runs as it is; what it maps again holds garbage.
2. ``aten.py`` runs torch's operators for CUDA on the CPU, on the same memory, and counts them.
3. ``kernels.py`` emulates the kernels that SGLang's loading calls, below SGLang's Python wrappers: signature, dtypes,
   shapes, preconditions and size-dependent dispatch. Each cites the source it mirrors. One that is missing raises.
4. ``packages.py`` answers for packages that only a GPU machine has.

``site/sitecustomize.py`` installs 2 to 4 in every process that inherits ``environ(gpu)``, before SGLang is imported.

None of this is a GPU. What it shows is "by stand-in": branches, layouts, contracts, memory of torch's allocator and
counts of launches; neither a kernel's own arithmetic nor any time.
"""
