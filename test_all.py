"""Tests of the five chapters: `pytest test_all.py`, about three minutes on two idle CPU cores.

The chain runs first, as a user runs it, on toy, with both networks; its results are looked at last.
Beside it the method is held against oracles: textbook losses, closed forms, brute force, counts of
the authors' networks. Then what can go wrong: stops, files that do not belong together, bad flags.
"""

import ast
import contextlib
import csv
import importlib
import io
import itertools
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets.folder import Image
from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig
from torchvision.ops import Conv2dNormActivation
from torchvision.utils import save_image

HAS_GPU, GPUS = torch.cuda.is_available(), os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # but for one test: training there varies from run to run
os.environ["OMP_NUM_THREADS"] = "1"  # two chains on two cores
torch.set_num_threads(1)
HERE, SEED = Path(__file__).parent, int(os.environ.get("SEED", 0))
NAMES = ["01_dynamic_net", "02_teacher_trades", "03_progressive_rslad", "04_predictor", "05_nsga2"]
c1, c2, c3, c4, c5 = CHAPTERS = [*map(importlib.import_module, NAMES)]
for chapter in CHAPTERS:
    chapter.COMMON["device"]["default"] = "cpu"
NETS = {"-".join(key): c1.make_net(*key, [*range(10)]) for key in c1.NETWORKS}
TINY = [NETS["resnet50-tiny"], NETS["mbv3-tiny"]]
both = pytest.mark.parametrize("net", TINY, ids=["resnet50", "mbv3"])
TRAIN = "--batch-size 32 --val-images 10 --epochs".split()
QUICK = {  # every chapter in seconds, on the folder of three classes
    1: [],
    2: [*TRAIN, 3],
    3: [*TRAIN, 2],
    4: "--students 12 --test-students 4 --images 18 --steps 4 --eps 6".split(),
    5: "--population 10 --generations 3".split(),
}


# ---- Helpers, and what several tests share -------------------------------------------------------
def command(number, *words, quick=True):
    """A chapter and its flags; quick: on the folder of three classes, if words do not say else."""
    common = ["--dataset", "shades", "--preset", "tiny", "--out", "run", *QUICK[number]]
    return [*map(str, [HERE / f"{NAMES[number - 1]}.py", *common * quick, *words])]


def run(root, number, *words, fails=False, quick=True):
    """Run a chapter in the folder root; what it prints, or the lines with which it exits."""
    out, problems = io.StringIO(), []

    def in_process(command):  # a chapter that a chapter runs, too: importing torch takes seconds
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [*map(str, command[1:])])
            try:
                CHAPTERS[NAMES.index(Path(command[1]).stem)].main()
            except SystemExit as stop:
                assert isinstance(stop.code, str) and "\n" not in stop.code
                problems.append(stop.code)
                return SimpleNamespace(returncode=1)
        return SimpleNamespace(returncode=0)

    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(subprocess, "run", in_process)
        in_process(["python", *command(number, *words, quick=quick)])
    assert bool(problems) == fails, (problems, out.getvalue())
    return "; ".join(problems) if fails else out.getvalue()


def rows_of(path):
    return list(csv.DictReader(Path(path).read_text("utf-8").splitlines()))


def read(out, *names):
    return [torch.load(out / f"{name}.pt", weights_only=True) for name in names]


def contents(folder):
    """{file: what it holds} of a folder, but for seconds, and checksums that depend on them."""
    found = {path.name: None for path in folder.iterdir()}
    for path in folder.glob("*.csv"):
        found[path.name] = [{**row, "seconds": 0} for row in rows_of(path)]
    for path in [*folder.glob("*.pt"), *folder.glob("*.state")]:
        made = torch.load(path, weights_only=True)
        weights = made.get("data") or made.get("weights", {})
        settings = [*made["settings"].items()]
        found[path.name] = [pair for pair in settings if not pair[0].endswith(".pt")]
        weights = {key: weight.numpy().tobytes() for key, weight in weights.items()}
        found[path.name] += [made.get("students"), weights]
    return found


def weights_of(net, dtype=torch.float64):
    """Random shared weights; kernel transforms and batch norms too, so that a mistake shows."""
    torch.manual_seed(SEED)
    shared = {name: weight.to(dtype) for name, weight in c1.random_weights(net).items()}
    for name, weight in shared.items():
        if "_to" in name or name.endswith(("scale", "shift")):
            weight += 0.1 * torch.randn_like(weight)
    return {name: weight.requires_grad_() for name, weight in shared.items()}


def students_of(net, count):
    """The largest, the smallest, and random students."""
    rng, named = random.Random(SEED), net["students"]
    return [named["largest"], named["smallest"], *(c1.sample(net, rng) for _ in range(count))]


def different(students):
    return [*{tuple(student.values()): student for student in students}.values()]


