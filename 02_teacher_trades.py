"""Chapter 2: the robust teacher (paper, sections 4.1 and 4.4; TRADES, Zhang et al., 2019).

    for epoch, for batch of images x and labels y:
        x' = PGD from x, climbing KL(f(x) || f(x'))             # the inner problem of equation 1
        loss = cross entropy(f(x), y) + beta KL(f(x) || f(x'))  # accuracy + beta * robustness
        SGD step on the weights of f, the largest student
    keep the epoch with the best accuracy under PGD on held-out training images

Adversarial training overfits in robustness first, which is why an epoch is chosen. The test images
are for final numbers alone, and those are all made here: --judge is table 1 (section 5.4).

New here: main, the attack pgd, judging, table 1, the export, and what going on after a stop takes;
the network is as in chapter 1.

    python 02_teacher_trades.py --dataset cifar10    # the paper's schedule, on a GPU
    python 02_teacher_trades.py --student usual      # a row of table 1: TRADES of one student
    python 02_teacher_trades.py --judge              # table 1 of what is there, as chapter 5 does

reads   01_images.pt, 01_dynamic_net.pt (made first if missing)
writes  02_teacher.pt, .pt2, _log.csv      the best epoch's weights; the same as a network for
                    chapter 3's --teacher; a row for each epoch (with --student: 02_<student>...)
        table1.csv, student.pt2            with --judge; the search's student, to be deployed
"""

import argparse
import copy
import csv
import hashlib
import io
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# ---- The lesson: TRADES --------------------------------------------------------------------------
# fmt: off
FLAGS = {  # flag: (paper, quick, tiny, least, most, help)
    "epochs": (300, 10, 5, 1, 10**6, "epochs of adversarial training; paper 300 (section 5.0.1)"),
    "lr": (0.01, 0.05, 0.15, 0, 1e3, "learning rate, times warm-up or cosine; paper 0.01"),
    "warmup": (5 / 300, 0.1, 0.2, 1e-9, 1, "share of the run in which lr rises; paper silent"),
    "batch_size": (128, 128, 64, 1, 10**6, "images in an iteration; paper 128"),
    "beta": (6.0, 6.0, 6.0, 0, 1e3, "weight of the robust term; TRADES' 6"),
    "eps": (8.0, 8.0, 8.0, 0.2, 255, "change of a pixel, in 1/255: for 0.031 write 7.9; paper 8"),
    "step_size": (2.0, 2.0, 4.0, 0.02, 255, "of the attack, in 1/255: for 0.0078 write 2; paper 2"),
    "steps": (10, 10, 3, 1, 10**4, "of the training attack; paper 10"),
    "val_images": (1000, 1000, 250, 1, 10**6, "held-out images, on which an epoch is chosen"),
}
# fmt: on


