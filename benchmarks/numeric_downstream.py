"""The probes of the downstream tasks at full size: trained together, against five networks one after another.

    taskset -c 0,1 python benchmarks/numeric_downstream.py                # 10,000 steps of both: minutes
    taskset -c 0,1 python benchmarks/numeric_downstream.py --steps 200    # the ratio alone; the scores are unfinished
    taskset -c 0,1 python benchmarks/numeric_downstream.py --steps 200 --chunk 256 --repeats 5

The baseline is what Section 5.1 of the paper says in PyTorch's words: torch.nn, autograd and torch.optim.Adam, from the same
initial weights. The encoding is synthetic: a smooth nonlinear mixture of the first --dims of ten semantics with a little
noise. Times are of everything that leads from encodings to scores; set OMP_NUM_THREADS to the number of cores.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from sklearn.metrics import matthews_corrcoef, r2_score
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import eval_numeric_predict
import mlp_probes
import probes
from eval_numeric_predict import class_labels, regression_targets, score_tasks, shift
from running.command_line import Parser, integer, run_script
from running.cores import usable_cores
from running.devices import describe_device


def synthetic_samples(samples, dims, seed, device):
    """Fitting, test and shifted (encodings (N, dims), semantics (N, 10)), protocol "code"."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    inner, outer = normal(dims, dims), normal(dims, dims)
    sets = []
    for shifted in (False, False, True):
        s = shift(normal(samples, 10), "code", generator) if shifted else normal(samples, 10)
        h = torch.tanh(s[:, :dims] @ inner / 2) @ outer + s[:, :dims] / 3 + 0.02 * normal(samples, dims)
        sets.append((h.to(device), s.to(device)))
    return sets


def initial_networks(size, generator):
    """Initial weights of y1 … y5, (hidden, output) each, in the order in which `score_tasks` draws them."""
    return [mlp_probes.initial_network(size, outputs, generator) for outputs in (1, 1, 1, 1, 2)]


def train_plain(initial, h, target, steps):
    """A probe as an nn.Module, trained by autograd; initial: weights of `initial_network`, target: (N,)."""
    hidden, output = initial
    network = nn.Sequential(nn.Linear(h.shape[1], len(hidden)), nn.ReLU(), nn.Linear(len(hidden), len(output)))
    with torch.no_grad():
        for layer, weight in ((network[0], hidden), (network[2], output)):
            layer.weight.copy_(weight)
            layer.bias.zero_()
    network.to(h)
    loss = nn.MSELoss() if len(output) == 1 else nn.CrossEntropyLoss()
    target = target.to(h.dtype)[:, None] if len(output) == 1 else target.long()
    optimiser = torch.optim.Adam(network.parameters(), lr=mlp_probes.LEARNING_RATE)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(network(h), target).backward()
        optimiser.step()
    return network


@torch.no_grad()
def plain_prediction(network, h):
    """(N,) predictions of a regression, or log-odds of class 1."""
    output = network(h)
    return output[:, 0] if output.shape[1] == 1 else output[:, 1] - output[:, 0]


def plain_scores(fit, test, shifted, protocol, generator, steps):
    """What `score_tasks` returns, from networks one after another."""
    fit_h, test_h = probes.standardise(fit[0], test[0])
    _, shifted_h = probes.standardise(fit[0], shifted[0])
    fit_y, test_y, shifted_y = (regression_targets(s, protocol) for _, s in (fit, test, shifted))
    networks = initial_networks(fit_h.shape[1], generator)
    regression = {}
    for i, initial in enumerate(networks[:4]):
        network = train_plain(initial, fit_h, fit_y[:, i], steps)
        regression[f"y{i + 1}"] = r2_score(test_y[:, i].cpu(), plain_prediction(network, test_h).detach().cpu())
    network = train_plain(networks[4], fit_h, class_labels(fit_y[:, 1], fit_y[:, 1], protocol), steps)
    classification = {}
    for name, h, y in (("iid", test_h, test_y), ("ood", shifted_h, shifted_y)):
        label, predicted = class_labels(y[:, 1], fit_y[:, 1], protocol), plain_prediction(network, h) > 0
        classification[name] = matthews_corrcoef(label.cpu(), predicted.cpu())
    return regression, classification


def timed(function, *arguments):
    """(scores, seconds, CPU seconds) of one evaluation."""
    wall, cpu = time.perf_counter(), time.process_time()
    regression, classification = function(*arguments)
    return regression | classification, time.perf_counter() - wall, time.process_time() - cpu


def main():
    parser = Parser(__doc__)
    parser.add_argument("--steps", type=integer(1), default=eval_numeric_predict.STEPS)
    parser.add_argument("--samples", type=integer(1), default=20_480, help="fitting samples, as many test and shifted ones")
    parser.add_argument("--dims", type=integer(1), default=5, help="dimensions of the encoding")
    parser.add_argument("--chunk", type=integer(1), default=mlp_probes.CHUNK, help="samples of a chunk on a CPU")
    parser.add_argument("--repeats", type=integer(1), default=1, help="timed runs of both, in turn")
    parser.add_argument("--seed", type=integer(0), default=0, help="of the samples and the initial weights of the first run")
    parser.add_argument("--threads", type=integer(1), default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    eval_numeric_predict.STEPS, mlp_probes.CHUNK = args.steps, args.chunk
    device = torch.device(args.device)
    cores = usable_cores()
    print(f"{describe_device(device)}, {cores} usable cores, torch {torch.__version__}")
    print(f"{args.samples} samples, {args.dims} dimensions, {args.steps} steps, five probes", flush=True)

    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # its first use imports torch's compiler: not what is timed
    ratios, cpu_ratios, differences = [], [], {}
    for run in range(args.repeats):
        samples = synthetic_samples(args.samples, args.dims, args.seed + run, device)
        generators = [torch.Generator().manual_seed(args.seed + run) for _ in range(2)]
        own, seconds, cpu = timed(score_tasks, *samples, "code", generators[0])
        print(f"  together           {seconds:8.1f} s, CPU {cpu:8.1f} s", flush=True)
        plain, plain_seconds, plain_cpu = timed(plain_scores, *samples, "code", generators[1], args.steps)
        print(f"  one after another  {plain_seconds:8.1f} s, CPU {plain_cpu:8.1f} s", flush=True)
        ratios.append(plain_seconds / seconds)
        cpu_ratios.append(plain_cpu / cpu)
        for task in own:
            differences[task] = max(differences.get(task, 0), abs(own[task] - plain[task]))
            print(f"    {task:4}{own[task]:9.4f}{plain[task]:9.4f}")
    spread = f"({min(ratios):.1f} to {max(ratios):.1f} over {len(ratios)})"
    print(f"{statistics.median(ratios):.1f} times as fast {spread}, {statistics.median(cpu_ratios):.1f} times less CPU")
    print(f"largest difference of a score {max(differences.values()):.4f}")


if __name__ == "__main__":
    run_script(main)