@pytest.fixture(scope="session", autouse=True)
def chains(request, tmp_path_factory):
    """Both chains, started at once; chains(net) waits for one: its folder and what it printed."""
    if not any("chain" in item.fixturenames for item in request.session.items):
        return (yield)
    root, printed, processes = tmp_path_factory.mktemp("chain"), {}, {}
    os.symlink(HERE / "05_nsga2.py", root / "chapter.py")
    pipes = {"cwd": root, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    for net in ("resnet50", "mbv3"):
        words = "chapter.py", "--dataset=toy", f"--seed={SEED}", f"--net={net}"
        processes[net] = subprocess.Popen([sys.executable, *words], **pipes)

    def wait(net):
        if net not in printed:
            printed[net] = processes[net].communicate()[0]
        assert processes[net].returncode == 0, printed[net]
        return root / f"runs/toy-{net}-tiny-seed{SEED}", printed[net]

    yield wait
    for process in processes.values():
        process.terminate()  # which ends the chapter that it runs, too


@pytest.fixture(scope="session", params=["mbv3", "resnet50"])  # the shorter one first
def chain(request, chains):
    return request.param, *chains(request.param)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A folder with shades/, three classes of 60 + 6 images, and run/, what all chapters make."""
    root, generator = tmp_path_factory.mktemp("finished"), torch.Generator().manual_seed(0)
    for part, count in (("train", 60), ("test", 6)):
        for i, name in enumerate(("bright", "dark", "middling, grün")):
            (root / "shades" / part / name).mkdir(parents=True)
            for n in range(count):
                noise = 0.2 * torch.rand(3, 32 + n % 3, 40, generator=generator)
                save_image(noise + (0.8, 0.0, 0.4)[i], root / "shades" / part / name / f"{n}.png")
    for number in QUICK:
        run(root, number)
    return root


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of that folder, for tests that change run/; shades/ is a link, to the same images."""
    shutil.copytree(finished / "run", tmp_path / "run")
    os.symlink(finished / "shades", tmp_path / "shades")
    return tmp_path


def delete(folder, *patterns):
    for pattern in patterns:
        for path in (folder / "run").glob(pattern):
            path.unlink()


# ---- Chapter 1: the dynamic network --------------------------------------------------------------
# What the authors' released networks count when instantiated:
# net, classes, depths, width indices or kernels, expansion indices, parameters, MACs
ARCHITECTURES = """
resnet50 10 22222 222222 222222222222222222 46077482 2358013952
resnet50 10 00000 000000 000000000000000000 5223570 285232096
resnet50 100 02222 102002 102122000000222102 27588828 1109185536
mbv3 10 44444 77777777777777777777 22222222222222222222 6396570 179706624
mbv3 10 22222 33333333333333333333 00000000000000000000 2142602 35293824
mbv3 100 34233 35357375755535357577 22011212210111222221 4578604 95339008
"""


@pytest.mark.parametrize("line", ARCHITECTURES.split("\n")[1:-1])
def test_counts_of_the_released_networks(line):
    name, classes, depths, others, expands, *expected = line.split()
    net = c1.make_net(name, "paper", [*range(int(classes))])
    if name == "resnet50":
        others = [net["width"][int(i)] for i in others]
    genes = [*map(int, depths), *map(float, others), *(net["expand"][int(i)] for i in expands)]
    genes = [gene if gene % 1 else int(gene) for gene in genes]
    student = c1.canonical(net, dict(zip(net["genes"], genes, strict=True)))
    network, x = c1.Network(net, c1.random_weights(net), student), torch.zeros(1, 3, 32, 32)
    network(x)  # takes the slices; transforming kernels is no cost of the student's
    with FlopCounterMode(display=False) as counter:
        network(x)
    counts = sum(part.numel() for part in network.slices.values()), counter.get_total_flops() // 2
    assert tuple(map(int, expected)) == c5.cost(net, student) == counts


def everyone_of(net):
    """All students of a tiny network, each once."""
    genotypes = (dict(zip(net["genes"], s)) for s in itertools.product(*net["genes"].values()))
    return different(c1.canonical(net, genotype) for genotype in genotypes)


def test_students_are_counted_exactly():
    for net in TINY:
        assert len(everyone_of(net)) == c1.count_students(net)
    resnet, mobilenet = NETS["resnet50-paper"], NETS["mbv3-paper"]
    assert c1.count_students(mobilenet) == (9**2 + 9**3 + 9**4) ** 5
    assert c1.count_students(resnet) == 2 * 3**6 * (3**2 + 3**3 + 3**4) ** 3 * (3**4 + 3**5 + 3**6)
    assert c5.cost(resnet, resnet["students"]["usual"])[0] == 23_538_474  # ResNet-50


def textbook(net, shared, gene):
    """A student of the ResNet as it is written first: channels first, a fresh slice in every
    call."""
    div = c1.divisible

    def conv(name, x, out, k=1, stride=1):
        x = F.conv2d(x, shared[name][:out, : x.shape[1]], None, stride, k // 2)
        scale, shift = (shared[f"{name}_{part}"][:out] for part in ("scale", "shift"))
        return F.batch_norm(x, None, None, scale, shift, training=True)

    def logits(x):
        mid = div(div(net["stem"] * gene["width_mid"]) // 2)
        x = conv("stem_1", x, mid, 3, net["stem_stride"]).relu()
        x = x + conv("stem_2", x, mid, 3).relu() if gene["depth_stem"] else x
        x = conv("stem_3", x, div(net["stem"] * gene["width_stem"]), 3).relu()
        for i, (channels, base, stride, *_) in enumerate(net["stages"], 1):
            out = div(channels * gene[f"width_{i}"])
            for j in range(1, base + gene[f"depth_{i}"] + 1):
                middle = div(round(out * gene[f"expand_{i}_{j}"]))
                y = conv(f"{i}_{j}_reduce", x, middle).relu()
                y = conv(f"{i}_{j}_middle", y, middle, 3, stride if j == 1 else 1).relu()
                x = conv(f"{i}_1_shortcut", F.avg_pool2d(x, stride), out) if j == 1 else x
                x = (x + conv(f"{i}_{j}_last", y, out)).relu()
        x = x.mean((2, 3))
        return x @ shared["classifier"][:, : x.shape[1], 0, 0].T + shared["classifier_bias"]

    return logits


def test_a_slice_computes_what_the_textbook_computes():
    net, shared, x = TINY[0], weights_of(TINY[0]), torch.rand(5, 3, 32, 32).double()
    for student in students_of(net, 3):
        ours, theirs = c1.Network(net, shared, student)(x), textbook(net, shared, student)(x)
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def torchvisions(net, shared, gene):
    """(a student of the MobileNet, the same in torchvision's blocks, which have its parts' order);
    their batch norms average what they are given."""
    network, x = c1.Network(net, shared, gene), 16
    norm, (head, features) = partial(nn.BatchNorm2d, momentum=None), net["head"]
    swish = {"activation_layer": nn.Hardswish, "norm_layer": norm}
    kinds = [(x, 3, x, x, False, "RE", 1)]
    for i, (out, _, stride, activation, gated) in enumerate(net["stages"], 1):
        for j in range(1, gene[f"depth_{i}"] + 1):
            sizes = x, gene[f"kernel_{i}_{j}"], c1.divisible(x * gene[f"expand_{i}_{j}"]), out
            more = {"relu_": "RE", "hardswish": "HS"}[activation], stride if j == 1 else 1
            kinds.append((*sizes, gated, *more))
            x = out
    theirs = nn.Sequential(
        Conv2dNormActivation(3, 16, 3, net["stem_stride"], **swish),
        *(InvertedResidual(InvertedResidualConfig(*kind, 1, 1), norm) for kind in kinds),
        Conv2dNormActivation(x, head, 1, **swish),
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(head, features, 1, bias=False),
        nn.Hardswish(),
        nn.Conv2d(features, len(net["classes"]), 1),
        nn.Flatten(),
    ).to(shared["stem"])
    network(torch.rand(2, 3, 32, 32).to(shared["stem"]))  # takes the slices
    for copy, part in zip(theirs.parameters(), network.slices.values(), strict=True):
        copy.data = part.detach().clone()
    return network, theirs


def test_a_slice_computes_what_torchvisions_blocks_compute():
    net, x = NETS["mbv3-paper"], torch.rand(2, 3, 32, 32).double()
    shared = weights_of(net)
    for student in students_of(net, 1):
        network, theirs = torchvisions(net, shared, student)
        torch.testing.assert_close(network(x).double(), theirs(x), rtol=1e-5, atol=1e-5)


@both
def test_gradients_add_up_over_students_and_are_zero_outside_the_slice(net):
    shared, x = weights_of(net), torch.rand(4, 3, 32, 32).double()
    small, other = (c3.Network(net, shared, student) for student in students_of(net, 1)[1:])
    torch.no_grad()(small)(x)  # even if its slices were first taken without gradients
    losses = [network(x).square().sum() for network in (small, other)]
    one, two, sums = (
        torch.autograd.grad(loss, [*shared.values()], None, True, materialize_grads=True)
        for loss in (*losses, sum(losses))
    )
    for (name, weight), a, b, both_of_them in zip(shared.items(), one, two, sums):
        assert torch.allclose(both_of_them, a + b)
        if weight.dim() == 4 and name in small.slices:
            out, inp = small.slices[name].shape[:2]
            assert a[:out, :inp].any() and not a[out:].any() and not a[:, inp:].any()
        elif weight.dim() == 4:
            assert not a.any()  # of a layer that the student lacks


def test_a_smaller_kernel_is_the_transformed_centre_of_the_next_larger():
    net = NETS["mbv3-paper"]
    shared, student = weights_of(net), net["students"]["smallest"]  # kernels of 3
    network = c1.Network(net, shared, student)
    network(torch.zeros(2, 3, 32, 32).double())
    expected = shared["2_2_middle"][100, 0]
    for k in (5, 3):
        centre, matrix = expected[1:-1, 1:-1].flatten(), shared[f"2_2_middle_to{k}"]
        expected = torch.einsum("i,ij->j", centre, matrix).view(k, k)
    torch.testing.assert_close(network.slices["2_2_middle"][100, 0], expected)
    assert torch.equal(c1.random_weights(net)["2_2_middle_to5"], torch.eye(25))  # at first


@both
def test_sorting_channels_leaves_the_largest_network_and_orders_by_importance(net):
    shared = {name: weight.detach() for name, weight in weights_of(net).items()}
    x, largest = torch.rand(3, 3, 32, 32).double(), net["students"]["largest"]
    before = c3.Network(net, shared, largest)(x)
    c3.sort_channels(net, shared)
    after = c3.Network(net, shared, largest)(x)
    torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5)
    for name in shared.keys() & {"2_1_last", "2_1_middle", "2_1_excite"}:
        importance = shared[name].abs().sum((0, 2, 3))  # of one channel, if it is depthwise
        assert (importance.diff() <= 0).all()


# ---- Attack, judging, augmentation ---------------------------------------------------------------
def test_pgd_on_a_linear_model_is_the_closed_form():
    torch.manual_seed(SEED)
    direction, x = torch.randn(3, 8, 8).double(), torch.rand(6, 3, 8, 8).double()
    for start in (torch.zeros_like(x), 0.5 * torch.randn_like(x)):  # even from outside the ball
        x_adv = c2.pgd(lambda x: (x * direction).sum(), x, start, 0.1, 0.03, 10)
        torch.testing.assert_close(x_adv, (x + 0.1 * direction.sign()).clamp(0, 1))


def test_robust_accuracy_counts_images_right_before_and_after_the_attack():
    torch.manual_seed(SEED)
    images, labels = torch.randint(256, (40, 3, 32, 32)).byte(), torch.randint(3, (40,))
    matrix, asked = torch.randn(3072, 3) / 20, []

    def network(x):
        asked.append(x)
        return x.flatten(1) @ matrix

    natural, robust = c4.judge(network, images, labels, 2 / 255, 0.5 / 255, 20, 7)
    right = network(images / 255).argmax(1) == labels
    assert natural == right.sum().item() / 40 and 0 < robust < natural < 1
    weak = 0.5, 0.1 / 255, 2  # here the start decides; it does not depend on the batch
    alone = [c4.judge(network, images[[i]], labels[[i]], *weak)[1] for i in range(40)]
    assert sum(alone) / 40 == pytest.approx(c4.judge(network, images, labels, *weak, 13)[1])
    wrong = (network(images / 255).argmax(1) + 1) % 3  # even where the attack makes it right
    assert c4.judge(network, images, wrong, *weak) == [0, 0] and 0 < sum(alone)
    del asked[:]
    c4.judge(network, images, labels, 0.01, 0.01, 1)
    assert torch.equal(asked[0], images / 255)  # FGSM starts at the image
    assert not torch.backends.cudnn.allow_tf32  # judging is in float32


def test_calibration_is_pytorchs_average_over_batches():
    net, images = TINY[1], torch.randint(256, (501, 3, 32, 32)).byte()
    network, theirs = torchvisions(net, weights_of(net, torch.float32), students_of(net, 1)[-1])
    for x in images.split(167):  # not 250, 250 and 1
        theirs(x / 255)
    few, judged = images[:3] / 255, c4.calibrated(network, images)
    torch.testing.assert_close(judged(few), theirs.eval()(few), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
def test_every_class_has_its_share_of_the_held_out_tenth(tmp_path, seed):
    args = SimpleNamespace(dataset="toy", seed=seed, preset="tiny")
    data = c1.read_images(args)["data"]
    every = torch.cat([data["train"], data["held_out"]]).flatten(1)
    assert len(every) == 2000 == len(every.unique(dim=0)) and len(data["held_out"]) == 200
    held_out, kept = (data[f"{part}_labels"].bincount() for part in ("held_out", "train"))
    assert (10 * held_out - held_out - kept).abs().max() <= 10
    assert data["held_out_labels"].diff().count_nonzero() > 100  # in random order


def test_calibration_images_are_training_images_augmented_once_for_all(finished):
    """A crop and a flip of each image, its own, as in training; the same for every seed."""
    data, places = read(finished / "run", "01_images")[0]["data"], []
    assert len(data["calibration"]) == len(data["train"]) == 162  # at most 2,000, tiny 500
    every = [*itertools.product(range(9), range(9), ([], [2]))]
    for image, ours in zip(F.pad(data["train"], (4, 4, 4, 4)), data["calibration"]):
        crops = (image[:, y : y + 32, x : x + 32].flip(flip) for y, x, flip in every)
        (place,) = (n for n, crop in enumerate(crops) if torch.equal(crop, ours))
        places.append(place)
    assert len({*places}) > 100 and {place % 2 for place in places} == {0, 1}
    args = SimpleNamespace(dataset=str(finished / "shades"), seed=7, preset="tiny")
    assert torch.equal(c1.read_images(args)["data"]["calibration"], data["calibration"])


# ---- Chapters 2 and 3: the losses against their formulas, and a run's course ---------------------
def textbook_kl(target, logits):
    """KL(target || softmax(logits)), mean over images; target holds probabilities."""
    return (target * (target.log() - logits.log_softmax(1))).sum() / len(target)


@pytest.mark.parametrize("chapter", [c2, c3], ids=["trades", "rslad"])
def test_a_loss_is_the_textbooks(chapter, monkeypatch):
    """TRADES, and RSLAD (equation 2): the loss, its gradients, and what the attack climbs."""
    net, shared, seen, trades = TINY[0], weights_of(TINY[0]), {}, chapter is c2
    student, x = students_of(net, 1)[-1], torch.rand(12, 3, 32, 32).double()
    y, attack = torch.randint(10, (12,)), (8 / 255, 4 / 255, 3)

    def pgd(loss, x, noise, *attack, real=chapter.pgd):
        seen.update(loss=loss, noise=noise, attack=attack, x_adv=real(loss, x, noise, *attack))
        return seen["x_adv"]

    monkeypatch.setattr(chapter, "pgd", pgd)
    network, theirs = chapter.Network(net, shared, student), textbook(net, shared, student)
    if trades:
        loss, parts = c2.trades_loss(network, x, y, 6, attack)
        target = theirs(x).softmax(1)
    else:
        other = {name: 1.1 * weight.detach() for name, weight in weights_of(net).items()}
        largest = net["students"]["largest"]  # of those weights: it is the teacher
        loss, parts = c3.rslad_loss(network, c3.Network(net, other, largest), x, 0.7, attack)
        target = textbook(net, other, largest)(x).softmax(1)
    assert 0.0008 < seen["noise"].std() < 0.0012 and seen["attack"] == attack
    x_adv = seen["x_adv"]
    robust, before = (textbook_kl(target, theirs(at)) for at in (x_adv, x + seen["noise"]))
    expected = 0.3 * textbook_kl(target, theirs(x)) + 0.7 * robust
    if trades:
        expected = 6 * robust - target[range(12), y].log().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4) and robust > before
    assert [*parts.values()][1].item() == pytest.approx(robust.item(), rel=1e-4)
    gradients = (
        torch.autograd.grad(value, [*shared.values()], None, True, materialize_grads=True)
        for value in (loss, expected)
    )
    assert all(torch.allclose(*pair, rtol=1e-3, atol=1e-6) for pair in zip(*gradients))
    # TRADES is attacked with the statistics of each x', RSLAD's student with those of x.
    attacked = chapter.Network(net, shared, student)
    attacked(x)
    attacked = attacked if trades else chapter.fold_norms(attacked)
    climbed = textbook_kl(target, attacked(x_adv).double())
    assert seen["loss"](x_adv).item() == pytest.approx(climbed.item(), rel=1e-4)
    assert trades or abs(climbed - robust) > 1e-4 * robust


def test_the_largest_student_begins_as_the_teacher():
    """Both have the batch's statistics: only the method moves it."""
    net, shared, x = TINY[1], weights_of(TINY[1]), torch.rand(12, 3, 32, 32).double()
    teacher, network = (c3.Network(net, shared, net["students"]["largest"]) for _ in range(2))
    assert c3.rslad_loss(network, teacher, x, 0.7, (0.03, 0.01, 1))[1]["natural_kl"] < 1e-6


def course(root, monkeypatch, number, *words, judge=None):
    """Run a chapter with a loss that is soon computed; what each of its steps saw."""
    module, steps, step = CHAPTERS[number - 1], [], torch.optim.SGD.step
    name = "trades_loss" if number == 2 else "rslad_loss"

    def loss(network, *others):
        copies = {key: weight.detach().clone() for key, weight in network.shared.items()}
        steps.append({"student": network.student, "shared": copies, "others": others})
        small = 1e-3 * network(torch.rand(9, 3, 32, 32)).square().mean()
        return small, {"kl": torch.zeros(())}

    def record(optimizer):
        group = optimizer.param_groups[0]
        decay = group["momentum"], group["weight_decay"]
        steps[-1].update(lr=group["lr"], momentum=len(optimizer.state), decay=decay)
        return step(optimizer)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, loss)
        patch.setattr(module, "judge", judge or (lambda *_: (0.5, 0.5)))
        patch.setattr(torch.optim.SGD, "step", record)
        run(root, number, *words)
    assert all(step["decay"] == (0.9, 2e-4) for step in steps)
    return steps


def test_the_course_of_trades(folder, monkeypatch):
    """Warm-up and cosine; the epoch that is kept has the largest sum of both accuracies on held-out
    images, the latest of equal ones: not the first or second, the best in one of them, nor the last
    of these five, of 5 steps each."""
    delete(folder, "02*")
    (data,) = (made["data"] for made in read(folder / "run", "01_images"))
    scores = iter([(0.875, 0.125), (0.5, 0.75), (0.75, 0.625), (0.8125, 0.5625), (0.5, 0.5)])

    def judge(network, images, labels, *attack):
        assert torch.equal(images, data["held_out"][:10]) and attack == (8 / 255, 4 / 255, 3)
        assert torch.equal(labels, data["held_out_labels"][:10])
        return next(scores)

    steps = course(folder, monkeypatch, 2, "--epochs", 5, judge=judge)
    shares = np.arange(1, 26) / 25
    expected = 0.15 * np.minimum(5 * shares, (1 + np.cos(math.pi * shares)) / 2)
    assert np.allclose([step["lr"] for step in steps], expected)
    net, teacher = read(folder / "run", "01_dynamic_net", "02_teacher")
    for name, weight in teacher["weights"].items():
        assert torch.equal(weight, steps[20]["shared"][name])
        assert torch.equal(net["weights"][name], steps[0]["shared"][name])
    assert all(step["student"] == net["net"]["students"]["largest"] for step in steps)


@pytest.mark.parametrize(
    "words",
    [*(f"--sampling {name}" for name in ("progressive", "random", "scratch")), "--student usual"],
)
def test_the_course_of_distillation(folder, monkeypatch, words):
    """Figure 4: 3 phases of 2 epochs of 5 iterations; one student: 1 phase of 6 epochs."""
    name = words.split()[1]
    delete(folder, "03*")
    steps = course(folder, monkeypatch, 3, *words.split())
    net = read(folder / "run", "01_dynamic_net")[0]["net"]
    start = "01_dynamic_net" if name in ("usual", "scratch") else "02_teacher"
    first, trained = read(folder / "run", start, "02_teacher")
    if name in ("random", "scratch"):  # channels are sorted before expansions vary
        c3.sort_channels(net, first["weights"])
    assert all(torch.equal(w, first["weights"][key]) for key, w in steps[0]["shared"].items())
    (made,) = read(folder / "run", f"03_{name}")  # the last step has a rate of 0
    assert all(torch.equal(w, made["weights"][key]) for key, w in steps[-1]["shared"].items())
    length = 30 if name == "usual" else 10
    for i, step in enumerate(steps):  # warm-up and cosine, in each phase anew
        share = (i % length + 1) / length
        lr = 0.36 * min(share / 0.1, (1 + math.cos(math.pi * share)) / 2)
        assert abs(step["lr"] - lr) < 1e-9 and (step["momentum"] == 0) == (i % length == 0)
    varied, largest, every = [], net["students"]["largest"], {"width", "depth", "expand"}
    for part in (steps[:10], steps[10:20], steps[20:]):
        pairs = [pair for step in part for pair in step["student"].items()]
        below = [gene for gene, value in pairs if value not in (0, largest[gene])]  # 0: off
        below += [gene for gene, value in pairs if "depth" in gene and value == 0]
        varied.append({gene.split("_")[0] for gene in below})
    if name == "usual":
        assert all(step["student"] == net["students"]["usual"] for step in steps)
    else:
        phases = [{"width"}, {"width", "depth"}, every] if name == "progressive" else [every] * 3
        assert varied == phases
        assert len(different(step["student"] for step in steps[-10:])) > 5  # each its own
    x = torch.rand(9, 3, 32, 32)  # the teacher answers with the batch's statistics, and stays
    expected = c2.Network(net, trained["weights"], largest)(x)
    assert torch.equal(steps[0]["others"][0](x), expected)  # one teacher: all steps are over
    assert len({step["others"][0] for step in steps}) == 1
    for after in (10, 20):  # sorted once, progressive between the second and the third phase
        moved = steps[after - 1]["shared"]["1_1_last"] - steps[after]["shared"]["1_1_last"]
        assert (moved.abs().max() > 0.2) == (name == "progressive" and after == 20)


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_the_attack_as_a_cuda_graph_changes_no_loss(folder):
    plain = f"c3 = __import__({NAMES[2]!r}); c3.Replayed = lambda function: function; c3.main()"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": GPUS or "0", "PYTHONPATH": str(HERE)}
    script, *flags = command(3, "--epochs", 1)
    losses = []
    for code in ([script], ["-c", plain]):
        delete(folder, "03*")
        words = [sys.executable, *code, *flags]
        printed = subprocess.check_output(words, cwd=folder, env=environment, text=True)
        assert "on cuda in" in printed
        log = rows_of(folder / "run/03_progressive.csv")
        losses.append([float(row["loss"]) for row in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# ---- Chapter 4: the predictor --------------------------------------------------------------------
@both
def test_the_predictor_recovers_an_additive_function(net):
    students = different(students_of(net, 600))[:300]
    features = c4.one_hot(net, students)
    for student, row in zip(students[:50], features.tolist()):  # nothing for a gene that is off
        pairs = [
            (student[gene], choice) for gene, choices in net["genes"].items() for choice in choices
        ]
        assert row == [float(gene == choice) for gene, choice in pairs]
    torch.manual_seed(SEED)
    labels = features @ (torch.randn(features.shape[1], 2) / 50) + 0.5
    predictor = c4.train_predictor(net, students[:250], labels[:250], 20, SEED)
    error = c4.predict_accuracy(predictor, net, students[250:]) - labels[250:]
    assert (error.square().mean(0).sqrt() < labels.std(0) / 4).all()
    report = c4.compare(net, students, labels, labels[250:])
    assert all(row["linear"] < 1e-3 and row["RMSE"] == 0 for row in report)


def test_the_report_is_of_all_pairs():
    rng, net = np.random.default_rng(SEED), TINY[0]
    labels, predicted = rng.integers(0, 8, (40, 2)) / 8, rng.integers(0, 12, (30, 2)) / 12  # ties
    rows = c4.compare(net, students_of(net, 38), torch.tensor(labels), torch.tensor(predicted))
    for target, row in enumerate(rows):
        real, guessed, mean = labels[10:, target], predicted[:, target], labels[:10, target].mean()
        pairs = np.array([*itertools.combinations(range(30), 2)])
        signs = [np.sign(part[pairs[:, 0]] - part[pairs[:, 1]]) for part in (real, guessed)]
        untied = [np.abs(part).sum() for part in signs]
        assert row["tau"] == pytest.approx((signs[0] @ signs[1]) / np.prod(untied) ** 0.5)
        assert row["RMSE"] == pytest.approx(((real - guessed) ** 2).mean() ** 0.5)
        assert row["of the mean"] == pytest.approx(((real - mean) ** 2).mean() ** 0.5)


def test_progress_says_what_is_left(monkeypatch, capsys):
    monkeypatch.setattr(c4.time, "monotonic", itertools.count(0, 5).__next__)  # 5 s a look
    assert [*c4.counted("epoch 1:", range(9), rounds=3)] == [*range(9)]
    assert capsys.readouterr().out.startswith("  epoch 1: 2/9, 4.2 minutes left\n")


# ---- Chapter 5: NSGA-II --------------------------------------------------------------------------
def test_sorting_and_crowding_agree_with_brute_force():
    rng = np.random.default_rng(SEED)
    for _ in range(20):
        points = rng.integers(0, 6, (40, 2)).astype(float)  # many ties
        violation = rng.choice([0.0, 0.0, 1.0, 2.0], 40)

        def beats(i, j):
            if violation[i] != violation[j]:
                return violation[i] < violation[j]
            return (points[i] >= points[j]).all() and (points[i] > points[j]).any()

        rank, left, level = c5.non_dominated_sort(c5.dominance(points, violation)), {*range(40)}, 0
        while left:
            front = {i for i in left if not any(beats(j, i) for j in left)}
            assert {i for i in left if rank[i] == level} == front
            left, level = left - front, level + 1
    points = np.array([[0.0, 10.0], [1.0, 6.0], [4.0, 5.0], [10.0, 0.0], [0.0, 0.0]])
    assert c5.crowding_distance(points[:4]).tolist() == [np.inf, 0.9, 1.5, np.inf]
    assert c5.survivors([*"abcde"], points, np.zeros(5), 3)[0] == [*"adc"]


def test_a_child_has_genes_of_both_parents_or_new_ones():
    net, rng = TINY[1], random.Random(SEED)
    parents = net["students"]["smallest"], net["students"]["largest"]
    for mutation, expected in ((0, {2, 4}), (1, {2, 3, 4})):
        children = [c5.breed(net, *parents, mutation, rng) for _ in range(100)]
        assert {child["expand_1_1"] for child in children} == expected


def test_nsga2_reaches_the_true_front_and_keeps_the_budget(monkeypatch):
    net, rng = TINY[1], np.random.default_rng(SEED)  # 1,764 students: all can be looked at
    everyone = sorted(everyone_of(net), key=lambda student: [*student.values()])
    effect = rng.normal(size=(c5.one_hot(net, everyone).shape[1], 2))
    effect[:, 1] -= 2 * effect[:, 0]  # what is good for one objective is mostly bad for the other

    def evaluate(students):
        macs = np.array([c5.cost(net, student)[1] / 1e6 for student in students])
        return c5.one_hot(net, students).numpy() @ effect, (macs - 1.1).clip(0)

    def front(students, *scores):
        best = np.flatnonzero(~c5.dominance(*scores).any(0))
        return {tuple(students[i].values()) for i in best}

    mothers, breed = [], c5.breed
    monkeypatch.setattr(
        c5, "breed", lambda net, mother, *rest: mothers.append(mother) or breed(net, mother, *rest)
    )
    first, last = c5.nsga2(net, evaluate, 60, 150, 0.1, SEED)
    assert front(*last) == front(everyone, *evaluate(everyone))
    assert len({tuple(student.values()) for student in last[0]}) == 60
    assert np.mean([first[0].index(mother) for mother in mothers[:60]]) < 25  # the better of two


# ---- Baselines, table 1 and the figures ----------------------------------------------------------
def test_baselines_make_table_1_and_the_costs(folder, monkeypatch):
    """TRADES and RSLAD of one student; a second budget; figures from .pt files only."""
    out, asked = folder / "run", []
    least = run(folder, 5, "--max-macs", 0.1, fails=True).split("student's are ")[1].split(",")[0]
    budget = float(least) + 0.001
    run(folder, 5, "--max-macs", budget)
    run(folder, 2, "--epochs", 1, "--student", "usual")
    run(folder, 3, "--student", "usual")
    run(folder, 2, "--judge", "--eps", 4)
    net, search, small = read(out, "01_dynamic_net", "05_search", f"05_search_{budget:g}M")
    named, net = net["net"]["students"], net["net"]
    students = {
        ("02_teacher", "largest"): named["largest"],
        ("02_usual", "usual"): named["usual"],
        ("03_progressive", "largest"): named["largest"],
        ("03_progressive", "usual"): named["usual"],
        ("03_usual", "usual"): named["usual"],
        ("05_search", "best"): search["students"]["best"],
        (f"05_search_{budget:g}M", "best"): named["smallest"],
    }
    rows = rows_of(out / "table1.csv")
    for row, (name, student) in zip(rows, students.items(), strict=True):
        assert (row["file"], row["student"], row["eps"]) == (*name, "4.0")
        assert (int(row["params"]), int(row["macs"])) == c5.cost(net, student)
    assert {path.name for path in out.glob("*.pt2")} == {"student.pt2", f"student_{budget:g}M.pt2"}
    (data,) = (made["data"] for made in read(out, "01_images"))

    def judge(network, images, labels, *attack):
        assert torch.equal(images, data["test"]) and torch.equal(labels, data["test_labels"])
        asked.append(attack)
        return 1, 1

    def calibrated(network, images, real=c2.calibrated):
        assert torch.equal(images, data["calibration"])
        return real(network, images)

    monkeypatch.setattr(c2, "judge", judge)
    monkeypatch.setattr(c2, "calibrated", calibrated)
    delete(folder, f"05_search_{budget:g}M.pt")
    said, at = run(folder, 2, "--judge", "--eps", 48), 48 / 255  # steps reach it: 20 of a quarter
    assert {*asked} == {(at, at, 1), (at, at / 4, 20)}
    assert "student.pt2" in said and f"student_{budget:g}M.pt2" not in said  # which is an old one
    for table in out.glob("*.csv"):  # tables are for people
        table.write_text("cut,by\n")
    assert "50 devices: " in run(folder, 5, "--figures")
    seconds = [row["seconds"] for row in read(out, "03_usual")[0]["rows"]]
    hours = float(rows_of(out / "05_cost.csv")[9]["retraining"])
    assert hours == pytest.approx(10 * np.median(seconds) * len(seconds) / 3600)
    population = small["rows"]["population"]
    fit = [row for row in population if row["macs"] <= 1e6 * budget]
    dots = (out / f"05_population_{budget:g}M.svg").read_text().count("<circle")
    assert dots == len(fit) + 1 < len(population)
    delete(folder, "03_usual*")
    run(folder, 3, "--student", "usual", "--epochs", 1)
    assert "50 devices: " not in run(folder, 5, "--figures")  # fewer epochs would cost less


# ---- What main wires together: which images, which weights, which rows ---------------------------
def replaced(monkeypatch, part):
    """From now on chapters read noise, and other labels, in place of this part of the images."""
    for chapter in CHAPTERS[1:]:

        def load(path, *words, real=chapter.load, **more):
            made = real(path, *words, **more)
            if path.name == "01_images.pt":
                data, generator = made["data"], torch.Generator().manual_seed(1)
                data[part] = torch.randint(256, data[part].shape, generator=generator).byte()
                if part != "calibration":
                    data[f"{part}_labels"] = data[f"{part}_labels"].flip(0)
            return made

        monkeypatch.setattr(chapter, "load", load)


def test_only_table_1_sees_test_images(folder, monkeypatch):
    before = contents(folder / "run")
    delete(folder, "0[2-5]*", "table1.csv", "student.pt2")
    replaced(monkeypatch, "test")
    for number in (2, 3, 4, 5):
        run(folder, number)
    after = contents(folder / "run")
    assert before.pop("table1.csv") != after.pop("table1.csv") and before == after


def test_held_out_and_calibration_images_measure_and_train_nothing(folder, monkeypatch):
    words, made = ("--student", "usual", "--epochs", 1), []
    for part in (None, "held_out", "calibration"):
        with monkeypatch.context() as patch:
            if part:
                replaced(patch, part)
            delete(folder, "04*", "0[23]_usual*")
            for number, more in ((2, words), (3, words), (4, ())):
                run(folder, number, *more)
        made.append(contents(folder / "run"))
    before, *others = made
    for after, name in itertools.product(others, ("02_usual", "03_usual", "04_students")):
        assert before.get(f"{name}.pt") == after.get(f"{name}.pt")  # weights
        for row, other in zip(before[f"{name}.csv"], after[f"{name}.csv"], strict=True):
            for key in row:
                measured = key.startswith("natural") and key != "natural_kl"
                assert (row[key] != other[key]) == measured or key.startswith("robust")


def test_the_predictor_is_fitted_to_all_but_the_test_students(folder, monkeypatch):
    """Students 9 to 12 test it: their labels change its report, the first one's change its fit."""
    made, (source,) = [], read(folder / "run", "03_progressive")
    same = lambda weights: all(torch.equal(w, weights[key]) for key, w in source["weights"].items())
    for other in (None, 9, 12, 1):
        asked = []

        def measure(network, *_, other=other, asked=asked):
            asked.append(network)
            natural = 0.1 if len(asked) == other else 0.5 + 0.01 * len(asked)
            return {"natural": natural, "robust": natural / 2, "seconds": 1.0}

        delete(folder, "04*")
        monkeypatch.setattr(c4, "measure", measure)
        run(folder, 4)
        (file,) = read(folder / "run", "04_predictor")
        rows, net = file["rows"], file["net"]
        assert all(same(network.shared) for network in asked) and same(file["weights"])
        students = [{gene: row[gene] for gene in net["genes"]} for row in rows["students"]]
        students += c4.widths(net).values()  # figure 6
        assert [network.student for network in asked] == students and len(students) == 12 + 3
        assert students[-1] == net["students"]["largest"]
        labels = [row["natural"] for row in rows["students"][-4:]]
        assert np.allclose(labels, [row["natural"] for row in rows["predictions"]])
        layers = [weight.tolist() for layer in file["predictor"]["layers"] for weight in layer]
        made.append((layers, file["predictor"]["mean"].tolist(), rows["report"]))
    first, *tested, fitted = made
    assert all(first[:2] == other[:2] and first[2] != other[2] for other in tested)
    assert first[0] != fitted[0] and first[1] != fitted[1]


def test_the_student_chosen_has_the_largest_sum_within_the_budget(folder, monkeypatch):
    delete(folder, "05*", "table1.csv")
    (net,) = (made["net"] for made in read(folder / "run", "01_dynamic_net"))
    students = different(students_of(net, 9))[:5]  # the largest, the smallest, others
    scores = np.array([[0.9, 0.1], [0.1, 0.9], [0.6, 0.55], [0.55, 0.57], [0.99, 0.99]])
    last = students, scores, np.array([0, 0, 0, 0, 1.0])
    first = students[::-1], np.ones((5, 2)), np.zeros(5)

    def nsga2(net, evaluate, *_):
        violation = evaluate(students)[1]  # in millions of MACs
        assert violation[:2] == pytest.approx([c5.cost(net, students[0])[1] / 1e6 - 2.3, 0])
        return first, last

    monkeypatch.setattr(c5, "nsga2", nsga2)
    monkeypatch.setattr(c5, "run_chapter", lambda *_: None)
    run(folder, 5, "--max-macs", 2.3)
    search, source = read(folder / "run", "05_search_2.3M", "03_progressive")
    assert search["students"] == {"best": students[2]}
    assert all(torch.equal(w, source["weights"][key]) for key, w in search["weights"].items())


def test_each_sampling_has_its_own_files(folder):
    for number, more in ((3, ("--epochs", 1)), (4, ()), (5, ())):
        run(folder, number, "--sampling", "random", *more)
    source, *others = read(folder / "run", "03_random", "04_predictor_random", "05_search_random")
    for made in others:
        assert all(torch.equal(w, made["weights"][key]) for key, w in source["weights"].items())
    (student,) = others[1]["students"].values()
    fitted = c5.predict_accuracy(others[0]["predictor"], source["net"], [student])[0].tolist()
    (best,) = others[1]["rows"]["best"]
    assert fitted == pytest.approx([best["predicted_natural"], best["predicted_robust"]], rel=1e-5)
    assert {"03_random", "05_search", "05_search_random"} < {
        row["file"] for row in rows_of(folder / "run/table1.csv")
    }


# ---- Stops: killed at any moment, the same command ends with the same files ----------------------
def test_stopped_at_any_moment(finished, tmp_path, monkeypatch):
    """Some time after its first state, or after its start, each chapter gets a Ctrl-C."""
    os.symlink(finished / "shades", tmp_path / "shades")
    rng, stops = random.Random(SEED), 0
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    for number, chapter in enumerate(CHAPTERS, 1):

        def save(path, *content, real=chapter.save, **more):
            if path.suffix == ".state":
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.01, 0.5))
            return real(path, *content, **more)

        monkeypatch.setattr(chapter, "save", save)
        try:
            signal.setitimer(signal.ITIMER_REAL, 60 if number in (2, 3, 4) else 0.2)
            run(tmp_path, number)
        except (KeyboardInterrupt, RuntimeError):  # the latter from within torch.save
            stops += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        monkeypatch.undo()
        run(tmp_path, number)
    assert stops > 2 and contents(finished / "run") == contents(tmp_path / "run")


def test_what_is_missing_is_made_the_same(folder):
    before = contents(folder / "run")
    delete(folder, "01_images.pt", "04_students.svg", "student.pt2", "table1.csv")
    run(folder, 1)
    run(folder, 5)
    assert before == contents(folder / "run")
    delete(folder, "01*", "02*")  # not needed by what is there
    assert "running" not in run(folder, 5)


def test_more_students_add_to_the_measured_ones(folder, monkeypatch):
    (before,) = read(folder / "run", "04_predictor")
    delete(folder, "04_predictor.pt")
    measured, judge = [], c4.measure
    monkeypatch.setattr(c4, "measure", lambda *a: measured.append(1) or judge(*a))
    run(folder, 4, "--students", 14)
    (after,) = read(folder / "run", "04_predictor")
    assert (
        after["rows"]["students"][:12] == before["rows"]["students"] and len(measured) == 2 + 3
    )  # and widths


def test_a_file_is_written_whole_or_not(tmp_path, monkeypatch):
    """Its bytes reach the disk before its name does."""
    path, synced = tmp_path / "02_a.state", []
    size = lambda file: synced.append((os.fstat(file).st_size, path.exists()))
    monkeypatch.setattr(os, "fsync", size)
    c2.save(path, {"a": 1}, rows=[1])
    assert synced == [(path.stat().st_size, False)]
    monkeypatch.setattr(torch, "save", lambda content, file: file.write(b"cut") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        c2.save(path, {"a": 1}, rows=[2])
    assert c2.load(path, {"a": 1})["rows"] == [1] and [*tmp_path.iterdir()] == [path]


def test_a_chapter_that_is_stopped_takes_its_child_along(folder):
    delete(folder, "0[2-5]*")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": folder}
    process = subprocess.Popen([sys.executable, *command(5)], **pipes)
    while "TRADES" not in process.stdout.readline():
        assert process.poll() is None
    process.terminate()
    error = process.communicate(timeout=20)[1]  # the pipe closes when the last of them has ended
    assert process.returncode == 1 and error == "stopped: the same command resumes\n"
    assert not list((folder / "run").glob("02_*.pt"))


# ---- Nothing meets what it does not belong to ----------------------------------------------------
def test_a_predecessor_made_anew_is_noticed(folder):
    delete(folder, "02_*")
    run(folder, 2, "--epochs", 1)
    stale = "run/03_progressive.pt: 02_teacher.pt was "
    assert "03_progressive.pt: 02 epochs was 3, is 1" in run(folder, 3, fails=True)
    assert stale in run(folder, 4, fails=True)
    assert "04_predictor.pt: 02_teacher.pt was " in run(folder, 5, fails=True)  # further up
    judged = run(folder, 2, "--judge")
    assert f"left out: {stale}" in judged and "left out: run/05_search.pt: 02_teacher" in judged
    assert [row["file"] for row in rows_of(folder / "run/table1.csv")] == ["02_teacher"]
    assert f"left out: {stale}" in run(folder, 5, "--figures")
    delete(folder, "0[3-5]*.pt")  # the state of the measured students is another network's, too
    run(folder, 3)
    assert "04_measured.state: 02 epochs was 3, is 1" in run(folder, 4, fails=True)
    (folder / "run/04_measured.state").unlink()
    run(folder, 4)
    run(folder, 5)
    assert rows_of(folder / "run/table1.csv")[-1]["file"] == "05_search"


def test_other_settings_are_refused_before_anything_is_written(folder):
    """Of a file, of a state, and of what led to a file."""
    shutil.copy(folder / "run/03_progressive.pt", folder / "run/03_usual.state")
    before = contents(folder / "run")
    words = "--student", "usual", "--epochs", 3
    assert "03_usual.state: 03 epochs was 2, is 3" in run(folder, 3, *words, fails=True)
    assert "04_predictor.pt: 04 eps was 6.0, is 7.0" in run(folder, 4, "--eps", 7, fails=True)
    assert "01_images.pt: net was resnet50, is mbv3" in run(folder, 2, "--net", "mbv3", fails=True)
    assert "04_predictor.pt: seed was 0, is 1" in run(folder, 5, "--seed", 1, fails=True)
    shutil.copytree(folder / "shades", folder / "other/shades")
    assert ": dataset was " in run(folder, 2, "--dataset", "other/shades", fails=True)
    assert before == contents(folder / "run")


@pytest.mark.parametrize("same", [True, False])
def test_two_jobs_at_once_do_not_overwrite_each_other(folder, monkeypatch, same):
    """The other one ends while this one trains: it is kept; if its settings are these, its numbers,
    which may be rounded otherwise, are those that are printed and tabled."""
    other, usual = folder / "other", folder / "run/02_usual.pt"
    run(folder, 2, "--student", "usual", "--epochs", 1)
    usual.rename(other)
    monkeypatch.setattr(c2, "judge", lambda *_: (shutil.copy(other, usual), (0.123, 0.123))[1])
    said = run(folder, 2, "--student", "usual", "--epochs", 1 if same else 2, fails=not same)
    assert same or "02_usual.pt: 02 epochs was 1, is 2" in said
    assert usual.read_bytes() == other.read_bytes()
    (row,) = rows_of(folder / "run/02_usual.csv")
    assert float(row["natural"]) == torch.load(other)["rows"][0]["natural"] != 0.123
    assert not same or "0.123" not in said.split("natural")[-1]


@pytest.mark.parametrize("name", ["02_teacher", "03_progressive", "04_measured"])
def test_a_state_of_other_settings_is_not_overwritten(folder, monkeypatch, name):
    """The other job starts while this one trains or measures: the later one to save exits."""
    number, state, other = int(name[1]), folder / f"run/{name}.state", folder / "other"
    (made,) = read(folder / "run", name.replace("measured", "predictor"))
    torch.save({"settings": {**made["settings"], f"0{number} eps": 7.0}, "rows": []}, other)
    delete(folder, f"0{number}*")

    def judge(*_):
        shutil.copy(other, state)
        return 1, 1

    monkeypatch.setattr(CHAPTERS[number - 1], "judge", judge)
    assert f"{name}.state: 0{number} eps was 7.0, is " in run(folder, number, fails=True)
    assert state.read_bytes() == other.read_bytes()


def test_other_images_are_noticed(folder):
    dark = shutil.copytree(folder / "shades", folder / "own") / "train/dark"
    for part in ("train", "test"):  # a hidden folder is no class
        shutil.copytree(dark, folder / "own" / part / ".thumbnails")
    words = "--dataset", "own", "--out", "new"
    printed = run(folder, 1, *words)
    labels = torch.load(folder / "new/01_images.pt")["data"]["train_labels"]
    share = labels.bincount().max().item() / 162
    assert f"own: 162 train images, {share:.0%} of the largest class" in printed
    assert "in this order: bright, dark, middling, grün" in printed
    run(folder, 2, *words, "--epochs", 1)
    shutil.copy(dark / "1.png", dark / "0.png")
    (folder / "new/01_images.pt").unlink()
    changed = "01_dynamic_net.pt: 01_images.pt was "
    assert changed in run(folder, 1, *words, fails=True)
    assert changed.replace("01_dynamic_net", "02_teacher") in run(folder, 3, *words, fails=True)


# ---- Bad input: one line, nothing lost -----------------------------------------------------------
BAD_FLAGS = """
1 --dataset nowhere --out new: cifar10, cifar100, toy, or a folder of train/
2 --step-size 0.0078: step_size is 0.0078, not 0.02 to inf: of the attack, in 1/255
3 --student usual --sampling random: --student is one: use one of them
4 --sampling usual: argument --sampling: invalid choice: 'usual'
3 --student b: argument --student: invalid choice: 'b'
3 --alpha 1.1: alpha is 1.1, not 0 to 1
3 --warmup 0: warmup is 0.0, not 1e-09 to 1
3 --student usual --lr 1e3 --warmup 0.001: the loss is not finite
3 --epochs 3: 03 epochs was 2, is 3: delete the file, or use another --out
3 --student usual --batch-size 200 --epochs 0: epochs is 0, not 1 to inf
4 --eps 0.031: eps is 0.031, not 0.2 to inf: largest change of a pixel, in units of 1/255
4 --test-students 11: must be at most --students minus 2
5 --mutation 1.5: mutation is 1.5, not 0 to 1
5 --max-macs 2e6: --max-macs is in millions
5 --max-macs 0: --max-macs is in millions
5 --population many: argument --population: invalid int value
"""


@pytest.mark.parametrize("line", BAD_FLAGS.split("\n")[1:-1])
def test_bad_flags(folder, line):
    every = lambda: {path: path.read_bytes() for path in (folder / "run").iterdir()}
    before, (words, says) = every(), line.split(": ", 1)
    assert says in run(folder, *map(int, words[0]), *words[1:].split(), fails=True)
    assert before == every() or "finite" in says  # that run had begun


DARK = "train/dark/7.png"
DEEP = Image.fromarray(np.zeros((32, 32), np.uint16))
SPOIL = {
    f"{DARK} cannot be used, convert or remove it: cannot": lambda at: (at / DARK).write_bytes(b""),
    f"{DARK} cannot be used, convert or remove it: 16 or 32": lambda at: DEEP.save(at / DARK),
    "train/ and test/ differ in ['dark']": lambda at: shutil.rmtree(at / "test/dark"),
    "at least two classes and ten": lambda at: [*map(shutil.rmtree, at.glob("*/[!b]*"))],
    "or a folder of train/<class>/*": lambda at: shutil.rmtree(at / "test"),
}


@pytest.mark.parametrize("says", SPOIL)
def test_bad_folders(folder, says):
    SPOIL[says](shutil.copytree(folder / "shades", folder / "spoilt"))
    assert says in run(folder, 1, "--dataset", "spoilt", "--out", "new", fails=True)
    assert not list((folder / "new").iterdir())


def test_a_failed_download_is_named(folder, monkeypatch):
    fail = lambda *_, **__: (_ for _ in ()).throw(OSError("no host"))
    monkeypatch.setattr("torchvision.datasets.CIFAR10.__init__", fail)
    says = "cifar10 could not be downloaded (no host): put cifar-10-python.tar.gz into data/"
    assert says in run(folder, 1, "--dataset", "cifar10", "--out", "new", fails=True)


def test_a_picture_is_read_as_viewers_show_it(tmp_path):
    gray = (6 * np.arange(32)[:, None] + np.arange(32)).astype(np.uint8)  # no two turns are alike
    black, clear = Image.new("L", (32, 32)), Image.fromarray(255 - gray)
    Image.merge("RGBA", [black, black, black, clear]).save(tmp_path / "icon.png")
    upright = [gray, gray[:, ::-1], gray[::-1, ::-1], gray[::-1]]
    lying = [gray.T, np.rot90(gray), gray[::-1, ::-1].T, np.rot90(gray, -1)]
    for tag, pixels in enumerate(upright + lying, 1):  # of EXIF: how the camera was held
        exif = Image.Exif()
        exif[274] = tag
        for kind, more in {"png": {}, "tiff": {}, "webp": {"lossless": True}, "jpg": {}}.items():
            path = tmp_path / f"{tag}.{kind}"
            Image.fromarray(np.ascontiguousarray(pixels)).save(path, exif=exif, quality=99, **more)
    assert len([*tmp_path.iterdir()]) == 33
    for path in tmp_path.iterdir():
        error = c1.picture(path).astype(int) - gray[:, :, None]
        assert np.abs(error).max() <= (4 if path.suffix == ".jpg" else 0), path.name


# ---- The chain -----------------------------------------------------------------------------------
def test_chapters_share_only_equal_text():
    """Same name, same code, from its decorators on; below the reading bar nothing is new."""
    seen = {}
    for name in NAMES:
        text = (HERE / f"{name}.py").read_text()
        lines, known = text.splitlines(), {*seen}
        bars = [n for n, line in enumerate(lines, 1) if line.startswith("# ====")]
        assert len(bars) == (name != NAMES[0])
        for node in ast.parse(text).body:
            targets = [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
            first = min([node, *getattr(node, "decorator_list", [])], key=lambda part: part.lineno)
            source = "\n".join(lines[first.lineno - 1 : node.end_lineno])
            below = bool(bars) and node.lineno > bars[0]
            for own in {*targets, getattr(node, "name", "main")} - {"main", "FLAGS", "STAGE"}:
                assert seen.setdefault(own, source) == source, f"{own} differs in {name}"
                assert (own in known) == below, f"{own} is on the wrong side of {name}'s bar"
    assert len(seen) > 50


WRITTEN = """01_dynamic_net.pt 01_images.pt 01_students.csv
02_teacher.pt 02_teacher.csv 02_teacher.svg 03_progressive.pt 03_progressive.csv
03_progressive.svg 04_measured.state 04_predictions.csv 04_predictions.svg 04_predictor.pt
04_report.csv 04_students.csv 04_students.svg 04_widths.csv 04_widths.svg
05_best.csv 05_population.csv 05_population.svg 05_search.pt student.pt2 table1.csv"""


def test_the_chain_runs_and_each_stage_says_what_comes_next(chain):
    net, out, printed = chain
    assert {path.name for path in out.iterdir()} == {*WRITTEN.split()}
    assert all(f"next: python {name}.py" in printed for name in NAMES[1:])
    assert "on cpu in float32" in printed
    assert "Traceback" not in printed and "Warning" not in printed
    made = [*out.glob("*.pt"), out / "student.pt2", out / "table1.csv"]
    before = [path.stat().st_mtime_ns for path in made]
    for number in QUICK:  # finished stages say so and make nothing anew
        words = "--dataset", "toy", "--net", net, "--seed", SEED
        assert "is finished" in run(out.parent.parent, number, *words, quick=False)
    assert before == [path.stat().st_mtime_ns for path in made]


def test_students_are_robust(chain):
    rows = rows_of(chain[1] / "04_students.csv")
    natural, robust = np.array([(row["natural"], row["robust"]) for row in rows], dtype=float).T
    assert (robust <= natural).all()
    # Not distilled, or not for robustness: less.
    assert natural.mean() > 0.8 and robust.mean() > 0.5


def test_the_search_keeps_its_budget_and_table_1_judges_for_real(chain):
    out = chain[1]
    images, search = read(out, "01_images", "05_search")
    data, net, student = images["data"], search["net"], search["students"]["best"]
    (best,), (teacher, *_, chosen) = rows_of(out / "05_best.csv"), rows_of(out / "table1.csv")
    assert [float(best[gene]) for gene in net["genes"]] == [*student.values()]
    assert (int(chosen["params"]), int(chosen["macs"])) == c5.cost(net, student)
    budget, predicted = 1e6 * search["settings"]["05 max_macs"], []
    assert int(best["macs"]) <= budget < int(teacher["macs"])
    for row in search["rows"]["population"]:
        if row["macs"] <= budget and row["generation"] == "last":
            predicted.append(row["predicted_natural"] + row["predicted_robust"])
    assert max(predicted) == float(best["predicted_natural"]) + float(best["predicted_robust"])
    assert float(chosen["natural"]) > float(chosen["fgsm"]) >= float(chosen["pgd20"]) - 0.02 > 0.1
    network = c4.Network(net, search["weights"], student)  # judged by hand
    judged, names, x = (
        c4.calibrated(network, data["calibration"]),
        {"names": ""},
        data["test"] / 255,
    )
    right = (judged(x).argmax(1) == data["test_labels"]).double().mean().item()
    assert right == pytest.approx(float(chosen["natural"]))
    exported = torch.export.load(out / "student.pt2", extra_files=names).module()
    torch.testing.assert_close(exported(x[:9]), judged(x[:9]), rtol=1e-4, atol=1e-4)
    assert names["names"].split("\n") == images["classes"]
    assert not exported(x).requires_grad and len([*exported.parameters()]) == len(judged.slices)


# ---- Honest attacks, on a trained student --------------------------------------------------------
@pytest.mark.parametrize("chain", ["resnet50"], indirect=True)
def test_robust_accuracy_is_no_artefact(chain):
    images, trained = read(chain[1], "01_images", "03_progressive")
    data, net = images["data"], trained["net"]
    network = c4.Network(net, trained["weights"], net["students"]["middle"])
    network = c4.calibrated(network, data["calibration"])
    test = network, data["test"][:125], data["test_labels"][:125]

    def accuracy(eps, step_size, steps):
        return c4.judge(*test, eps / 255, step_size / 255, steps)[1]

    by_steps = [accuracy(8, 2, steps) for steps in (5, 20, 40)]
    assert 0.2 < by_steps[1] <= accuracy(8, 8, 1) + 0.01  # FGSM; an image is 0.008
    assert all(more <= fewer + 0.01 for fewer, more in zip(by_steps, by_steps[1:]))
    by_eps = [accuracy(0.01, 0.0025, 20), by_steps[1], *(accuracy(e, e / 4, 20) for e in (32, 128))]
    assert by_eps == sorted(by_eps, reverse=True)
    assert by_eps[0] > by_eps[1] + 0.02 and by_eps[-1] < 0.01