def main():
    args = read_flags(
        student={"help": "train this one alone: a name in 01_students.csv or 05_best.csv"},
        judge={"action": "store_true", "help": "train nothing: table 1 of what is there"},
    )
    device, precision, where = pick_device(args)
    run_missing(args, "01_images.pt", "01_dynamic_net.pt")
    # {train, held_out, test, calibration}: uint8 (N, 3, 32, 32); {...}_labels: (N,)
    data = moved(load(args.out / "01_images.pt", args.common), device)
    net = load(args.out / "01_dynamic_net.pt", args.common)
    if args.judge:
        return table1(args, net, data, device)
    batch = min(args.batch_size, len(data["train"]))
    batches = len(data["train"]) // batch  # of an epoch; an incomplete batch is left out
    if batches * args.epochs == 1:  # the last iteration's learning rate is 0
        fail("with one iteration nothing is learned: take more --epochs")
    student, name = student_at(net, -1), args.student or "largest"
    file, following = "02_teacher", CHAPTERS[2]
    if args.student:
        student = named_student(args, net)
        file, following = f"02_{args.student}", f"{CHAPTERS[1]} --judge"
    settings = {**net["settings"], **args.settings, "genotype": student, "student": name}
    ends = ".pt", ".pt2", ".state", "_log.csv"
    checkpoint, exported, state, log = (args.out / f"{file}{end}" for end in ends)
    if args.restart:
        for old in (checkpoint, exported, state):
            old.unlink(missing_ok=True)
    if checkpoint.exists() and not state.exists():
        load(checkpoint, settings)  # exits if it is stale, or of other settings
        return finish(args, [], [f"{checkpoint} earlier (--restart makes it anew)"], following)
    shared = moved(net["weights"], device, learn=True)
    optimizer = torch.optim.SGD(shared.values(), momentum=0.9, weight_decay=2e-4)  # 5.0.1
    rows, best = resume(state, settings, shared, optimizer)
    args.attack = args.eps / 255, args.step_size / 255, args.steps
    print(f"TRADES, {name}, {args.epochs} epochs, on {where}")

    for epoch in range(len(rows), args.epochs):
        begun = time.monotonic()
        torch.manual_seed(args.seed * 10**6 + epoch)  # so stopping changes no draw
        order = torch.randperm(len(data["train"])).to(device)
        picks, losses = order.split(batch)[:batches], []
        for pick in counted(f"epoch {epoch + 1}:", picks, rounds=args.epochs - epoch):
            x, y = augment(data["train"][pick]) / 255, data["train_labels"][pick]
            network = Network(net, shared, student)  # f: slices of the weights as they are now
            with precision:
                logits = network(x)
                log_f = logits.log_softmax(1)  # log f(x), (B, classes)

                # The inner problem of equation 1. At x the KL's gradient is zero: start beside it.
                # Batch norm has the statistics of each step's own x', as in the loss below. With
                # those of x throughout, as in chapter 3, a network from random weights is worse.
                target, noise = log_f.detach(), 0.001 * torch.randn_like(x)
                x_adv = pgd(network, x, lambda z: kl(target, z), noise, *args.attack)

                # The outer one: gradients flow through both sides of the KL.
                cross_entropy, robust_kl = F.cross_entropy(logits, y), kl(log_f, network(x_adv))
                loss = cross_entropy + args.beta * robust_kl

            losses.append(torch.stack([loss, cross_entropy, robust_kl]).detach())
            share = (epoch + len(losses) / batches) / args.epochs  # of the run
            cosine = (1 + math.cos(math.pi * share)) / 2  # from 1 to 0
            optimizer.param_groups[0]["lr"] = lr = args.lr * min(share / args.warmup, cosine)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        row = {"epoch": epoch + 1, "lr": lr}
        row |= averages(losses, "loss", "cross_entropy", "kl")
        row["natural"], row["robust"] = accuracies(Network(net, shared, student), data, args)
        rows.append({**row, "seconds": time.monotonic() - begun})
        print(", ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()))
        write_csv(log, rows)
        if not best or row["robust"] > best["robust"]:
            best = {**row, "weights": moved(shared, "cpu")}
        momentum = optimizer.state_dict()
        save(state, settings, net, weights=shared, sgd=momentum, rows=rows, best=best)
    network = Network(net, moved(best["weights"], device), student)
    network = calibrated(network, data["calibration"])
    export(network, exported, data["names"])  # first: who finds the checkpoint finds it, too
    save(checkpoint, settings, net, weights=best["weights"])
    state.unlink(missing_ok=True)  # last: a checkpoint beside its state is not done yet
    table = {name: best[name] for name in ("epoch", "loss", "natural", "robust")}
    # What chapter 3's flag may be; printed here alone.
    table["--sharpen"] = sharpening(network, data["held_out"], data["held_out_labels"])
    finish(args, [table], [checkpoint, exported, log], following)


def pgd(network, x, loss, noise, eps, step_size, steps):
    """Projected gradient ascent (Madry et al., 2018), the inner maximisation of equation 1: signed
    steps up loss(network(x')) from x + noise, within |x' - x| <= eps and 0 <= x' <= 1."""
    x_adv = (x + noise).clamp(0, 1)

    def step():
        start = x_adv.detach().requires_grad_()
        with torch.enable_grad():  # which judge() switches off
            (gradient,) = torch.autograd.grad(loss(network(start)), start)  # none of the weights'
        moved = x_adv + step_size * gradient.sign()
        x_adv.copy_((x + (moved - x).clamp(-eps, eps)).clamp(0, 1))

    for i in range(steps):
        step()
        if i == 0 and x.is_cuda:  # by now slices are taken and kernels chosen, as they must be
            step = as_graph(step, x.device)
    return x_adv


LAST = {}  # the last CUDA graph, and the stream on which all are recorded


def as_graph(step, device):
    """step() as a CUDA graph: its thousand kernels are recorded, without running, and launched as a
    whole from then on. One by one, Python launches them more slowly than a GPU runs them. Each
    attack is recorded anew, for its student and its tensors, into the memory of the last one."""
    stream = LAST.setdefault("stream", torch.cuda.Stream(device))  # the usual one records nothing
    graph, usual = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    stream.wait_stream(usual)
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=LAST["graph"].pool() if "graph" in LAST else None)
        step()
        graph.capture_end()
    usual.wait_stream(stream)
    LAST["graph"] = graph
    return graph.replay


