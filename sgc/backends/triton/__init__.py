"""Triton kernels of the stages, each with a twin in plain torch. `sgc.backends` says when they run."""
