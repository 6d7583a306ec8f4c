"""The VAE of the NNabla tutorial on MNIST: Kiln beside the same in plain torch.

    KILN_DATA=… python -m benchmarks.vae --threads 2

Pixels above one half are 1; 784-500-500-(50, 50) and 50-500-500-784 with ELU,
Adam 1e-3, batches of 128, 20 epochs. Of each fit: seconds, the ELBO of the
10,000 test images (nats an image, one draw for each), and log p(x) from 500
draws on the first 1,000 of them, by the importance-weighted bound.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from guides import amortized_encoder
from inference import Posterior, fit
from ppl_models import VAE
from ppl_models.data.datasets import mnist_bits
from ppl_models.vae import decoder_network, encoder_network

BATCH, EPOCHS, LR, LATENT = 128, 20, 1e-3, 50


@dataclass(frozen=True)
class Networks:
    """An encoder and a decoder, which start at the seed."""

    encoder: nn.Sequential
    decoder: nn.Sequential

    @classmethod
    def seeded(cls, seed: int) -> Networks:
        """The tutorial's sizes."""
        torch.manual_seed(seed)
        return cls(encoder_network(latent=LATENT), decoder_network(latent=LATENT))

    def loss(self, x: Tensor) -> Tensor:
        """−ELBO in nats of a batch, with KL(q ‖ N(0, I)) in closed form, as one writes it by hand."""
        mean, log_variance = self.encoder(x).chunk(2, -1)
        z = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        fit_ = binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        return fit_ + 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum()


def by_torch(seed: int, epochs: int, x: Tensor, test: Tensor) -> tuple[float, float]:
    """Seconds, and the test ELBO."""
    networks = Networks.seeded(seed)
    parameters = [*networks.encoder.parameters(), *networks.decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=LR, fused=True)
    began = time.perf_counter()
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            (networks.loss(x[rows]) / len(rows)).backward()
            optimizer.step()
    seconds = time.perf_counter() - began
    with torch.no_grad():
        return seconds, -float(networks.loss(test)) / len(test)


def by_kiln(seed: int, epochs: int, x: Tensor, test: Tensor) -> tuple[float, float, Posterior]:
    """Fit by Kiln, and return the posterior too."""
    networks = Networks.seeded(seed)
    model = VAE(latent=LATENT, decoder=networks.decoder)
    guide = amortized_encoder(model, networks.encoder)
    steps = epochs * -(-len(x) // BATCH)
    began = time.perf_counter()
    posterior = fit(model, guide, x, steps=steps, lr=LR, batch_size=BATCH, seed=seed, engine="compiled", progress=False)
    seconds = time.perf_counter() - began
    return seconds, float(posterior.log_evidence(test, samples=1).mean()), posterior


def main() -> None:
    """Print a line for each seed, then the ratio of the seconds and the difference of the ELBOs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    x, test = (torch.tensor(mnist_bits(part).x) for part in ("train", "t10k"))
    print(f"{options.threads} threads, {options.epochs} epochs")
    print("seed   torch s   Kiln s   torch ELBO   Kiln ELBO   log p(x)")
    rows = []
    for seed in range(options.seeds):
        torch_seconds, torch_elbo = by_torch(seed, options.epochs, x, test)
        seconds, elbo, posterior = by_kiln(seed, options.epochs, x, test)
        bound = float(posterior.log_evidence(test[:1000], samples=500).mean())
        rows.append((torch_seconds, seconds, torch_elbo, elbo))
        print(
            f"{seed:>4}{torch_seconds:>10.1f}{seconds:>9.1f}{torch_elbo:>13.2f}{elbo:>12.2f}{bound:>11.2f}", flush=True
        )
    means = torch.tensor(rows).mean(0)
    print(f"Kiln / torch, seconds: {means[1] / means[0]:.2f}; Kiln − torch, ELBO: {means[3] - means[2]:+.2f} nats")


if __name__ == "__main__":
    main()