def kl(target, logits):
    """KL(target || softmax(logits)), mean over images; target holds log-probabilities (B, C)."""
    return F.kl_div(F.log_softmax(logits, 1), target, reduction="batchmean", log_target=True)


def averages(losses, *names):
    """An epoch's mean losses, from one tensor a batch, by name; exits if one is not finite."""
    means = torch.stack(losses).mean(0).tolist()
    if not math.isfinite(sum(means)):
        fail("the loss is not finite: --restart with a lower --lr")
    return dict(zip(names, means))


# ---- Judging: batch norms with statistics of their own, and the attack ---------------------------
@torch.no_grad()
def calibrated(network, images, batch=250):
    """The student as it is judged and exported: with batch-norm statistics of its own, from uint8
    images, augmented as in training. What reaches a layer depends on the student, so no statistics
    would suit all students."""
    for i, x in enumerate(images.split(batch)):
        network.momentum = len(x) / (i * batch + len(x))  # a plain average
        network(x / 255)
    return network.fold_norms()


@torch.no_grad()
def judge(network, images, labels, eps, step_size, steps, batch=100):
    """(natural, robust), bool (N,): which uint8 images are right, and which still are after PGD. It
    climbs the cross-entropy, as all papers report it: judging asks for a wrong class, training for
    any change of the answer. It starts at one place of the ball for all images: no answer depends
    on the batch. PGD of one step starts at the image, as FGSM, whose step is eps."""
    noise = 2 * torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1
    noise = noise.to(images.device) * (eps if steps > 1 else 0)
    natural = torch.cat([network(x / 255).argmax(1) for x in images.split(batch)]) == labels
    robust = torch.zeros_like(natural)
    for pick in natural.nonzero()[:, 0].split(batch):
        if images.is_cuda:  # filled up: cuDNN meets one shape, and builds its kernels once
            pick = pick.repeat(batch)[:batch]
        x, y = images[pick] / 255, labels[pick]
        x_adv = pgd(network, x, lambda z: F.cross_entropy(z, y), noise, eps, step_size, steps)
        robust[pick] = network(x_adv).argmax(1) == y
    return natural, robust


def accuracies(network, data, args):
    """(natural, robust) accuracy of a student, shares of 1, on held-out training images."""
    network = calibrated(network, data["calibration"])
    images, labels = data["held_out"][: args.val_images], data["held_out_labels"][: args.val_images]
    right = judge(network, images, labels, *args.attack)
    return [part.sum().item() / len(part) for part in right]


@torch.no_grad()
def sharpening(network, images, labels):
    """The factor of a judged network's logits with which these labels are likeliest, which is
    1 / temperature (Guo et al., 2017): above 1, it is underconfident. For chapter 3's --sharpen."""
    logits = torch.cat([network(x / 255) for x in images.split(250)])
    factors = [tenths / 10 for tenths in range(1, 101)]
    return min(factors, key=lambda factor: F.cross_entropy(factor * logits, labels).item())


