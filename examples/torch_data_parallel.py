"""Train on several processes, each with its part of the batch, whose gradients are averaged over a network.

    python examples/torch_data_parallel.py --processes 2

The processes are on this machine here; on several machines, `torchrun` starts them and says where the others are. The
losses are those of one process with the whole batch.
"""

import argparse
import socket

import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from fastrnn.interop.torch import LSTM


class Model(nn.Module):
    """Whether there are more ones than zeros in a sequence."""

    def __init__(self):
        super().__init__()
        self.rnn = LSTM(1, 32)
        self.output = nn.Linear(32, 1)

    def forward(self, x):
        return self.output(self.rnn(x)[0][-1]).squeeze(-1)


def work(rank, args, port):
    torch.manual_seed(0)
    torch.set_num_threads(max(1, torch.get_num_threads() // args.processes))
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.processes)
    model = DistributedDataParallel(Model())
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for update in range(args.updates):
        x = torch.randint(2, (15, args.batch, 1)).float()
        y = (x.sum((0, 2)) > 7).float()
        mine = slice(rank, None, args.processes)
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(x[:, mine]), y[mine])
        loss.backward()
        if args.gradients and update == 0 and rank == 0:
            torch.save({name: p.grad for name, p in model.module.named_parameters()}, args.gradients)
        optimizer.step()
        mean = loss.detach() / args.processes
        distributed.all_reduce(mean)
        if rank == 0 and (update + 1) % 10 == 0:
            print(f"update {update + 1} loss {mean.item():.6f}", flush=True)
    distributed.barrier()  # nobody goes while another one is still at work
    distributed.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64, help="of all processes; a multiple of their number")
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--gradients", help="a file for the first update's gradients")
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (args, port), args.processes)


if __name__ == "__main__":
    main()
