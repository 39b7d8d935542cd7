"""Federated learning and data markets on the codec of `sgc`: what is compressed is what travels.

The arrow: Δθ ─ sparsify ─ project ─▶ [ the channel adds the sketches, and noise ] ─▶ recover ─▶ update.
"""
