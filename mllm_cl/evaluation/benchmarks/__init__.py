"""General benchmarks in their published schema, read from the Hub or from a local folder; see `benchmark.py` first.

They are entered in `mllm_cl.data.builders.BENCHMARKS`, the catalogue that `evaluation.general` of a recipe and
`mllm-cl evaluate --tasks` use.
"""