# ---- Table 1: everything in the folder, on the test images ---------------------------------------
def table1(args, net, data, device):
    """Judge on the test images (section 5.4) what was trained alone (02_*.pt and 03_fixed_*.pt),
    the largest student of a dynamic network (03_*.pt), and what a search chose, which is exported.
    FGSM is one step of eps, PGD 20 of 2/255."""
    rows, wrote, names = [], [args.out / "table1.csv"], {**net["students"]}
    paths = sorted(args.out.glob("05_search*.pt"))
    searches = [search for path in paths if (search := usable(path, net["settings"]))]
    for search in searches:
        names |= search["students"]
    for path in sorted(args.out.glob("0[23]_*.pt")):
        trained = usable(path, net["settings"])
        if not trained:
            continue
        own_name, own = trained["settings"]["student"], trained["settings"]["genotype"]
        if own != names.get(own_name, own):  # as 02_best.pt, of an older search's `best`
            print(f"passed over: {path} is of another {own_name}: train it with --restart")
            continue
        students = [(own_name, own, trained["mark"])]
        for search in searches:
            if search["searched"] == path.name:  # its students are slices of these weights
                mark = f"{trained['mark']} {search['mark']}"
                students += [(*item, mark) for item in search["students"].items()]
        for name, student, mark in students:
            print(f"  {path.stem}, {name}, on {device} in float32")
            network = Network(net, moved(trained["weights"], device), student)
            judged = calibrated(network, data["calibration"])
            with FlopCounterMode(display=False) as counter:
                judged(data["test"][:1] / 255)
            test = judged, data["test"], data["test_labels"], args.eps / 255
            natural, fgsm = judge(*test, args.eps / 255, 1)
            right = {"natural": natural, "fgsm": fgsm, "pgd20": judge(*test, 2 / 255, 20)[1]}
            row = {
                "file": path.stem,
                "student": name,
                "eps": args.eps,
                "params": sum(part.numel() for part in network.slices.values()),
                "macs": counter.get_total_flops() // 2,
                **{key: part.sum().item() / len(part) for key, part in right.items()},
                "made_from": mark,  # by this chapter 5 knows if the row is stale
            }
            rows.append(row)
            if name != own_name:  # a search's: best, best_500M, best_random
                wrote.append(args.out / f"{name.replace('best', 'student')}.pt2")
                export(judged, wrote[-1], data["names"])
    if not rows:
        fail(f"nothing in {args.out} to judge: {CHAPTERS[1]} trains a teacher")
    write_csv(wrote[0], rows)
    finish(args, rows, wrote)


def usable(path, settings):
    """What load() gives; nothing of a file that is not there, nor, with a line that says why, of
    one that is stale or not ours."""
    try:
        return load(path, settings) if path.exists() else None
    except SystemExit as problem:
        print(f"passed over: {problem}")


def export(network, path, names):
    """Write a calibrated student as a network that needs none of this code, from (B, 3, 32, 32) in
    [0, 1] to logits, whose classes are the lines of its extra file `names`."""
    shapes, buffer = ({0: torch.export.Dim("batch")},), io.BytesIO()
    x = torch.zeros(2, 3, 32, 32)
    program = torch.export.export(Exported(network), (x,), dynamic_shapes=shapes, strict=False)
    torch.export.save(program, buffer, extra_files={"names": "\n".join(names)})
    write(path, buffer.getvalue())


class Exported(nn.Module):
    """A calibrated student as a module, with copies of its weights."""

    def __init__(self, network):
        super().__init__()
        tensors = moved(network.slices, "cpu").items()
        self.tensors = nn.ParameterDict({name: part.contiguous() for name, part in tensors})
        self.requires_grad_(False)
        self.network = copy.copy(network)
        self.network.slices = self.tensors

    def forward(self, x):
        return self.network(x)


# ---- Going on: the device, what earlier chapters have made, progress, states ---------------------
def pick_device(args):
    """(the device, autocast to bf16 where a GPU has it, words for both); exits if it is none."""
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # of many kinds
        fail(f"--device {name}: {str(error).splitlines()[0]}")
    # CUDA is initialized where the zeros above are on a GPU.
    bf16 = torch.cuda.is_initialized() and torch.cuda.is_bf16_supported(including_emulation=False)
    torch.backends.cudnn.allow_tf32 = False  # float32 is what is said; bf16 is not touched
    precision = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    return device, precision, f"{device} in {'bf16' if bf16 else 'float32'}"


