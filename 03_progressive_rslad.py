"""Chapter 3: progressive adversarial robustness distillation (paper, section 4.4).

    shared = teacher's weights                                # the teacher itself stays as it is
    for what varies in (widths), (widths, depths), (widths, depths, expansions):       # figure 4
        for epoch, for batch x:
            student = random choices of what varies, the largest of the rest
            x' = PGD from x, climbing KL(teacher(x) || student(x'))
            loss = (1 - alpha) KL(teacher(x) || student(x)) + alpha KL(teacher(x) || student(x'))
            one SGD step on the layers that the student uses                      # equation 2
                                  # (equation 3: the least mean of this loss over all students)

The order is the paper's idea: weights that many students share are learned while students are still
large; small ones come last, and inherit weights that work. Dyn-MobileNetV3 varies kernels in place
of widths. The loss is RSLAD's (Zi et al., 2021): to x and to x' the student should answer as the
teacher answers x. That answer is robust already, and says more than the label does.

What came out on the tiny network (README): the order won nothing over random sampling that starts
from the teacher's weights, too; what is inherited counts, not when. Random sampling from random
weights, on half of the passes at a lower rate, as the released code runs it, is far below both.

Read first: rslad_loss, draw, main.

    python 03_progressive_rslad.py --dataset cifar10     # the paper's schedule, on a GPU
    python 03_progressive_rslad.py --sampling random     # the paper's baseline: all genes vary
    python 03_progressive_rslad.py --sampling scratch    # the released code's: from random weights
    python 03_progressive_rslad.py --student usual       # RSLAD of one student, from random weights

reads   01_images.pt, 02_teacher.pt (random weights: 01_dynamic_net.pt); made first if missing
writes  03_progressive.pt, .csv (03_random..., 03_usual...)    weights; a row for each epoch
"""

import argparse
import copy
import os
import random
import signal
import subprocess
import sys
import time
from math import cos, inf, isfinite, pi
from pathlib import Path
from secrets import token_hex
from zlib import crc32

import torch
import torch.nn.functional as F

torch.backends.cudnn.allow_tf32 = False  # judging is in float32

STAGE = "03"
FLAGS = {  # flag: (paper, quick, tiny, least, most, help)
    "epochs": (120, 4, 2, 1, inf, "of each of 3 phases (--student: one, as long as 3); paper 120"),
    "lr": (0.01, 0.02, 0.36, 0, inf, "learning rate, before warm-up and cosine; paper 0.01"),
    "warmup": (5 / 120, 0.1, 0.1, 1e-9, 1, "share of a phase in which lr rises; paper silent"),
    "batch_size": (128, 128, 64, 1, inf, "images in an iteration; paper 128"),
    "alpha": (5 / 6, 5 / 6, 5 / 6, 0, 1, "weight of attacked images in equation 2; RSLAD's 5/6"),
    "eps": (8.0, 8.0, 8.0, 0.2, inf, "largest change of a pixel, in units of 1/255; paper 8"),
    "step_size": (2.0, 2.0, 4.0, 0.02, inf, "of the attack, in 1/255: scale it with eps; paper 2"),
    "steps": (10, 10, 3, 1, inf, "of the training attack; paper 10"),
    "val_images": (1000, 1000, 100, 1, inf, "held-out images, for the log only"),
}

KINDS = "width", "kernel", "depth", "expand"  # ResNet has no kernels, MobileNetV3 no widths

VARIES = {  # figure 4: the kinds of genes that vary in each phase
    "progressive": [KINDS[:2], KINDS[:3], KINDS],
    "random": [KINDS] * 3,  # the paper's baseline, from the teacher's weights
    "scratch": [KINDS] * 3,  # the released code's baseline, from random weights
}


