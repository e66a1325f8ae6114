"""Checkpoints, real SGLang loads and serving runs shared by the tests, the demo and the benchmarks."""
