"""Chapter 2: the robust teacher (paper, sections 4.1 and 4.4; TRADES, Zhang et al., 2019).

TRADES trains a network f to be right, and to answer an attacked image, each pixel changed by at
most eps, as it answers the original:

    for epoch, for batch of images x and labels y:
        x' = PGD from x, climbing KL(f(x) || f(x'))             # the maximum in equation 1
        loss = cross entropy(f(x), y) + beta KL(f(x) || f(x'))  # right, and the same under attack
        SGD step on the weights of f, the largest student
    keep the epoch with the largest natural + robust accuracy on held-out training images

An epoch is chosen because the robust accuracy of new images falls again late in adversarial
training, while that of training images still rises (Rice et al., 2020). Chapter 5 chooses a student
by the same sum. Test images are for final numbers only: this chapter's table 1.

Read first: pgd, trades_loss, main.

    python 02_teacher_trades.py --dataset cifar10    # the paper's schedule, on a GPU
    python 02_teacher_trades.py --student usual      # a row of table 1: TRADES of one student
    python 02_teacher_trades.py --judge              # table 1 of this folder; chapter 5 runs it

reads   01_images.pt, 01_dynamic_net.pt (made first if missing)
writes  02_teacher.pt, .csv        the best epoch's weights; a row for each epoch (or 02_usual...)
        table1.csv, student.pt2    with --judge; the students of chapter 5's searches, exported
"""

import argparse
import copy
import os
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
from torch.utils.flop_counter import FlopCounterMode

torch.backends.cudnn.allow_tf32 = False  # judging is in float32

STAGE = "02"
FLAGS = {  # flag: (paper, quick, tiny, least, most, help)
    "epochs": (300, 10, 5, 1, inf, "epochs of adversarial training; paper 300 (section 5.0.1)"),
    "lr": (0.01, 0.05, 0.15, 0, inf, "learning rate, before warm-up and cosine; paper 0.01"),
    "warmup": (5 / 300, 0.1, 0.2, 1e-9, 1, "share of the run in which lr rises; paper silent"),
    "batch_size": (128, 128, 64, 1, inf, "images in an iteration; paper 128"),
    "beta": (6.0, 6.0, 6.0, 0, inf, "weight of the robust term; TRADES' 6"),
    "eps": (8.0, 8.0, 8.0, 0.2, inf, "largest change of a pixel, in units of 1/255; paper 8"),
    "step_size": (2.0, 2.0, 4.0, 0.02, inf, "of the attack, in 1/255: scale it with eps; paper 2"),
    "steps": (10, 10, 3, 1, inf, "of the training attack; paper 10"),
    "val_images": (1000, 1000, 250, 1, inf, "held-out images, by which an epoch is chosen"),
}


# ---- The lesson: PGD and TRADES ------------------------------------------------------------------
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


def trades_loss(network, x, y, beta, attack):
    """The loss of images x (B, 3, 32, 32) in [0, 1] with labels y (B,), and its two parts by name;
    attack: (eps, step_size, steps), where 1 is white."""
    logits = network(x)
    log_f = logits.log_softmax(1)  # log f(x), (B, classes)
    # The attack. At x the KL and its gradient are zero, so it starts slightly off x. Batch norm has
    # the statistics of each step's own x', as in the loss below (chapter 3 freezes x's: faster).
    target, noise = log_f.detach(), 0.001 * torch.randn_like(x)
    x_adv = pgd(lambda z: kl(target, network(z)), x, noise, *attack)
    # The loss. Gradients flow through both sides of its KL.
    cross_entropy = F.cross_entropy(logits, y)
    robust_kl = kl(log_f, network(x_adv))
    loss = cross_entropy + beta * robust_kl
    return loss, {"cross_entropy": cross_entropy, "kl": robust_kl}


def kl(log_target, logits):
    """KL(target || softmax(logits)), mean over images; log_target, logits (B, classes)."""
    return F.kl_div(logits.log_softmax(1), log_target, reduction="batchmean", log_target=True)