# ---- The lesson: robustness distillation of random students --------------------------------------
def rslad_loss(network, teacher, x, alpha, attack):
    """Equation 2: the loss of images x (B, 3, 32, 32) in [0, 1], and its two parts by name; attack:
    (eps, step_size, steps), where 1 is white."""
    with torch.no_grad():
        log_t = teacher(x).log_softmax(1)  # log T(x), (B, classes)
    natural_kl = kl(log_t, network(x))  # the network keeps the batch-norm statistics of this batch
    # L_max: the attack. In all its steps batch norm has the statistics of x, which is faster than
    # each step's own, and as good (measured: students 0.06 / 0.01 points better). It starts a bit
    # off x, because a student that answers as the teacher has no gradient there.
    frozen, noise = fold_norms(network), 0.001 * torch.randn_like(x)
    x_adv = pgd(lambda z: kl(log_t, frozen(z)), x, noise, *attack)
    # L_min: the loss. Batch norm has the batch's statistics, as the teacher has: running averages
    # would mix those of different students.
    adversarial_kl = kl(log_t, network(x_adv))
    loss = (1 - alpha) * natural_kl + alpha * adversarial_kl
    return loss, {"natural_kl": natural_kl, "adversarial_kl": adversarial_kl}


def draw(net, rng, varies, base):
    """A student: genes of the kinds in `varies` at random, the others as in `base`."""
    genes = [gene for gene in net["genes"] if gene.split("_")[0] in varies]
    return canonical(net, base | {gene: rng.choice(net["genes"][gene]) for gene in genes})


def main():
    names = ["largest", "middle", "smallest", "usual"]  # chapter 1 says what they are
    args = read_flags(student={"choices": names, "help": "only this one, from random weights"})
    if args.student and args.sampling != "progressive":
        sys.exit("--sampling draws many students, --student is one: use one of them")
    run_missing(args, "01_dynamic_net.pt", "02_teacher.pt")
    device = torch.device(args.device)
    data = moved(load(args.out / "01_images.pt", args.common)["data"], device)
    teacher_file = load(args.out / "02_teacher.pt", args.common)
    net, settings = teacher_file["net"], teacher_file["settings"] | args.settings
    # logged: students that are judged after each epoch; in_table1: by chapter 2, in the end
    if args.student:
        run, phases = args.student, [()]  # one phase, in which nothing varies
        logged = in_table1 = [args.student]
    else:
        run, phases = args.sampling, VARIES[args.sampling]
        logged, in_table1 = ["largest", "middle", "smallest"], ["largest", "usual"]
    base = net["students"][args.student or "largest"]  # it has the genes that do not vary
    sorting_phase = next((i for i, kinds in enumerate(phases) if "expand" in kinds), None)
    start_weights = teacher_file["weights"]
    if args.student or args.sampling == "scratch":  # random ones
        start_weights = load(args.out / "01_dynamic_net.pt", args.common)["weights"]
    # A copy that does not learn. Its batch norm has each batch's statistics, as the student's has:
    # so the largest student begins as the teacher, and only the method moves it.
    teacher = Network(net, moved(teacher_file["weights"], device), net["students"]["largest"])
    checkpoint = args.out / f"03_{run}.pt"
    made = resume(checkpoint, settings)
    rows, shared = made["rows"], moved(made.get("weights", start_weights), device, learn=True)
    optimizer = torch.optim.SGD(shared.values(), momentum=0.9, weight_decay=2e-4)  # 5.0.1
    if "sgd" in made:
        optimizer.load_state_dict(made["sgd"])
    batch = min(args.batch_size, len(data["train"]))
    batches = len(data["train"]) // batch  # of an epoch; an incomplete one is left out
    epochs, epochs_of_phase = 3 * args.epochs, 3 * args.epochs // len(phases)
    held_out = [data[part][: args.val_images] for part in ("held_out", "held_out_labels")]
    attack = args.eps / 255, args.step_size / 255, args.steps
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    print(f"RSLAD, {run}, {epochs} epochs, on {device} in {'bf16' if bf16 else 'float32'}")

    for epoch in range(len(rows), epochs):
        start, losses = time.monotonic(), []
        phase, epoch_of_phase = divmod(epoch, epochs_of_phase)
        if epoch_of_phase == 0:
            optimizer.state.clear()  # each phase has its own momentum, warm-up and cosine
            if phase == sorting_phase:
                sort_channels(net, shared)
        torch.manual_seed(args.seed * 10**6 + epoch)  # so a run that is resumed draws the same
        picks = torch.randperm(len(data["train"])).to(device).split(batch)[:batches]
        rng = random.Random(f"{args.seed} {epoch}")
        for pick in counted(f"epoch {epoch + 1}:", picks, rounds=epochs - epoch):
            x = augment(data["train"][pick]) / 255
            student = draw(net, rng, phases[phase], base)  # another one in each iteration
            network = Network(net, shared, student)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, parts = rslad_loss(network, teacher, x, args.alpha, attack)
            losses.append(torch.stack([loss, *parts.values()]).detach())
            share = (epoch_of_phase + len(losses) / batches) / epochs_of_phase  # of the phase
            lr = args.lr * min(share / args.warmup, (1 + cos(pi * share)) / 2)  # up, then a cosine
            optimizer.param_groups[0]["lr"] = lr
            # Gradients flow through the slices into the shared weights: this student's stands for
            # the mean over all (equation 3). Layers that it lacks have none, and stay. What lies
            # outside its slices has a gradient of zero, and still moves: by the momentum of earlier
            # students, and by weight decay.
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        means = torch.stack(losses).mean(0).tolist()
        if not isfinite(means[0]):
            sys.exit("the loss is not finite: use a lower --lr")
        row = {"epoch": epoch + 1, "lr": lr, **dict(zip(["loss", *parts], means))}
        for name in logged:
            network = Network(net, shared, net["students"][name])
            right = judge(calibrated(network, data["calibration"]), *held_out, *attack)
            row[f"natural_{name}"], row[f"robust_{name}"] = right
        rows.append({**row, "seconds": time.monotonic() - start})
        print(", ".join(f"{key} {value:.4g}" for key, value in rows[-1].items()), flush=True)
        training = {"weights": shared, "sgd": optimizer.state_dict()}
        save(checkpoint.with_suffix(".state"), settings, **training, rows=rows)

    # The last epoch is kept: which one is best differs from student to student.
    weights, students = moved(shared, "cpu"), {name: net["students"][name] for name in in_table1}
    save(checkpoint, settings, net=net, weights=weights, students=students, rows=rows)
    checkpoint.with_suffix(".state").unlink(missing_ok=True)
    rows = load(checkpoint, settings)["rows"]  # the file's, if another job was faster
    write_csv(checkpoint.with_suffix(".csv"), rows)
    table = []
    for name in logged:
        right = {key: rows[-1][f"{key}_{name}"] for key in ("natural", "robust")}
        table.append({"held out": name, **right})
    following = f"{CHAPTERS[2]} --judge" if args.student else CHAPTERS[4]
    finish(args, table, [checkpoint, checkpoint.with_suffix(".csv")], following)


