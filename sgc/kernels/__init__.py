"""Triton kernels of the stages, each with a twin in plain torch. `sgc.dispatch` says when they run."""
