"""Chapter 3: progressive adversarial robustness distillation (paper, section 4.4).

    shared = teacher's weights                                # the teacher itself stays as it is
    for what varies in (widths), (widths, depths), (widths, depths, expansions):       # figure 4
        for epoch, for batch x:
            student = random choices of what varies, the largest of the rest
            x' = PGD from x, climbing KL(teacher(x) || student(x'))
            loss = (1 - alpha) KL(teacher(x) || student(x)) + alpha KL(teacher(x) || student(x'))
            one SGD step on the layers that the student uses                # equations 2 and 3

Students shrink in three phases; Dyn-MobileNetV3 has kernels in place of widths. RSLAD (Zi et al.,
2021): the teacher's answer to the natural image is the target, with and without the attack.

New here: main, draw, sort_channels, reorder, exported_network; the rest is as in chapters 1 and 2.

    python 03_progressive_rslad.py --dataset cifar10     # the paper's schedule, on a GPU
    python 03_progressive_rslad.py --sampling random     # the paper's baseline: all genes vary
    python 03_progressive_rslad.py --sampling fixed --student usual    # RSLAD of one, from scratch

reads   01_images.pt, 01_dynamic_net.pt, 02_teacher.pt (made first if missing)
writes  03_progressive.pt, _log.csv (03_random..., 03_fixed_...)    weights; a row for each epoch
"""

import argparse
import copy
import csv
import hashlib
import io
import logging
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F

# ---- The lesson: progressive sampling and RSLAD --------------------------------------------------
# fmt: off
FLAGS = {  # flag: (paper, quick, tiny, least, most, help)
    "epochs": (120, 4, 2, 1, 10**6, "of each of 3 phases (fixed: all 3 are one); paper 120"),
    "lr": (0.01, 0.02, 0.36, 0, 1e3, "learning rate, times warm-up or cosine; paper 0.01"),
    "warmup": (5 / 120, 0.1, 0.1, 1e-9, 1, "share of a phase in which lr rises; paper silent"),
    "batch_size": (128, 128, 64, 1, 10**6, "images in an iteration; paper 128"),
    "sharpen": (1.0, 1.0, 1.0, 0.1, 10, "multiplies the teacher's logits; chapter 2 prints one"),
    "alpha": (5 / 6, 5 / 6, 5 / 6, 0, 1, "weight of attacked images in equation 2; RSLAD's 5/6"),
    "eps": (8.0, 8.0, 8.0, 0.2, 255, "change of a pixel, in 1/255: for 0.031 write 7.9; paper 8"),
    "step_size": (2.0, 2.0, 4.0, 0.02, 255, "of the attack, in 1/255: for 0.0078 write 2; paper 2"),
    "steps": (10, 10, 3, 1, 10**4, "of the training attack; paper 10"),
    "val_images": (1000, 1000, 100, 1, 10**6, "held-out training images, seen after each epoch"),
}
# fmt: on

KINDS = "width", "kernel", "depth", "expand"  # ResNet has no kernels, MobileNetV3 no widths

VARIES = {  # figure 4: the kinds of genes that vary in each of the three phases
    "progressive": [KINDS[:2], KINDS[:3], KINDS],
    "random": [KINDS] * 3,
    "fixed": [()],  # none, in one phase as long as the three
}


