"""An ordinary PyTorch loop that averages its parameters with the swarm every few steps.

    moshpitd run --swarm mine --join some-peer:7600 &
    python torch_example.py --peers 2

Lines marked with # <- are all that a training script needs. Parameters only: buffers of integers, such as BatchNorm's
`num_batches_tracked`, cannot be averaged.
"""

import argparse

import torch

import moshpit_client  # <-

parser = argparse.ArgumentParser()
parser.add_argument("--peers", type=int, default=2, help="begin an averaging only when so many are there")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--every", type=int, default=20, help="steps between two averagings")
arguments = parser.parse_args()

model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}  # <- the same memory

with (
    moshpit_client.connect() as daemon,  # <- by $MOSHPITD_SOCKET, else the user's own daemon
    daemon.open_session(parameters, min_peers=arguments.peers) as session,  # <-
):
    for step in range(1, arguments.steps + 1):
        pixels = torch.randn(32, 8)
        loss = torch.nn.functional.mse_loss(model(pixels), pixels.sin().sum(dim=1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % arguments.every == 0:
            receipt = session.average(weight=32.0 * arguments.every, timeout=60.0)  # <- in place
            print(f"step {step}: loss {loss.item():.4f}, {receipt.outcome} with {len(receipt.peers)} others")
print("parameters:", torch.nn.utils.parameters_to_vector(model.parameters()).double().sum().item().hex())
