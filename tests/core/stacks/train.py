"""A training on two ranks over gloo whose rank 1 does something else at step 5: `train.py MODE RANK PORT`."""

import multiprocessing
import os
import re
import socket
import subprocess
import sys
import threading
import time

import torch
import torch.distributed as dist


class Stuck(torch.utils.data.Dataset):
    """Data that never comes."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        time.sleep(1000)


def other(mode, rank):
    if mode == "other_collective":
        if rank == 0:
            dist.all_reduce(torch.ones(3))
        else:
            dist.broadcast(torch.ones(3), 0)
            dist.barrier()
    if mode == "handle" and rank == 0:
        work = dist.all_reduce(torch.ones(3), async_op=True)
        work.wait()
    if rank == 0:
        return
    match mode:
        case "sleep" | "handle":
            time.sleep(1000)
        case "python_loop":
            while True:
                pass
        case "c_loop":
            re.match("(a+)+$", "a" * 60 + "b")
        case "lock":
            lock = threading.Lock()
            lock.acquire()
            lock.acquire()
        case "loader":
            next(iter(torch.utils.data.DataLoader(Stuck())))
        case "worker_loader":
            next(iter(torch.utils.data.DataLoader(Stuck(), num_workers=1)))
        case "barrier":
            dist.barrier()
        case "socket":
            server = socket.create_server(("127.0.0.1", 0))
            socket.create_connection(server.getsockname()).recv(1)
        case "child":
            subprocess.run(["sleep", "1000"], check=True)
        case "pipe":
            ours, theirs = multiprocessing.Pipe()
            ours.recv()
            theirs.close()


def train(mode, rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 8))
    for step in range(10**6):
        if step == 5:
            print("standing still", flush=True)
            other(mode, rank)
        model(torch.ones(4, 8)).sum().backward()
        time.sleep(0.005)


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]), sys.argv[3])
