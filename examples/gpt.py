"""A small byte-level GPT, trained with DDP on text that every machine has: the source of Python's standard library.

    ckptctl run --nproc 2 --every 5s --store ./runs -- examples/gpt.py --steps 300

Plain PyTorch; the lines that ckptd needs are marked. The same script runs under torchrun or plain Python.
Killed and resumed, it ends bit-identical to a run that was never interrupted.
"""

import argparse
import math
import os
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import ckptd  # <- 1


class Block(nn.Module):
    """Attention and MLP with residuals, pre-norm."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, x):
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, layers, width, heads, length):
        super().__init__()
        self.token, self.place = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        self.head.weight = self.token.weight  # tied, as in GPT-2
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, tokens):
        x = self.token(tokens) + self.place(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x)))


class Loader:
    """Random windows of the text; each rank draws its own, and its place in the sequence is part of its state."""

    def __init__(self, data, batch, length, seed):
        self.data, self.batch, self.length = data, batch, length
        self.random = torch.Generator().manual_seed(seed)

    def next(self):
        starts = torch.randint(len(self.data) - self.length - 1, (self.batch,), generator=self.random)
        windows = torch.stack([self.data[start : start + self.length + 1] for start in starts]).long()
        return windows[:, :-1], windows[:, 1:]

    def state_dict(self):
        return {"random": self.random.get_state()}

    def load_state_dict(self, state):
        self.random.set_state(state["random"])


def read_text(limit_bytes=4_000_000):
    """Return the source files of the standard library as one tensor of bytes, in a fixed order."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return torch.frombuffer(bytearray(text[:limit_bytes]), dtype=torch.uint8)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=96)
    args = parser.parse_args()

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
    torch.manual_seed(17)
    net = GPT(args.layers, args.width, 4, args.length)
    model = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / args.steps))
    )
    loader = Loader(read_text(), args.batch, args.length, seed=1000 + rank)
    torch.manual_seed(100 + rank)  # dropout differs between ranks

    with ckptd.attach(model=net, optimizer=optimizer, scheduler=scheduler, loader=loader) as run:  # <- 2
        if rank == 0 and run.restored:
            print(f"restored step {run.restored.step} from {run.restored.tier}", flush=True)
        began, first = time.monotonic(), None
        for step in run.steps(args.steps):  # <- 3
            inputs, targets = loader.next()
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            run.report(loss=loss)  # <- 4, optional
            first = step if first is None else first
            if rank == 0 and (step % 20 == 0 or step == args.steps):
                pace = (time.monotonic() - began) / (step - first + 1)
                print(f"step {step:4d}  loss {loss.item():.4f}  {pace * 1000:.0f} ms/step", flush=True)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