def main():
    args = read_flags(
        sampling={"choices": [*VARIES], "default": "progressive"},
        student={"help": "for --sampling fixed: a name in 01_students.csv or 05_best.csv"},
        start={
            "choices": ["teacher", "random"],
            "help": "first weights; default: teacher (fixed: random)",
        },
        teacher={"type": Path, "help": "another teacher: FILE.pt2, made by torch.export (README)"},
    )
    if (args.sampling == "fixed") != bool(args.student):
        fail("--sampling fixed and --student NAME go together")
    if args.teacher and args.teacher.stem == "teacher":  # ours, in the names of files
        fail(f"--teacher {args.teacher}: give it another name, as wrn.pt2")
    start = args.start or ("random" if args.student else "teacher")
    device, precision, where = pick_device(args)
    # Chapter 2's teacher is needed to teach, or for the first weights, or for both.
    ours = [] if args.teacher and start == "random" else ["02_teacher.pt"]
    run_missing(args, "01_images.pt", "01_dynamic_net.pt", *ours)
    data = moved(load(args.out / "01_images.pt", args.common), device)
    net = load(args.out / "01_dynamic_net.pt", args.common)
    source = load(args.out / "02_teacher.pt", net["settings"]) if ours else net
    batch = min(args.batch_size, len(data["train"]))
    batches = len(data["train"]) // batch  # of an epoch; an incomplete batch is left out
    phases = VARIES[args.sampling]
    epochs, epochs_of_phase = 3 * args.epochs, 3 * args.epochs // len(phases)
    if epochs % len(phases):
        fail(f"{epochs} epochs cannot be divided into {len(phases)} phases of one length")
    if batches * epochs_of_phase == 1:  # the last iteration's learning rate is 0
        fail("with one iteration nothing is learned: take more --epochs")
    base = named_student(args, net) if args.student else student_at(net, -1)  # what does not vary
    begin_with = source if start == "teacher" else net  # net has chapter 1's random weights
    if args.teacher:
        taught_by, mark = args.teacher.stem, checksum(args.teacher)
        teacher = exported_network(args.teacher, data["train"][:batch] / 255, net["classes"])
    else:
        # A copy, which does not learn. Its batch norms have each batch's statistics, as the
        # student's: so the largest student begins as the teacher, and what moves it is the method.
        taught_by, mark = "teacher", ""
        teacher = Network(net, moved(source["weights"], device), student_at(net, -1))
    settings = {**net["settings"], **args.settings, "start": start, "genotype": base}
    settings |= {"student": args.student or "largest", "teacher": f"{taught_by} {mark}"}
    file, following = f"03_{args.sampling}", f"04_predictor.py --sampling={args.sampling}"
    if args.student:
        file += f"_{args.student}_by_{taught_by}"
        following = f"{CHAPTERS[1]} --judge"
    checkpoint, state, log = (args.out / f"{file}{end}" for end in (".pt", ".state", "_log.csv"))
    if args.restart:
        checkpoint.unlink(missing_ok=True)
        state.unlink(missing_ok=True)
    if checkpoint.exists() and not state.exists():
        load(checkpoint, settings)  # exits if it is stale, or of other settings
        return finish(args, [], [f"{checkpoint} earlier (--restart makes it anew)"], following)
    shared = moved(begin_with["weights"], device, learn=True)
    optimizer = torch.optim.SGD(shared.values(), momentum=0.9, weight_decay=2e-4)  # 5.0.1
    rows = resume(state, settings, shared, optimizer)[0]
    shown = {"student": base}  # whose accuracies are logged
    if not args.student:  # "middle" takes the second choice of every gene
        shown = {"largest": base, "middle": student_at(net, 1), "smallest": student_at(net, 0)}
    args.attack = args.eps / 255, args.step_size / 255, args.steps
    print(f"RSLAD, {args.sampling} sampling, {epochs} epochs, on {where}")

    for epoch in range(len(rows), epochs):
        begun = time.monotonic()
        torch.manual_seed(args.seed * 10**6 + epoch)  # so stopping changes no draw
        rng = random.Random(f"{args.seed} {epoch}")
        phase, epoch_of_phase = divmod(epoch, epochs_of_phase)
        varies = phases[phase]  # figure 4
        if epoch_of_phase == 0:
            optimizer.state.clear()  # each phase has its own momentum, warm-up and cosine
            if "expand" in varies and phases.index(varies) == phase:  # random: not 3 times
                sort_channels(net, shared)  # once, before expansions vary
        order = torch.randperm(len(data["train"])).to(device)
        picks, losses = order.split(batch)[:batches], []
        for pick in counted(f"epoch {epoch + 1}:", picks, rounds=epochs - epoch):
            x = augment(data["train"][pick]) / 255
            student = draw(net, rng, varies, base)  # another one in each iteration
            network = Network(net, shared, student)
            with precision:
                with torch.no_grad():
                    target = (args.sharpen * teacher(x)).log_softmax(1)  # log T(x), (B, classes)
                natural_kl = kl(target, network(x))  # network(x) leaves batch-norm statistics of x

                # L_max of equation 2: the attack, on the student with the statistics of x, as left
                # above, in all steps. That is faster, and for what begins as the teacher as good;
                # from random weights see chapter 2. At a KL of 0 its gradient is 0: start near x.
                noise = 0.001 * torch.randn_like(x)
                x_adv = pgd(network.fold_norms(), x, lambda z: kl(target, z), noise, *args.attack)

                # L_min: the loss. Batch statistics, since running ones would mix students.
                adversarial_kl = kl(target, network(x_adv))
                loss = (1 - args.alpha) * natural_kl + args.alpha * adversarial_kl

            losses.append(torch.stack([loss, natural_kl, adversarial_kl]).detach())
            share = (epoch_of_phase + len(losses) / batches) / epochs_of_phase  # of the phase
            cosine = (1 + math.cos(math.pi * share)) / 2  # from 1 to 0 in each phase
            optimizer.param_groups[0]["lr"] = lr = args.lr * min(share / args.warmup, cosine)
            # Gradients flow through the slices into the shared weights (equation 3). SGD skips
            # layers that this student lacks, whose gradients are None; of the others what is
            # outside the slice moves, too, by momentum and decay.
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        row = {"epoch": epoch + 1, "lr": lr}
        row |= averages(losses, "loss", "natural_kl", "adversarial_kl")
        for name, shown_student in shown.items():
            network = Network(net, shared, shown_student)
            row[f"natural_{name}"], row[f"robust_{name}"] = accuracies(network, data, args)
        rows.append({**row, "seconds": time.monotonic() - begun})
        print(", ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()))
        write_csv(log, rows)
        momentum = optimizer.state_dict()
        save(state, settings, source, weights=shared, sgd=momentum, rows=rows, best={})
    save(checkpoint, settings, source, weights=moved(shared, "cpu"))
    state.unlink(missing_ok=True)
    table = [
        {
            "held-out images": name,
            "natural": rows[-1][f"natural_{name}"],
            f"PGD-{args.steps}": rows[-1][f"robust_{name}"],
        }
        for name in shown
    ]
    finish(args, table, [checkpoint, log], following)


def draw(net, rng, varies, base):
    """A student: genes of the kinds in `varies` at random, the others of `base`."""
    student = []
    for (gene, choices), kept in zip(net["genes"].items(), base):
        student.append(rng.choice(choices) if gene.split("_")[0] in varies else kept)
    return canonical(net, student)


def sort_channels(net, shared):
    """Order each block's middle channels by importance, so that smaller expansions keep the
    important ones. The largest network's function stays."""
    for block in [gene.removeprefix("expand_") for gene in net["genes"] if "expand" in gene]:
        if "kernel" in net:
            # reduce -> middle (-> squeeze -> excite) -> last: one order throughout, for a depthwise
            # layer keeps channels apart
            reorder(shared, block, ["reduce", "middle", "excite"], ["last", "squeeze"])
            if f"{block}_excite" in shared:
                reorder(shared, block, ["squeeze"], ["excite"])
        else:
            # reduce -> middle -> last: an order of the channels on each side of middle
            reorder(shared, block, ["middle"], ["last"])
            reorder(shared, block, ["reduce"], ["middle"])


ENDS = "", "_scale", "_shift", "_bias"  # the names of what a layer's output channels have


@torch.no_grad()
def reorder(shared, block, makers, readers):
    """Put the channels that `makers` make and `readers` read into the order of importance: the L1
    norm of the weights by which the first of the readers reads them."""
    importance = shared[f"{block}_{readers[0]}"].abs().sum((0, 2, 3))
    order = importance.argsort(descending=True)
    outputs = [f"{block}_{layer}{end}" for layer in makers for end in ENDS]
    for name in shared.keys() & outputs:
        shared[name].copy_(shared[name][order])
    for name in shared.keys() & [f"{block}_{layer}" for layer in readers]:
        shared[name].copy_(shared[name][:, order])


def exported_network(path, x, classes):  # exits if it does not give images x a logit per class
    logging.disable(logging.WARNING)  # torch.export would log a traceback
    try:
        network = torch.export.load(path).module().to(x.device)
        shape = tuple(network(x).shape)
    except Exception as error:  # of many kinds
        problem = f"of a newer torch, or not for {len(x)} such images: {str(error).splitlines()[0]}"
        fail(f"--teacher {path}: not what torch.export.save wrote, {problem}")
    if shape != (len(x), classes):
        fail(f"--teacher {path} answers {shape}, not the logits {(len(x), classes)}")
    return network


# ---- Attack, judging and going on, word for word as in chapter 2 ---------------------------------
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


def usable(path, settings):
    """What load() gives; nothing of a file that is not there, nor, with a line that says why, of
    one that is stale or not ours."""
    try:
        return load(path, settings) if path.exists() else None
    except SystemExit as problem:
        print(f"passed over: {problem}")


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