def sort_channels(net, shared):
    """Order the channels inside each block by importance; the largest network's answers stay the
    same. A smaller expansion keeps the leading ones. The channels that a width cuts cannot be
    sorted: shortcuts tie the blocks of a stage together, and one order would have to suit all. But
    widths vary first, so that the leading ones learn to be important."""
    for block in [gene.removeprefix("expand_") for gene in net["genes"] if "expand" in gene]:
        if "kernel" in net:
            # reduce -> middle (-> squeeze -> excite) -> last: one order throughout, because a
            # depthwise layer keeps channels apart
            reorder(shared, block, ["reduce", "middle", "excite"], ["last", "squeeze"])
            if f"{block}_excite" in shared:
                reorder(shared, block, ["squeeze"], ["excite"])
        else:
            # reduce -> middle -> last: the channels on each side of middle have their own order
            reorder(shared, block, ["middle"], ["last"])
            reorder(shared, block, ["reduce"], ["middle"])


@torch.no_grad()
def reorder(shared, block, makers, readers):
    """Put the channels that `makers` make and `readers` read into the order of importance: the L1
    norm of the first reader's weights for each (released code)."""
    importance = shared[f"{block}_{readers[0]}"].abs().sum((0, 2, 3))
    order = importance.argsort(descending=True)
    for maker in makers:
        for end in ("", "_scale", "_shift", "_bias"):  # all that an output channel has
            name = f"{block}_{maker}{end}"
            if name in shared:
                shared[name].copy_(shared[name][order])
    for name in [f"{block}_{reader}" for reader in readers]:
        if name in shared:
            shared[name].copy_(shared[name][:, order])