def moved(content, device, learn=False):
    """A copy with all tensors on the device, where they get gradients if they are to learn."""
    return {
        name: part.detach().to(device, copy=True).requires_grad_(learn)
        if torch.is_tensor(part)
        else part
        for name, part in content.items()
    }


def run_missing(args, *files):
    """Run each earlier chapter one of whose files is missing."""
    for name in files:
        script = CHAPTERS[int(name[:2]) - 1]
        if not (args.out / name).exists():
            print(f"{args.out / name} is missing: running {script}\n")
            flags = [f"--sampling={args.sampling}"] if script[:2] >= "03" else []
            run_other(args, script, *flags)


def run_other(args, script, *flags):
    """Run another chapter; exits if it fails. If this one is stopped, that one is, too."""
    command = [sys.executable, Path(__file__).resolve().with_name(script), *args.given, *flags]
    code = subprocess.run(command).returncode
    if code < 0:
        fail(f"{script} was killed by signal {-code}: is there too little memory?")
    if code:
        raise SystemExit(2)  # it has said why


def named_student(args, net):
    """The student of this name, one of chapter 1's or of a search's."""
    students = {**net["students"]}
    if args.student not in students:
        for path in args.out.glob("05_search*.pt"):
            search = usable(path, net["settings"])
            students |= search["students"] if search else {}
    return students.get(args.student) or fail(f"choose --student from {', '.join(students)}")


def counted(name, items, rounds=1):
    """The items, with a line every ten seconds: how far it is, and the minutes left for so many
    rounds, as epochs are."""
    begun = said = time.monotonic()
    for i, item in enumerate(items):
        if time.monotonic() - said > 10:
            said = time.monotonic()
            left = (said - begun) / i * (rounds * len(items) - i) / 60
            print(f"  {name} {i}/{len(items)}, {left:.1f} minutes left")
        yield item


def resume(path, settings, shared, optimizer):
    """Go on from a state, if there is one: weights and momentum in place; returns the log's rows
    and the best."""
    if not path.exists():
        return [], {}
    state = load(path, settings)
    for name, weight in shared.items():
        weight.data.copy_(state["weights"][name])
    optimizer.load_state_dict(state["sgd"])
    print(f"continuing {path} after epoch {len(state['rows'])}")
    return state["rows"], state["best"]


