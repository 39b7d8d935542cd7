"""The same round on Flower, for devices that are machines of their own (or Ray actors).

| here | on Flower |
|---|---|
| downlink | `Strategy.configure_train` on the server; the client mod `receive`, which makes θ̂_m of what travelled |
| local training | the ClientApp's train function, the simulator's own |
| uplink | the client mod `Transmit`, which makes what travels of Δ_m; `Strategy.aggregate_train` on the server |
| what a device remembers, θ̂_m and e_m | `Context.state` |

What travels is what the scheme sends: a quantized difference as its entries, an update as its sketch. The radio itself
(gains, noise, superposition) is simulated where all signals meet, on the server, with the simulator's random numbers; a
round gives the simulator's numbers up to the order of sums.
"""

try:
    from federated.flower.client import Device, Transmit, client_app, receive
    from federated.flower.nodes import wait_for_nodes
    from federated.flower.records import arrays, tensor_of
    from federated.flower.strategy import RadioStrategy
except ImportError as error:
    if not (error.name or "").startswith("flwr"):
        raise
    raise ImportError("federated.flower needs Flower: pip install 'sgc[federated]' on Python 3.11 or newer") from error

__all__ = [
    "Device",
    "RadioStrategy",
    "Transmit",
    "arrays",
    "client_app",
    "receive",
    "tensor_of",
    "wait_for_nodes",
]