# ==== Nothing below is new: the same text as in earlier chapters, held equal by a test ============
# ---- The attack, judging, and bookkeeping, as in chapter 2 ---------------------------------------
def pgd(loss, x, noise, eps, step_size, steps):
    """Projected gradient ascent (Madry et al., 2018), the maximum in equation 1: images x' of a
    large loss(x'), with |x' - x| <= eps in each pixel and 0 <= x' <= 1."""
    x_adv, gradient = (x + noise).clamp(0, 1), gradient_of(loss)
    for _ in range(steps):
        x_adv = x_adv + step_size * gradient(x_adv).sign()  # up, by the same in each pixel
        x_adv = (x + (x_adv - x).clamp(-eps, eps)).clamp(0, 1)  # back to within eps, and to [0, 1]
    return x_adv


def gradient_of(loss):
    """A function of images x: the gradient of loss(x) with respect to them; weights get none."""

    def gradient(x):
        x = x.detach().requires_grad_()
        with torch.enable_grad():  # even while judging
            return torch.autograd.grad(loss(x), x)[0]

    return Replayed(gradient)  # the same as gradient; on a GPU faster


def kl(log_target, logits):
    """KL(target || softmax(logits)), mean over images; log_target, logits (B, classes)."""
    return F.kl_div(logits.log_softmax(1), log_target, reduction="batchmean", log_target=True)


@torch.no_grad()
def fold_norms(network):
    """A copy with batch norms frozen at `stats`. They become part of the convolutions, which is
    faster: a frozen one is a scale and a shift."""
    frozen = copy.copy(network)
    frozen.slices, frozen.folded = {**network.slices}, True
    for name, (mean, variance) in network.stats.items():
        scale, shift = (frozen.slices.pop(f"{name}_{part}") for part in ("scale", "shift"))
        factor = scale / (variance + 1e-5).sqrt()
        frozen.slices[name] = factor[:, None, None, None] * network.slices[name]
        frozen.slices[f"{name}_bias"] = shift - mean * factor
    return frozen