# ---- The network, word for word as in chapter 1 --------------------------------------------------
class Slices:
    """Layers whose weights are leading slices of shared ones: as many outputs as are asked for, as
    many inputs as there are. Taken in the first call; gradients flow back through them."""

    def __init__(self, shared):
        self.shared, self.slices = shared, {}  # {name: a whole weight}, {name: the slice of it}

    def conv(self, name, x, out, kernel=1, stride=1, depthwise=False, bias=False):
        """A convolution to `out` channels; depthwise, each of them reads one channel alone."""
        if name not in self.slices:
            with torch.enable_grad():  # later calls may learn, even if this one does not
                weight = self.shared[name][:out, : x.shape[1]]  # depthwise there is one input alone
                while weight.shape[-1] > kernel:  # 7 -> 5 -> 3: the centre, times a learned matrix
                    side = weight.shape[-1] - 2
                    centre = weight[:, :, 1:-1, 1:-1].reshape(out, side * side)
                    weight = (centre @ self.shared[f"{name}_to{side}"]).view(out, 1, side, side)
                self.slices[name] = weight.contiguous(memory_format=torch.channels_last)
        shift = self.vector(f"{name}_bias", out) if bias else None
        groups = out if depthwise else 1
        return F.conv2d(x, self.slices[name], shift, stride, kernel // 2, groups=groups)

    def vector(self, name, size):
        if name not in self.slices:
            with torch.enable_grad():
                self.slices[name] = self.shared[name][:size]
        return self.slices[name]


def divisible(channels):
    """The nearest multiple of 8 that is at least 8 and not below 90 % of `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def canonical(net, student):
    """One genotype for all that differ only in blocks which their depths switch off: genes of those
    are 0. (Some genotypes that are left are still the same network, because channels are rounded.)
    """
    chosen = dict(zip(net["genes"], student))
    off = [gene for gene, (depth, least) in net["switches"].items() if chosen[depth] < least]
    return tuple((chosen | dict.fromkeys(off, 0)).values())


def student_at(net, place):
    """The student that takes this choice of every gene: 0 the smallest, 1 the second, -1 the
    largest."""
    return canonical(net, [choices[place] for choices in net["genes"].values()])


class Network(Slices):
    """A student: logits (B, classes) = network(x), x (B, 3, 32, 32) in [0, 1]. Its slices
    are those of the first call, in part copies: after an SGD step, make a new one. Batch norm has
    the batch's statistics, as in training, and keeps them in `stats`."""

    def __init__(self, net, shared, student):
        super().__init__(shared)
        self.net, self.choice = net, dict(zip(net["genes"], student))
        self.stats = {}  # {layer: (mean, variance) of its output's channels}
        self.momentum = 1.0  # of these averages: 1 keeps those of the last batch alone

    def __call__(self, x):
        x = x.contiguous(memory_format=torch.channels_last)  # a fifth faster than channels first
        x = self.mobilenet(x) if "kernel" in self.net else self.resnet(x)
        return self.conv("classifier", x, self.net["classes"], bias=True).flatten(1).float()

    def resnet(self, x):
        """Dyn-ResNet50, from images to the pooled map (B, C, 1, 1)."""
        net, choice = self.net, self.choice
        mid = divisible(divisible(net["stem"] * choice["width_mid"]) // 2)
        x = F.relu_(self.conv_bn("stem_1", x, mid, 3, net["stem_stride"]))
        if choice["depth_stem"]:
            x = x + F.relu_(self.conv_bn("stem_2", x, mid, 3))
        x = F.relu_(self.conv_bn("stem_3", x, divisible(net["stem"] * choice["width_stem"]), 3))
        for i, (channels, blocks, stride) in enumerate(net["stages"], 1):
            out = divisible(channels * choice[f"width_{i}"])
            for j in range(1, blocks + choice[f"depth_{i}"] + 1):
                middle = divisible(round(out * choice[f"expand_{i}_{j}"]))
                y = F.relu_(self.conv_bn(f"{i}_{j}_reduce", x, middle))
                y = F.relu_(self.conv_bn(f"{i}_{j}_middle", y, middle, 3, stride))
                y = self.conv_bn(f"{i}_{j}_last", y, out)
                if j == 1:  # the first block of a stage changes the shape
                    x = self.conv_bn(f"{i}_{j}_shortcut", F.avg_pool2d(x, stride), out)
                x = F.relu_(x + y)
                stride = 1  # of the blocks that follow
        return x.mean((2, 3), keepdim=True)

    def mobilenet(self, x):
        """Dyn-MobileNetV3, from images to the pooled features (B, C, 1, 1)."""
        net, choice = self.net, self.choice
        x = F.hardswish(self.conv_bn("stem", x, net["stem"], 3, net["stem_stride"]))
        y = F.relu_(self.conv_bn("0_1_middle", x, net["stem"], 3, depthwise=True))
        x = x + self.conv_bn("0_1_last", y, net["stem"])
        for i, (out, stride, activation, gated) in enumerate(net["stages"], 1):
            act = getattr(F, activation)
            for j in range(1, choice[f"depth_{i}"] + 1):
                kernel = choice[f"kernel_{i}_{j}"]
                middle = divisible(round(x.shape[1] * choice[f"expand_{i}_{j}"]))
                y = act(self.conv_bn(f"{i}_{j}_reduce", x, middle))
                y = act(self.conv_bn(f"{i}_{j}_middle", y, middle, kernel, stride, depthwise=True))
                if gated:  # squeeze-and-excitation
                    gate, squeezed = y.mean((2, 3), keepdim=True), divisible(middle // 4)
                    gate = F.relu_(self.conv(f"{i}_{j}_squeeze", gate, squeezed, bias=True))
                    y = y * F.hardsigmoid(self.conv(f"{i}_{j}_excite", gate, middle, bias=True))
                y = self.conv_bn(f"{i}_{j}_last", y, out)
                x = x + y if x.shape[1:] == y.shape[1:] else y
                stride = 1  # of the blocks that follow
        x = F.hardswish(self.conv_bn("head_1", x, net["head"][0]))
        return F.hardswish(self.conv("head_2", x.mean((2, 3), keepdim=True), net["head"][1]))

    @torch.no_grad()
    def fold_norms(self):
        """A student whose batch norms have the statistics that are now in `stats`, to be judged and
        for chapter 3's attack: a scale and a shift, which become part of each convolution."""
        student = copy.copy(self)
        student.slices = {**self.slices}
        for name, (mean, variance) in self.stats.items():
            scale, shift = (student.slices.pop(f"{name}_{part}") for part in ("scale", "shift"))
            factor = scale / (variance + 1e-5).sqrt()
            student.slices[name] = factor[:, None, None, None] * self.slices[name]
            student.slices[f"{name}_bias"] = shift - mean * factor
        return student

    def conv_bn(self, name, x, out, *sizes, **options):
        folded = f"{name}_bias" in self.slices  # batch norm is part of the convolution
        x = self.conv(name, x, out, *sizes, **options, bias=folded)
        if folded:
            return x
        scale, shift = (self.vector(f"{name}_{part}", out) for part in ("scale", "shift"))
        if name not in self.stats:
            self.stats[name] = scale.new_zeros(2, out)
        mean, variance = self.stats[name]  # which batch_norm updates in place
        return F.batch_norm(x, mean, variance, scale, shift, True, self.momentum)


def augment(images):
    """Images (B, 3, 32, 32), each cropped (4 black pixels around) and flipped its own way."""
    count, device = len(images), images.device
    crops = F.pad(images, (4, 4, 4, 4)).unfold(2, 32, 1).unfold(3, 32, 1)  # (B, 3, 9, 9, 32, 32)
    row, column = torch.randint(9, (2, count), device=device)
    x = crops[torch.arange(count, device=device), :, row, column]
    return torch.where(torch.rand(count, 1, 1, 1, device=device) < 0.5, x.flip(3), x)


# ---- Files and flags, the same in every chapter --------------------------------------------------
def fail(message):  # run_chapter() prints it as one line on stderr; exit code 2
    raise SystemExit(message)


def write(path, content):
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path)  # a full disk's has no name
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path, rows):
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write(path, text.getvalue().encode(errors="replace"))


def save(path, settings, source, **content):
    """Write what load() reads, with the checksums of its source, which load() has returned, and of
    what that was made from."""
    keep_others(path, settings)
    made_from = source["made_from"] | {source["file"]: source["mark"]} if source else {}
    about = {"file": path.name, "settings": settings, "made_from": made_from}
    buffer = io.BytesIO()
    torch.save(about | content, buffer)
    write(path, buffer.getvalue())


def keep_others(path, settings):
    """Exits if the file is there, and of other settings: another run has written it."""
    try:
        there = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["settings"]
    except Exception:  # of many kinds: it is not there, or damaged
        return
    if there != settings:
        fail(f"{path} is another run's, of other settings: give each one its own --out")


def load(path, settings):
    """What save() wrote, and `mark`, its checksum; exits if it is damaged, of other settings, or
    stale: if a file from which it was made, directly or by way of others, has changed."""
    own_mark = checksum(path)
    try:
        if zipfile.ZipFile(path).testzip():
            raise zipfile.BadZipFile
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        file, made_with, made_from = loaded["file"], loaded["settings"], loaded["made_from"]
    except Exception as error:  # of many kinds
        fail(f"{path} is damaged or not ours ({type(error).__name__}): delete it, it is made anew")
    if file != path.name:
        fail(f"{path} is a copy of a {file}, which is not read by this name")
    for name, value in settings.items():
        old = made_with.get(name)
        if old != value:  # a common flag: its old value goes on, even if the images have moved
            way = shlex.join([f"--{name}={old}"]) if name in COMMON else "that again, delete it,"
            fail(f"{path}: {name} was {old}, not {value}: take {way} or another --out")
    stale = ""
    for (name, mark), made_next in zip(made_from.items(), [*made_from, path.name][1:]):
        source = path.with_name(name)
        if source.exists() and checksum(source) != mark:  # the last one: mends begin after it
            stale = f"{name} is another one by now: repeat {CHAPTERS[int(made_next[:2]) - 1]} "
            stale += f"with the flags that made {made_next}, and --restart"
    if stale:
        fail(f"{path} is stale: {stale}")
    return {**loaded, "mark": own_mark}


def checksum(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


CHAPTERS = """01_dynamic_net.py 02_teacher_trades.py 03_progressive_rslad.py 04_predictor.py
05_nsga2.py""".split()

PRESETS = ["paper", "quick", "tiny"]

COMMON = {  # flags of every chapter, which it passes on to those that it runs
    "dataset": {"default": "cifar10", "help": "cifar10, cifar100, toy, or a folder of images"},
    "net": {"default": "resnet50", "choices": ["resnet50", "mbv3"]},
    "preset": {"choices": PRESETS, "help": "of networks and numbers; default: paper, for toy tiny"},
    "out": {"type": Path, "help": "default: runs/<dataset>-<net>[-<preset>][-seed<seed>]"},
    "seed": {"default": 0, "type": int},
    "device": {"help": "cpu, cuda or cuda:N; default: cuda if there is one"},
}


def read_flags(**others):
    """COMMON's flags, others, and FLAGS, by default the preset's; adds `given`, to pass on, and
    `common` and `settings`, which files are made with."""
    others["restart"] = {"action": "store_true", "help": "start this chapter over"}
    for flag, (*values, least, most, text) in FLAGS.items():
        text += f"; {least} to {most}; presets {values}"
        others[flag] = {"type": type(values[0]), "help": text, "default": argparse.SUPPRESS}
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = fail
    for flag, options in {**COMMON, **others}.items():
        parser.add_argument(f"--{flag.replace('_', '-')}", **options)
    args = parser.parse_args()
    args.given = [
        f"--{flag}={getattr(args, flag)}"
        for flag in COMMON
        if getattr(args, flag) != parser.get_default(flag)
    ]
    usual = "tiny" if args.dataset == "toy" else "paper"
    preset, args.settings = args.preset or usual, {}
    for flag, (*values, least, most, text) in FLAGS.items():
        value = vars(args).setdefault(flag, values[PRESETS.index(preset)])
        if not least <= value <= most:
            fail(f"{flag} is {value}, not {least} to {most}: {text}")
        args.settings[flag] = value
    if not 0 <= args.seed < 2**31:
        fail(f"--seed is {args.seed}, not 0 to {2**31 - 1}")
    folder, built_in = Path(args.dataset).resolve(), args.dataset in ("cifar10", "cifar100", "toy")
    if built_in and (folder / "train").is_dir():
        fail(f"--dataset {args.dataset}: write ./{args.dataset}, or rename the folder of this name")
    dataset = args.dataset if built_in else str(folder)  # two folders may have one last name
    args.common = {"dataset": dataset, "net": args.net, "preset": preset, "seed": args.seed}
    name = f"{folder.name}-{args.net}" + f"-{preset}" * (preset != usual)
    args.out = args.out or Path("runs", name + f"-seed{args.seed}" * (args.seed > 0))
    return args


def finish(args, rows, wrote, following=""):
    """Print a table, where it stands, and the next command."""
    if rows:
        for line in [rows[0], *(row.values() for row in rows)]:
            print(*(format(cell, ">17.4g" if isinstance(cell, float) else ">17") for cell in line))
    print("wrote", *wrote)
    if following:
        print("next: python", following, shlex.join(args.given))


def run_chapter():
    """main(); being stopped, or a file that cannot be read or written, ends it with one line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: a child is ended, too
    if hasattr(sys.stdout, "reconfigure"):  # not if it is closed, or a notebook's
        sys.stdout.reconfigure(errors="replace", line_buffering=True)  # a terminal may lack letters
    try:
        return main()
    except KeyboardInterrupt:
        line, code = "stopped; the same command goes on; with --restart it starts over", 130
    except OSError as error:
        sys.stdout = None  # it may be what failed, as with `| head`
        name = error.filename or "the output"
        line, code = f"{name} could not be read or written: {error.strerror}", 2
    except SystemExit as stop:
        if not isinstance(stop.code, str):  # of argparse, or of a chapter that ran before this one
            raise
        line, code = stop.code, 2
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    run_chapter()
