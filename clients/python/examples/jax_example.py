"""An ordinary JAX loop that averages its parameters with the swarm every few steps.

    moshpitd run --swarm mine --join some-peer:7600 &
    python jax_example.py --peers 2

Lines marked with # <- are all that a training script needs. JAX arrays cannot be written, so `average_values` takes the
parameters and returns new ones.
"""

import argparse

import jax
import jax.numpy as jnp

import moshpit_client  # <-

parser = argparse.ArgumentParser()
parser.add_argument("--peers", type=int, default=2, help="begin an averaging only when so many are there")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--every", type=int, default=20, help="steps between two averagings")
parser.add_argument("--seed", type=int, default=0, help="one of its own for each peer")
arguments = parser.parse_args()


@jax.jit
def train_step(parameters, inputs):
    """One step of SGD; returns the new parameters and the loss."""

    def loss_of(p):
        outputs = jnp.tanh(inputs @ p["hidden"]) @ p["output"]
        return jnp.mean((outputs - jnp.sin(inputs).sum(axis=1, keepdims=True)) ** 2)

    loss, slope = jax.value_and_grad(loss_of)(parameters)
    return jax.tree.map(lambda p, g: p - 0.05 * g, parameters, slope), loss


key, *keys = jax.random.split(jax.random.key(arguments.seed), 3)
parameters = {"hidden": 0.3 * jax.random.normal(keys[0], (8, 32)), "output": 0.1 * jax.random.normal(keys[1], (32, 1))}

with (
    moshpit_client.connect() as daemon,  # <- by $MOSHPITD_SOCKET, else the user's own daemon
    daemon.open_session(parameters, min_peers=arguments.peers) as session,  # <-
):
    for step in range(1, arguments.steps + 1):
        key, draw = jax.random.split(key)
        parameters, loss = train_step(parameters, jax.random.normal(draw, (32, 8)))
        if step % arguments.every == 0:
            averaged, receipt = session.average_values(parameters, weight=32.0 * arguments.every, timeout=60.0)  # <-
            parameters = {name: jnp.asarray(values) for name, values in averaged.items()}  # <-
            print(f"step {step}: loss {loss:.4f}, {receipt.outcome} with {len(receipt.peers)} others")
print("parameters:", sum(float(values.sum()) for values in parameters.values()).hex())