@torch.no_grad()
def calibrated(network, images):
    """The student as it is judged and exported: batch norms frozen at its own statistics, of uint8
    images (N, 3, 32, 32). What reaches a layer depends on the student: another's would be wrong."""
    network.batches = 0  # its earlier statistics do not count
    for x in images.chunk(-(-len(images) // 250)):  # equal batches, of at most 250
        network(x / 255)
    return fold_norms(network)


@torch.no_grad()
def judge(network, images, labels, eps, step_size, steps, batch=100):
    """[natural, robust] accuracy, shares of 1: of uint8 images (N, 3, 32, 32) those that are right,
    and those still right after PGD on the cross-entropy. Every image gets the same noise at first,
    so batches do not matter; with one step (FGSM) it gets none."""
    noise = 2 * torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1
    noise = noise.to(images.device) * (eps if steps > 1 else 0)
    right = []
    for x, y in zip(images.split(batch), labels.split(batch)):
        x = x / 255
        x_adv = pgd(lambda z: F.cross_entropy(network(z), y), x, noise, eps, step_size, steps)
        natural = network(x).argmax(1) == y
        right.append(torch.stack([natural, natural & (network(x_adv).argmax(1) == y)]))
    return torch.cat(right, 1).double().mean(1).tolist()


class Replayed:
    """function(x); on a GPU its second call is recorded as a CUDA graph, which later ones replay:
    one launch in place of a thousand. Without it attacks are the same, up to rounding. What Python
    decides inside (the student, .item()) is frozen: each attack records anew, in the same memory.
    """

    last = None  # the stream to record on, and the last graph

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, x):
        self.calls += 1
        if self.calls == 1 or not x.is_cuda:
            return self.function(x)
        if self.calls == 2:
            stream, last = Replayed.last or (torch.cuda.Stream(x.device), None)
            self.x, self.graph = x.clone(), torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(stream):
                self.graph.capture_begin(pool=last.pool() if last else None)
                self.output = self.function(self.x)
                self.graph.capture_end()
            torch.cuda.current_stream(x.device).wait_stream(stream)
            Replayed.last = stream, self.graph
        self.x.copy_(x)
        self.graph.replay()
        return self.output


def counted(name, items, rounds=1):
    """The items; every ten seconds it prints how many are done, and the time left for `rounds`."""
    start = last = time.monotonic()
    for i, item in enumerate(items):
        if time.monotonic() - last > 10:
            last = time.monotonic()
            left = (last - start) / i * (rounds * len(items) - i) / 60
            print(f"  {name} {i}/{len(items)}, {left:.1f} minutes left", flush=True)
        yield item


def resume(checkpoint, settings):
    """What the checkpoint holds, or else the state of a run that was stopped, or no rows yet."""
    state = checkpoint.with_suffix(".state")
    if checkpoint.exists():
        print(f"{checkpoint} is finished (delete it to redo it)")
        return load(checkpoint, settings)
    if state.exists():
        print(f"resuming {state}")
        return load(state, settings)
    return {"rows": []}


def moved(tensors, device, learn=False):
    """Copies of a dictionary's tensors on the device, with gradients if they are to learn."""
    return {k: t.detach().to(device, copy=True).requires_grad_(learn) for k, t in tensors.items()}


def run_missing(args, *files):
    """For each file: if it and all later ones are missing, run its chapter."""
    for i, name in enumerate(files):
        if not any((args.out / later).exists() for later in files[i:]):
            run_chapter(args, CHAPTERS[int(name[:2])])


def run_chapter(args, script, *flags):
    print(f"running {script}\n", flush=True)
    script = Path(__file__).resolve().with_name(script)
    if subprocess.run([sys.executable, script, *args.given, *flags]).returncode:
        sys.exit(f"{script.name} was not finished")


# ---- The network and images, as in chapter 1 -----------------------------------------------------
def divisible(channels):
    """The nearest multiple of 8 that is at least 8 and not below 90 % of `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class Network:
    """A student: logits (B, classes) = network(x) of images x (B, 3, 32, 32) in [0, 1]. Its weights
    are leading slices of the shared ones, cut at the first call; gradients flow back through them.
    After an SGD step, make a new Network. It owns no weights, so it is no nn.Module."""

    def __init__(self, net, shared, student):
        self.net, self.shared, self.student = net, shared, student
        self.mobile = "kernel" in net
        self.slices = {}  # {layer: the part of its shared weight that this student uses}
        self.stats = {}  # {layer: (mean, variance) of its outputs}, averages over all batches
        self.batches = 0  # how many those are
        self.folded = False  # are batch norms part of the convolutions? (fold_norms, chapter 2)

    def slice(self, name, out, inputs=None, kernel=1):
        """The leading slice of a weight (out, inputs, kernel, kernel), or of a vector (out,)."""
        weight = self.shared[name][:out]  # of all outputs the first
        if inputs is None:
            return weight
        weight = weight[:, :inputs]  # of all inputs the first
        weight = smaller_kernel(self.shared, name, weight, kernel)  # if one is asked for
        return weight.contiguous(memory_format=torch.channels_last)

    def weight(self, name, out, inputs=None, kernel=1):
        """The slice, cut at the first call and kept."""
        if name not in self.slices:
            with torch.enable_grad():  # so it can learn even if the first call was without
                self.slices[name] = self.slice(name, out, inputs, kernel)
        return self.slices[name]

    def conv(self, name, x, out, kernel=1, stride=1, depthwise=False, bias=False):
        """A convolution to `out` channels; in a depthwise one each channel reads only itself."""
        inputs, groups = (1, out) if depthwise else (x.shape[1], 1)
        weight = self.weight(name, out, inputs, kernel)
        shift = self.weight(f"{name}_bias", out) if bias else None
        return F.conv2d(x, weight, shift, stride, kernel // 2, groups=groups)

    def conv_bn(self, name, x, out, kernel=1, stride=1, depthwise=False):
        """A convolution and its batch norm, with the batch's statistics; folded, only a bias."""
        x = self.conv(name, x, out, kernel, stride, depthwise, bias=self.folded)
        if self.folded:
            return x
        scale, shift = self.weight(f"{name}_scale", out), self.weight(f"{name}_shift", out)
        if name not in self.stats:
            self.stats[name] = scale.new_zeros(2, out)
        mean, variance = self.stats[name]
        share = 1 / self.batches  # of this batch in the mean over all, which is updated in place
        return F.batch_norm(x, mean, variance, scale, shift, training=True, momentum=share)

    def __call__(self, x):
        net, student = self.net, self.student
        self.batches += 1
        x = x.contiguous(memory_format=torch.channels_last)  # a fifth faster than channels first
        if self.mobile:
            x = F.hardswish(self.conv_bn("stem", x, net["stem"], 3, net["stem_stride"]))
            y = F.relu_(self.conv_bn("0_1_middle", x, net["stem"], 3, depthwise=True))
            x = x + self.conv_bn("0_1_last", y, net["stem"])  # block 0_1 has no genes
        else:
            mid = divisible(divisible(net["stem"] * student["width_mid"]) // 2)  # released code
            x = F.relu_(self.conv_bn("stem_1", x, mid, 3, net["stem_stride"]))
            if student["depth_stem"]:
                x = x + F.relu_(self.conv_bn("stem_2", x, mid, 3))
            out = divisible(net["stem"] * student["width_stem"])
            x = F.relu_(self.conv_bn("stem_3", x, out, 3))
        for i, (channels, blocks, stride, activation, gated) in enumerate(net["stages"], 1):
            out = divisible(channels * student.get(f"width_{i}", 1))
            for j in range(1, blocks + student[f"depth_{i}"] + 1):
                x = self.block(f"{i}_{j}", x, out, stride, getattr(F, activation), gated)
                stride = 1  # of the blocks that follow
        if self.mobile:
            x = F.hardswish(self.conv_bn("head_1", x, net["head"][0]))
            x = F.hardswish(self.conv("head_2", x.mean((2, 3), keepdim=True), net["head"][1]))
        x = x.mean((2, 3), keepdim=True)  # (B, channels, 1, 1), as MobileNet's is already
        logits = self.conv("classifier", x, len(net["classes"]), bias=True).flatten(1)
        return logits.float()  # a loss is in float32, even where convolutions are in bf16

    def block(self, name, x, out, stride, act, gated):
        """A bottleneck (ResNet) or an inverted one (MobileNet): 1x1, k x k, 1x1, and a shortcut."""
        kernel = self.student.get(f"kernel_{name}", 3)  # ResNet: always 3
        wide = x.shape[1] if self.mobile else out
        middle = divisible(round(wide * self.student[f"expand_{name}"]))
        y = act(self.conv_bn(f"{name}_reduce", x, middle))
        y = act(self.conv_bn(f"{name}_middle", y, middle, kernel, stride, depthwise=self.mobile))
        if gated:  # squeeze-and-excitation
            gate, squeezed = y.mean((2, 3), keepdim=True), divisible(middle // 4)
            gate = F.relu_(self.conv(f"{name}_squeeze", gate, squeezed, bias=True))
            y = y * F.hardsigmoid(self.conv(f"{name}_excite", gate, middle, bias=True))
        y = self.conv_bn(f"{name}_last", y, out)
        if self.mobile:
            return x + y if x.shape == y.shape else y
        if name.endswith("_1"):  # the first block of a stage changes the shape
            x = self.conv_bn(f"{name}_shortcut", F.avg_pool2d(x, stride), out)
        return F.relu_(x + y)


def smaller_kernel(shared, name, weight, kernel):
    """A depthwise kernel of 5 or 3 is the centre of the next larger one, times a learned matrix."""
    while weight.shape[-1] > kernel:
        side = weight.shape[-1] - 2
        centre = weight[:, 0, 1:-1, 1:-1].flatten(1)  # (out, side * side)
        weight = (centre @ shared[f"{name}_to{side}"]).view(-1, 1, side, side)
    return weight


def canonical(net, student):
    """The genotype with 0 for each gene of a block that its depth switches off, so that a network
    has one genotype (more only where channel rounding merges choices)."""
    off = [gene for gene, (depth, least) in net["switches"].items() if student[depth] < least]
    return student | dict.fromkeys(off, 0)


def augment(images):
    """Images (B, 3, 32, 32), each randomly cropped (4 black pixels around it) and flipped."""
    count, device = len(images), images.device
    crops = F.pad(images, (4, 4, 4, 4)).unfold(2, 32, 1).unfold(3, 32, 1)  # (B, 3, 9, 9, 32, 32)
    row, column = torch.randint(9, (2, count), device=device)
    x = crops[torch.arange(count, device=device), :, row, column]
    return torch.where(torch.rand(count, 1, 1, 1, device=device) < 0.5, x.flip(3), x)


# ---- Files and flags, the same in every chapter --------------------------------------------------
def save(path, settings, **content):
    """Write what load() reads, whole or not at all. Another job may have written it by now: exits
    if its settings differ, and keeps a finished file (.pt) as it is."""
    if path.exists():
        load(path, settings, sources=False)  # may exit
        if path.suffix == ".pt":
            return
    temporary = path.with_name(f"{path.name}.{token_hex(8)}.tmp")
    try:
        with open(temporary, "wb") as file:  # given a path, torch.save would store its name
            torch.save({"settings": settings, **content}, file)
            file.flush()
            os.fsync(file.fileno())  # else a power cut after the renaming could leave an empty file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # if it was stopped before


def load(path, settings, sources=True):
    """What save() wrote. Its settings are all flags, and the checksums of all files, that led to
    it; exits if a flag differs from `settings`, or (sources) a checksum from the folder's."""
    content, expected = torch.load(path, map_location="cpu", weights_only=True), {**settings}
    for source in path.parent.glob("*.pt") if sources else ():
        if source.name in content["settings"]:
            expected[source.name] = crc32(source.read_bytes())
    for name, value in expected.items():
        old = content["settings"].get(name)
        if old != value:
            sys.exit(f"{path}: {name} was {old}, is {value}: delete the file, or use another --out")
    content["settings"][path.name] = crc32(path.read_bytes())  # for what is made from it
    return content


def write_csv(path, rows):
    lines = [rows[0].keys(), *(row.values() for row in rows)]  # names and numbers have no commas
    path.write_text("".join(",".join(map(str, line)) + "\n" for line in lines))


NAMES = "01_dynamic_net 02_teacher_trades 03_progressive_rslad 04_predictor 05_nsga2".split()

CHAPTERS = {int(name[:2]): f"{name}.py" for name in NAMES}

COMMON = {  # flags of every chapter, which it passes on to those that it runs
    "dataset": {"default": "cifar10", "help": "cifar10, cifar100, toy, or a folder of images"},
    "net": {"default": "resnet50", "choices": ["resnet50", "mbv3"]},
    "preset": {"choices": ["paper", "quick", "tiny"], "help": "default: paper, for toy tiny"},
    "sampling": {"default": "progressive", "choices": ["progressive", "random", "scratch"]},
    "out": {"type": Path, "help": "folder; default: runs/<dataset>-<net>-<preset>-seed<seed>"},
    "seed": {"default": 0, "type": int},
    "device": {"default": "cuda" if torch.cuda.is_available() else "cpu"},
}


def read_flags(**others):
    """All flags; those `given`, to pass on; `common` and `settings`, which files are made with."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = sys.exit  # a bad flag: one line
    for flag, (*values, least, most, text) in FLAGS.items():
        others[flag] = {"type": type(values[0]), "help": f"{text}; presets {values}"}
    for flag, options in {**COMMON, **others}.items():
        parser.add_argument(f"--{flag.replace('_', '-')}", **options)
    args = parser.parse_args()
    flags = vars(args)
    args.given = [f"--{f}={flags[f]}" for f in COMMON if flags[f] != parser.get_default(f)]
    args.preset = args.preset or ("tiny" if args.dataset == "toy" else "paper")
    for flag, (*values, least, most, text) in FLAGS.items():
        if flags[flag] is None:
            flags[flag] = values[COMMON["preset"]["choices"].index(args.preset)]
        if not least <= flags[flag] <= most:
            sys.exit(f"{flag} is {flags[flag]}, not {least} to {most}: {text}")
    args.settings = {f"{STAGE} {flag}": flags[flag] for flag in FLAGS}
    args.common = {name: flags[name] for name in ("dataset", "net", "preset", "seed")}
    folder = f"{Path(args.dataset).name}-{args.net}-{args.preset}-seed{args.seed}"
    args.out = args.out or Path("runs", folder)
    return args


def finish(args, rows, wrote, following=""):
    """Print a table, the files that were written, and the next command."""
    for line in [*rows[:1], *(row.values() for row in rows)]:  # a dict stands for its keys
        print(*(format(cell, ">14.4g" if isinstance(cell, float) else ">14") for cell in line))
    print("files:", *wrote)
    if following:
        print("next: python", following, *args.given)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a chapter that it runs, too
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped: the same command resumes")