def main():
    names = ["largest", "middle", "smallest", "usual"]  # chapter 1 says what they are
    args = read_flags(
        student={"default": "largest", "choices": names, "help": "to train; largest: the teacher"},
        judge={"action": "store_true", "help": "train nothing: table 1 of what is in the folder"},
    )
    run_missing(args, "01_dynamic_net.pt")
    device = torch.device(args.device)
    # {train, held_out, test, calibration}: uint8 (N, 3, 32, 32); {...}_labels: (N,)
    data = moved(load(args.out / "01_images.pt", args.common)["data"], device)
    if args.judge:
        return table1(args, data)
    source = load(args.out / "01_dynamic_net.pt", args.common)
    net, settings = source["net"], source["settings"] | args.settings
    student = net["students"][args.student]
    name = "teacher" if args.student == "largest" else args.student
    checkpoint = args.out / f"02_{name}.pt"
    made = resume(checkpoint, settings)
    rows, best = made["rows"], made.get("best")  # best: weights of the best epoch
    shared = moved(made.get("weights", source["weights"]), device, learn=True)
    optimizer = torch.optim.SGD(shared.values(), momentum=0.9, weight_decay=2e-4)  # 5.0.1
    if "sgd" in made:
        optimizer.load_state_dict(made["sgd"])
    batch = min(args.batch_size, len(data["train"]))
    batches = len(data["train"]) // batch  # of an epoch; an incomplete one is left out
    held_out = [data[part][: args.val_images] for part in ("held_out", "held_out_labels")]
    attack = args.eps / 255, args.step_size / 255, args.steps
    total = lambda row: row["natural"] + row["robust"]  # chooses an epoch
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    print(f"TRADES, {name}, {args.epochs} epochs, on {device} in {'bf16' if bf16 else 'float32'}")

    for epoch in range(len(rows), args.epochs):
        start, losses = time.monotonic(), []
        torch.manual_seed(args.seed * 10**6 + epoch)  # so a run that is resumed draws the same
        picks = torch.randperm(len(data["train"])).to(device).split(batch)[:batches]
        for pick in counted(f"epoch {epoch + 1}:", picks, rounds=args.epochs - epoch):
            x, y = augment(data["train"][pick]) / 255, data["train_labels"][pick]
            network = Network(net, shared, student)  # f: slices of the weights as they are now
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss, parts = trades_loss(network, x, y, args.beta, attack)
            losses.append(torch.stack([loss, *parts.values()]).detach())
            share = (epoch + len(losses) / batches) / args.epochs  # of the run
            lr = args.lr * min(share / args.warmup, (1 + cos(pi * share)) / 2)  # up, then a cosine
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        means = torch.stack(losses).mean(0).tolist()
        if not isfinite(means[0]):
            sys.exit("the loss is not finite: use a lower --lr")
        row = {"epoch": epoch + 1, "lr": lr, **dict(zip(["loss", *parts], means))}
        network = calibrated(Network(net, shared, student), data["calibration"])
        row["natural"], row["robust"] = judge(network, *held_out, *attack)
        rows.append({**row, "seconds": time.monotonic() - start})
        if total(rows[-1]) == max(map(total, rows)):  # of equal ones the latest
            best = moved(shared, "cpu")
        print(", ".join(f"{key} {value:.4g}" for key, value in rows[-1].items()), flush=True)
        training = {"weights": shared, "sgd": optimizer.state_dict(), "best": best}
        save(checkpoint.with_suffix(".state"), settings, **training, rows=rows)

    save(checkpoint, settings, net=net, weights=best, students={args.student: student}, rows=rows)
    checkpoint.with_suffix(".state").unlink(missing_ok=True)
    rows = load(checkpoint, settings)["rows"]  # the file's, if another job was faster
    write_csv(checkpoint.with_suffix(".csv"), rows)
    following = CHAPTERS[3] if name == "teacher" else f"{CHAPTERS[2]} --judge"
    table = [max(reversed(rows), key=total)]
    finish(args, table, [checkpoint, checkpoint.with_suffix(".csv")], following)


# ---- Judging: batch norms with statistics of the student's own, and the attack -------------------
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


# ---- Table 1: all that is in the folder, on the test images --------------------------------------
def table1(args, data):
    """Judge on the test images (section 5.4) the students of all files of the folder, by FGSM, one
    step of eps, and PGD-20, 20 of eps / 4; export those that searches chose (05_*.pt)."""
    rows, exported, labels, eps = [], [], data["test_labels"], args.eps / 255
    share = labels.bincount().max().item() / len(labels)
    print(f"table 1: {len(labels)} test images, {share:.0%} of the largest class")
    for path in sorted(args.out.glob("0[235]_*.pt")):
        try:
            made = load(path, args.common)
        except SystemExit as problem:  # it is of other images, or rests on another teacher
            print(f"left out: {problem}")
            continue
        for name, student in made["students"].items():
            print(f"  {path.stem}, {name}, in float32", flush=True)
            network = Network(made["net"], moved(made["weights"], labels.device), student)
            judged = calibrated(network, data["calibration"])
            with FlopCounterMode(display=False) as counter:
                judged(data["test"][:1] / 255)
            row = {"file": path.stem, "student": name, "eps": args.eps}
            row["params"] = sum(part.numel() for part in network.slices.values())  # not folded
            row["macs"] = counter.get_total_flops() // 2
            test = judged, data["test"], labels
            row["natural"], row["fgsm"] = judge(*test, eps, eps, 1)
            row["pgd20"] = judge(*test, eps, eps / 4, 20)[1]
            rows.append(row)
            if path.stem.startswith("05_search"):
                exported.append(args.out / f"student{path.stem.removeprefix('05_search')}.pt2")
                export(judged, made["net"]["classes"], exported[-1])
    if not rows:
        sys.exit(f"nothing to judge in {args.out}: {CHAPTERS[2]} trains a teacher")
    write_csv(args.out / "table1.csv", rows)
    finish(args, rows, [args.out / "table1.csv", *exported])


def export(network, classes, path):
    """Write a judged student as a network that needs none of this code, from (B, 3, 32, 32) in
    [0, 1] to logits; the lines of its extra file `names` are the classes, in their order."""
    module, network = torch.nn.Module(), copy.copy(network)
    weights = {name: part.contiguous() for name, part in moved(network.slices, "cpu").items()}
    # Channels first, and parameters, so that .to("cuda") moves them.
    module.weights = network.slices = torch.nn.ParameterDict(weights).requires_grad_(False)
    module.forward = network.__call__
    shapes, x = ({0: torch.export.Dim("batch")},), torch.zeros(2, 3, 32, 32)
    program = torch.export.export(module, (x,), dynamic_shapes=shapes, strict=False)
    torch.export.save(program, path, extra_files={"names": "\n".join(classes)})


# ---- Speed only: the attack's gradient as a CUDA graph -------------------------------------------
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


# ---- Training: progress, learning rate, resuming -------------------------------------------------
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


# ==== Nothing below is new: the same text as in earlier chapters, held equal by a test ============
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
