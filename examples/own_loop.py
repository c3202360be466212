"""Keep the training loop: put noise into the network, train as ever, decide, slice, verify.

`rbpfx.prune` does nothing else, with more care: it hardens group after group, and projects the
gates onto a budget. Here is the least that works, on scikit-learn's digits:

    python examples/own_loop.py --strength 2
"""

from __future__ import annotations

import argparse

import torch
from _shared import parser, trained_digits
from torch import nn
from torch.nn import functional as F

import rbpfx


def main(options: argparse.Namespace) -> None:
    """Prune in a loop of one's own."""
    model, loader, test_loader = trained_digits(options.tiny)
    examples = len(loader.dataset)
    example = next(iter(loader))[0]

    # 1. The network becomes a graph, the graph gets noise where channels are read.
    dense = rbpfx.trace(model, example)
    analysis = rbpfx.analyze(dense)
    noisy = rbpfx.insert_noise(dense, analysis, "rbp")
    gates = rbpfx.noise_gates(noisy)

    # 2. A loop like any other; the only news are a penalty and a learning rate for the noise.
    units = sum(gate.size for gate in gates)
    noise = [p for gate in gates for p in gate.parameters()]
    weights = [p for p in noisy.parameters() if not any(p is n for n in noise)]
    optimizers = [
        torch.optim.Adam(noise, lr=0.1),
        torch.optim.SGD(weights, lr=0.01, momentum=0.9, nesterov=True),
    ]
    noisy.train()
    for _ in range(options.epochs):
        for images, labels in loader:
            loss = F.cross_entropy(noisy(images), labels)
            price = options.strength / units  # of one channel
            loss = loss + sum(gate.penalty(price, examples).sum() for gate in gates)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()

    # 3. The rule of the method decides; at least one unit of every group has to stay.
    kept, multipliers = {}, {}
    for gate in gates:
        needed = gate.needed()
        needed[gate.score().argmax()] = True
        kept[gate.group] = needed.nonzero().flatten().tolist()
        multipliers[gate.group] = gate.kept_multiplier().detach()
    plan = rbpfx.PruningPlan(kept)

    # 4. The trained weights go back into the graph without noise, which is sliced and verified.
    trained = noisy.state_dict()
    dense.load_state_dict({name: trained[name] for name in dense.state_dict()})
    folded = rbpfx.rewrite(dense, analysis, rbpfx.PruningPlan(), multipliers=multipliers)
    pruned = rbpfx.rewrite(folded, analysis, plan)
    masked = rbpfx.apply_mask(folded, analysis, plan)
    error = rbpfx.verify(masked, pruned, example[:2])

    # 5. Fine-tuning is the same loop over `pruned.parameters()`.
    for name, network in {"dense": model, "pruned": pruned}.items():
        macs, accuracy = rbpfx.count_macs(rbpfx.trace(network, example)), top1(network, test_loader)
        print(f"{name}: {macs:,} multiply-accumulates, accuracy {accuracy:.1%}")
    print(f"sliced equals masked to {error:.1e}")


@torch.no_grad()
def top1(network: nn.Module, loader) -> float:
    """Accuracy in eval mode."""
    network.eval()
    hits = torch.cat([network(images).argmax(1) == labels for images, labels in loader])
    return hits.double().mean().item()


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("--epochs", type=int, default=12, help="passes with noise")
    arguments.add_argument("--strength", type=float, default=2, help="price of the network, nats")
    options = arguments.parse_args()
    if options.tiny:
        options.epochs, options.strength = 2, 20
    main(options)
